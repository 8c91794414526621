"""What a worker does for train and resume, and how it says so."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.supervise.worker import Tell
from xformers_lab.train import records


def run(tell: Tell, config: dict, words: Sequence[str] = ()) -> dict:
    """Check a config, of which `words` were typed, then train it; -> the record. Raises as `loop.run` does."""
    chosen = configs.from_dict(config)
    tell.doing("preparing the data and the config")
    from xformers_lab.model import check_config

    task = check_config(chosen)
    tell.doing("preparing the config", reading=task.reading())
    from xformers_lab.train import loop

    records.typed(words)
    return loop.run(chosen, **watched(tell, chosen))


def resume(tell: Tell, run_dir: str, trust: bool = False, from_scratch: bool = False) -> dict:
    """Go on with the run in a folder; -> the record. Raises as `loop.resume` does."""
    chosen = configs.stored(pathlib.Path(run_dir) / "config.json", trust=trust)
    tell.doing("preparing the data")
    from xformers_lab.model import build_task
    from xformers_lab.train import loop

    reading: list[str] = []
    with contextlib.suppress(Exception):  # it shows again
        reading = build_task(chosen).reading()
    tell.doing("preparing", reading=reading)
    return loop.resume(run_dir, trust=trust, from_scratch=from_scratch, **watched(tell, chosen))


def watched(tell: Tell, config: configs.Config) -> dict[str, Any]:
    """Callbacks for `loop.run`: a worker's driver hears of every step, and the run ends when its driver is gone."""

    def progress(step: int, total: int, metrics: dict) -> None:
        tell.doing("training", step=step, total=total, loss=metrics.get("loss"))

    def doing(what: str, step: int) -> None:
        tell.doing(what, step=step, total=config.train.steps)

    return {"progress": progress, "stop": lambda: tell.alone, "doing": doing}
