"""What the folder of a run holds already: its config, its record, and whether these are the run's own."""

import json
import logging
import pathlib
import re
from collections.abc import Callable

from xformers_lab import config as configs
from xformers_lab.config import Config
from xformers_lab.errors import IntegrityError, UsageError
from xformers_lab.model import build_task
from xformers_lab.record import SETTLED, broken
from xformers_lab.tasks import Task
from xformers_lab.train import checkpoint, jobs, records
from xformers_lab.train.failures import Diverged


def record(run_dir: pathlib.Path, task: Callable[[], Task], config: Config | None = None) -> dict | None:
    """The record of a run that came to its end, a non-finite loss too; raises UsageError where it is of other data than
    those of task() now, IntegrityError where it is not the run's own: that of `config`, by default that of the id that
    the folder has for a name."""
    path = run_dir / "result.json"
    stored = records.read_json(path)
    if stored is None and path.exists():
        logging.getLogger(__name__).warning("%s: cannot be read, so it is made again", path)
    if stored is None or stored.get("status") not in SETTLED:
        return None
    identity = run_dir.name if config is None else configs.identity(config)
    if wrong := broken(stored, identity):
        raise IntegrityError(f"{path}: {wrong}; delete that file, and the run makes it again from its last checkpoint")
    was, now = (
        stored.get("data"),
        records.finite(json.loads(json.dumps(jobs.identifying(task().describe()), default=str))),
    )
    was = jobs.identifying(was) if isinstance(was, dict) else was
    if isinstance(was, dict) and was != now:
        key = next(key for key in {**now, **was} if was.get(key) != now.get(key))
        raise UsageError(
            f"{run_dir}: its result is of other data ({key} was {was.get(key)}, is {now.get(key)}): give these back, "
            "delete that folder to train again, or choose another one with runs="
        )
    return stored


def finished(config: Config, run_dir: pathlib.Path, from_scratch: bool = False) -> dict | None:
    """The record of a run that came to its end; raises Diverged where that end was a non-finite loss, IntegrityError
    where the record cannot be this run's."""
    if from_scratch and not checkpoint.steps(run_dir):
        return None
    stored = record(run_dir, lambda: build_task(config), config)
    if stored is not None and stored["status"] == Diverged.status:
        error = Diverged(f"{stored.get('reason')} (as stored in {run_dir / 'result.json'})")
        error.record = stored
        raise error
    if stored is not None:
        logging.getLogger(__name__).warning("%s: already finished; this is its record", run_dir)
    return stored


def refuse_misnamed(config: Config, run_dir: pathlib.Path) -> None:
    """Raises IntegrityError where a folder has the id of another run for its name, and UsageError where its checkpoint
    tells what changed; any other name is free."""
    identity = configs.identity(config)
    if run_dir.name == identity or not re.fullmatch("[0-9a-f]{12}", run_dir.name):
        return
    if changed := checkpoint.differences(checkpoint.details(run_dir, "config"), configs.decisive(config)):
        raise UsageError(f"{run_dir}: belongs to another config ({changed}); give the old one back")
    raise IntegrityError(
        f"{run_dir}: has the id of another run for its name, since its config is that of {identity}: one of them was "
        "changed, the source of a choice outside the package, or the version of the laboratory; give it back, or the "
        "folder a name of its own"
    )


def config_of(run_dir: pathlib.Path, *, trust: bool) -> Config:
    """trust: run code outside the package that it names, though it is not what the run was trained with."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise UsageError(f"{run_dir}: no run there (a run's folder holds config.json)")
    return configs.stored(path, trust=trust)
