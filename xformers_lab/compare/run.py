"""Run a grid: only missing cells, one at a time, each in a worker process; every cell ends as a row.

The driver touches no device: an accelerator may admit one process, so that whatever needs jax is the worker's.
"""

import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from xformers_lab import config as configs
from xformers_lab import files, spec
from xformers_lab.config import Config
from xformers_lab.errors import RunFailed, UsageError
from xformers_lab.record import HELD, IMPOSSIBLE, SETTLED, STATUSES, Record, blank, broken
from xformers_lab.supervise.process import Ended, Worker
from xformers_lab.train import labels

PLACING = ("task", "attention", "seq_len", "seed")  # keys that every row has, whatever varies
_POSSIBLE = ("ok", "interrupted")
PAUSE = 2.0  # seconds between looks at the cells that another process trains


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


def stored(cell: Config) -> dict | None:
    """The record of a cell that is settled, or None."""
    path = configs.folder(cell) / "result.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and record.get("status") in SETTLED and not broken(record, configs.identity(cell))
    return record if known else None


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
    started: Callable[[int, Config], None],
    stepped: Callable[[int, int, float | None], None],
    finished: Callable[[int, dict], None],
    announce: Callable[[str], None] = lambda text: None,
    track: Sequence[str] = (),
) -> list[dict]:
    """Train every cell that has no record in `ended` (what `check_cells` gave) and none that is settled. -> their
    records, in the order of `cells`; worker.stopped says whether all were reached.

    A cell that another process trains, another comparison in the same folder, say, is left to it; its record is waited
    for at the end, and where it leaves none the cell is trained here. What another one fails while this one runs is
    not tried again.

    started(index, cell), stepped(step, total, loss) and finished(count, record) report progress, where count cells
    had their record before; announce(text) says what is waited for, and which of the trackers `track` stopped. Raises
    UsageError, before any trains, where a folder of runs cannot be written.
    """
    refuse_unwritable(cells)
    records: dict[int, dict] = {}
    began, left, waiting = time.time(), list(range(len(cells))), False
    while left:
        held = []
        for index in left:
            cell = cells[index]
            record = ended.get(cell) or stored(cell) or _failed_since(began, cell)
            if record is not None:
                labels.write(cell, configs.folder(cell))
            if record is None:
                started(index, cell)
                record = _train(cell, worker, stepped, announce, track)
                if record["status"] == HELD:
                    held.append(index)
                    continue
                _keep(cell, record)
            records[index] = record
            finished(len(records) - 1, record)
        if held and not waiting:
            count = f"{len(held)} cell{'s' * (len(held) > 1)}"
            announce(f"waiting for {count} that another process trains; Ctrl-C ends the waiting")
            waiting = True
        if held:
            _pause(worker)
        left = held
    return [records[index] for index in range(len(cells))]


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


def _train(
    cell: Config,
    worker: Worker,
    stepped: Callable[[int, int, float | None], None],
    announce: Callable[[str], None],
    track: Sequence[str],
) -> dict:
    def heard(message: dict) -> None:
        if "loss" in message:
            stepped(message["step"], message["total"], message["loss"])
        elif "said" in message:
            announce(message["said"])

    try:
        job = {"config": configs.to_dict(cell), "track": list(track)}
        return worker.ask("compare.cell.train", heard, stall=cell.stall, **job)
    except Ended as ended:
        return ended.record


def _failed_since(began: float, cell: Config) -> dict | None:
    """The record of a cell that another process failed after `began` (seconds since the epoch), or None."""
    path = configs.folder(cell) / "result.json"
    try:
        record = json.loads(path.read_text()) if path.stat().st_mtime >= began else None
    except (OSError, ValueError, RecursionError):
        return None
    failed = isinstance(record, dict) and record.get("status") in STATUSES and record["status"] not in SETTLED
    return record if failed else None


def _pause(worker: Worker) -> None:
    """Wait for a while; a signal ends it."""
    until = time.monotonic() + PAUSE
    while time.monotonic() < until and not worker.stopped:
        time.sleep(0.1)


def _keep(cell: Config, record: dict) -> None:
    """A cell that failed leaves its reason in its folder, in the place of an older one. No folder is made for it, since
    one that is gone was moved away; the row has the reason in any case."""
    if record["status"] != "interrupted" and stored(cell) is None:
        with contextlib.suppress(OSError):
            text = json.dumps(record, indent=2) + "\n"
            files.replace_text(configs.folder(cell) / "result.json", text, folder=False)


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
