"""Run a grid: only missing cells, each in a worker process; every cell ends as a row.

The driver touches no device: an accelerator may admit one process, so that whatever needs jax is the worker's.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from xformers_lab import config as configs
from xformers_lab import engines, files, spec
from xformers_lab.compare.sweep import Progress, Sweep
from xformers_lab.config import Config
from xformers_lab.errors import RunFailed, UsageError
from xformers_lab.record import IMPOSSIBLE, Record, blank
from xformers_lab.supervise.process import Ended, Worker

PLACING = ("task", "attention", "seq_len", "seed")  # keys that every row has, whatever varies
_POSSIBLE = ("ok", "interrupted")


def check_cells(
    cells: list[Config],
    worker: Worker,
    *,
    skip_impossible: bool = False,
    kit: bool = True,
    announce: Callable[[str], None] = lambda text: None,
) -> dict[Config, dict]:
    """Check every cell before any trains -> the records of those that will not.

    Raises UsageError at impossible cells (unless these are skipped, or are all). A choice of the user's own that is
    broken, or an attention that fails its conformance kit (if `kit`), is a record, and the others go on.
    announce(text) says what takes long.
    """
    records = {}
    impossible = []
    deadly: dict[str, dict] = {}  # mechanisms whose kit ended its process: each is waited for once

    said: set[str] = set()

    def heard(message: dict) -> None:
        for line in message.get("reading", ()):
            if line not in said:  # cells share their data
                said.add(line)
                announce(line)
        if "kit" in message:
            announce(message["doing"])

    for cell in cells:
        known = [deadly[choice] for choice in spec.split(cell.model.attention, "+") if choice in deadly]
        record = dict(known[0]) if known else _check(cell, worker, heard, kit, deadly)
        if worker.stopped:  # the records so far are shown as they are
            return records
        if record["status"] == IMPOSSIBLE:
            impossible.append(record["reason"])
            record["status"] = "refused"
        if record["status"] != "ok":
            records[cell] = record
    if impossible and (not skip_impossible or len(impossible) == len(cells)):
        more = f" (and {len(impossible) - 1} more of {len(cells)} cells)" if len(impossible) > 1 else ""
        mend = "" if len(impossible) == len(cells) else "; --skip-impossible keeps them as refused rows"
        raise UsageError(f"{impossible[0]}{more}{mend}")
    return records


def impossible(cells: Iterable[Config], worker: Worker, *, kit: bool = True) -> dict[Config, str]:
    """Those of the cells that cannot be, and why."""
    outcomes = {cell: _check(cell, worker, lambda message: None, kit, {}) for cell in dict.fromkeys(cells)}
    return {cell: outcome["reason"] for cell, outcome in outcomes.items() if outcome["status"] not in _POSSIBLE}


def row(cell: Config, record: dict, varied: list[str], schema: type[Record] = Record) -> dict:
    """A cell's record with its config and the keys that tell it from the others, None where there is no figure."""
    shown = dict.fromkeys([*PLACING, *varied])
    keys = {key: configs.get(cell, key) for key in shown}
    about = {"kind": "compare", "config": configs.to_dict(cell), "run_dir": str(configs.folder(cell))}
    row = {**blank("compare", schema), **record, **keys, **about}
    row.pop("seal", None)  # it is of the record alone
    return row


def train_cells(
    cells: list[Config],
    worker: Worker,
    *,
    ended: dict[Config, dict],
    progress: Progress,
    engine: engines.Engine | None = None,
    announce: Callable[[str], None] = lambda text: None,
    track: Sequence[str] = (),
) -> list[dict]:
    """Train every cell that has no record in `ended` (what `check_cells` gave) and none that is settled. -> their
    records, in the order of `cells`; worker.stopped says whether all were reached.

    engine: where they train, by default in `worker`. A cell that another process trains, another comparison in the same
    folder, say, is left to it; its record is waited for at the end, and where it leaves none the cell is trained here.
    What another one fails while this one runs is not tried again. A cell that was lost with its worker or its host is
    tried again, `sweep.RETRIES` times.

    announce(text) says what is waited for or tried again, and which of the trackers `track` stopped. Raises UsageError,
    before any trains, where a folder of runs cannot be written, and where a host cannot train any.
    """
    refuse_unwritable(cells)
    engine = engine or engines.chosen().open(worker)
    return Sweep(cells, worker, engine, progress, announce, track).records(ended)


def save_table(
    rows: list[dict], varied: list[str], command: str, runs: str, about: Mapping = MappingProxyType({})
) -> pathlib.Path:
    """Keep the rows of a comparison, so that `xlab report` can draw them again; about: what else is to be said of it,
    the keys of its study and its notes."""
    path = pathlib.Path(runs) / "compare.json"
    kept = {"command": command, "varied": varied, **about, "rows": rows}
    try:
        files.replace_text(path, json.dumps(kept, indent=1) + "\n")
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
    return path


def _check(cell: Config, worker: Worker, heard: Callable[[dict], None], kit: bool, deadly: dict[str, dict]) -> dict:
    """The record of a check, and in `deadly` the mechanism whose kit ended the worker."""
    try:
        return worker.ask("compare.cell.check", heard, stall=cell.stall, config=configs.to_dict(cell), kit=kit)
    except Ended as ended:
        choice = ended.clock.message.get("kit")
        if choice is None or ended.status == "interrupted":
            return ended.record
        deadly[choice] = {"status": "refused", "reason": ended.refusal(choice)}
        return dict(deadly[choice])


def refuse_unwritable(cells: Iterable[Config]) -> None:
    """Raises UsageError where a folder of runs cannot be written."""
    for runs in dict.fromkeys(cell.runs for cell in cells):
        _try(pathlib.Path(runs))


def _try(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"runs={folder}: cannot be written ({error.strerror}); choose another folder with runs="
        ) from None
