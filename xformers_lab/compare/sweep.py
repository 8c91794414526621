"""Cells on their way to their records: which are there already, which an engine runs, which are tried again, and how
each one ends as a record."""

import collections
import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from xformers_lab import config as configs
from xformers_lab import files
from xformers_lab.config import Config
from xformers_lab.engines import Engine, Outcome, _job
from xformers_lab.errors import InUse, RunFailed, UsageError
from xformers_lab.record import HELD, SETTLED, STATUSES, broken
from xformers_lab.supervise.process import Worker
from xformers_lab.train import labels, records
from xformers_lab.train.tail import Tail

PAUSE = 2.0  # seconds between looks at the cells that another process trains
LOOK = 0.5  # seconds that an engine is waited for before the command looks at anything else
GLANCE = 5.0  # seconds between looks at how far the cells on other hosts are
RETRIES = 3  # times that a cell whose worker was lost is tried again
UNREACHED = {"status": "interrupted", "reason": "not reached before the interruption"}


class Progress(Protocol):
    """Hears of cells by their place in the list; finished: `count` others had their record before."""

    def started(self, index: int, cell: Config) -> None: ...

    def stepped(self, index: int, step: int, total: int, loss: float | None) -> None: ...

    def finished(self, index: int, count: int, record: dict) -> None: ...


def stored(cell: Config) -> dict | None:
    """The record of a cell that is settled, or None."""
    record = records.read_json(configs.folder(cell) / "result.json")
    known = record is not None and record.get("status") in SETTLED and not broken(record, configs.identity(cell))
    return record if known else None


class Sweep:
    """A list of cells until each has its record. worker: the command's, which hears signals."""

    def __init__(
        self,
        cells: Sequence[Config],
        worker: Worker,
        engine: Engine,
        progress: Progress,
        announce: Callable[[str], None],
        track: Sequence[str],
    ):
        self.cells, self.worker, self.engine = cells, worker, engine
        self.progress, self.announce, self.track = progress, announce, list(track)
        self.began = time.time()
        self.found: dict[int, dict] = {}
        self.left: collections.deque[int] = collections.deque()
        self.held: list[int] = []  # what another process trains
        self.running: dict[str, int] = {}  # handle -> cell
        self.tails: dict[str, Tail] = {}
        self.lost: collections.Counter[int] = collections.Counter()
        self.looked = time.monotonic()
        self.waiting = self.cancelled = self.insisted = False

    def records(self, ended: dict[Config, dict]) -> list[dict]:
        """In the order of the cells; ended: the records of those that are not to train. Raises UsageError where a host
        cannot train any."""
        for index, cell in enumerate(self.cells):
            record = ended.get(cell)
            if record is not None:
                self._settle(index, record, kept=False)
            elif (record := stored(cell)) is not None:
                self._take(index, record)
            else:
                self.left.append(index)
        try:
            while self.left or self.running or self.held:
                if self.worker.stopped:
                    self._stop()
                else:
                    self._begin()
                if self.running or self.left:
                    for outcome in self.engine.ended(LOOK, self._told):
                        self._over(self.running.pop(outcome.handle), outcome)
                    self._glance()
                elif self.held:
                    self._wait()
        except RunFailed as gone:
            for index in [index for index in range(len(self.cells)) if index not in self.found]:
                reason = f"{gone}; the same command goes on from there"
                self._settle(index, {"status": "failed", "reason": reason}, kept=False)
        return [self.found[index] for index in range(len(self.cells))]

    def _begin(self) -> None:
        """Have the engine run as many cells as it has room for."""
        while self.left and self.engine.room() > 0:
            index = self.left.popleft()
            cell = self.cells[index]
            record = stored(cell) or failed_since(self.began, cell)  # another command may have trained it meanwhile
            if record is not None:
                self._take(index, record)
            elif self.engine.remote and _in_use(cell):
                self.held.append(index)
            else:
                self.progress.started(index, cell)
                self.running[self.engine.submit(self._job(cell))] = index
                self.worker.begun_elsewhere = self.engine.remote or not self.engine.setting.timed

    def _job(self, cell: Config) -> dict:
        setting = self.engine.setting
        shared = "" if setting.timed else f"up to {setting.jobs} cells trained at once (-j {setting.jobs})"
        arguments = {"config": configs.to_dict(cell), "track": self.track, "shared": shared}
        made = _job.payload("compare.cell.train", arguments, stall=cell.stall)
        return _job.sent(made, pathlib.Path(cell.runs), timed=setting.timed) if self.engine.remote else made

    def _told(self, handle: str, message: dict) -> None:
        if "loss" in message and handle in self.running:
            self.progress.stepped(self.running[handle], message["step"], message["total"], message["loss"])
        elif "said" in message:
            self.announce(message["said"])

    def _over(self, index: int, outcome: Outcome) -> None:
        """A cell that ran came to some end."""
        if outcome.unfit:
            raise UsageError(outcome.unfit)
        if outcome.lost:
            return self._again(index, outcome.lost)
        record = dict(outcome.ended or outcome.answer)
        if record["status"] == HELD:
            return self.held.append(index)
        if record["status"] == "interrupted" and not self.worker.stopped:  # by whoever runs that host
            return self._again(index, record["reason"])
        self._settle(index, ({"host": outcome.host} if outcome.host else {}) | record)

    def _again(self, index: int, why: str) -> None:
        """A cell that was lost is tried again, a few times."""
        if self.worker.stopped:
            return self._settle(index, {"status": "interrupted", "reason": f"stopped at once ({why})"})
        self.lost[index] += 1
        if self.lost[index] > RETRIES:
            reason = f"lost {self.lost[index]} times, the last time since {why}"
            return self._settle(index, {"status": "failed", "reason": reason})
        folder = configs.folder(self.cells[index])
        self.announce(f"{folder}: lost, since {why}; it is tried again ({self.lost[index]} of {RETRIES} times)")
        self.left.append(index)

    def _take(self, index: int, record: dict) -> None:
        """A record that is there already."""
        labels.write(self.cells[index], configs.folder(self.cells[index]))
        self._settle(index, record, kept=False)

    def _settle(self, index: int, record: dict, *, kept: bool = True) -> None:
        if kept:
            _keep(self.cells[index], record)
        self.found[index] = record
        self.progress.finished(index, len(self.found) - 1, record)

    def _stop(self) -> None:
        """A signal came: nothing is begun, and what runs saves itself."""
        for index in (*self.left, *self.held):
            self._settle(index, dict(UNREACHED))
        self.left.clear()
        self.held.clear()
        if self.running and (not self.cancelled or self.worker.insisted > self.insisted):
            self.engine.cancel(insisted=self.worker.insisted)
            self.cancelled, self.insisted = True, self.worker.insisted

    def _wait(self) -> None:
        """Nothing is left but what another process trains."""
        if not self.waiting:
            count = f"{len(self.held)} cell{'s' * (len(self.held) > 1)}"
            self.announce(f"waiting for {count} that another process trains; Ctrl-C ends the waiting")
            self.waiting = True
        until = time.monotonic() + PAUSE
        while time.monotonic() < until and not self.worker.stopped:
            time.sleep(0.1)
        self.left.extend(self.held)
        self.held.clear()

    def _glance(self) -> None:
        """See how far the cells on other hosts are, which say nothing themselves."""
        if not self.engine.remote or time.monotonic() - self.looked < GLANCE:
            return
        self.looked = time.monotonic()
        self.tails = {
            handle: self.tails.get(handle) or Tail(configs.folder(self.cells[index]))
            for handle, index in self.running.items()
        }
        for handle, tail in self.tails.items():
            if lines := tail.lines():
                index = self.running[handle]
                self.progress.stepped(index, lines[-1]["step"], self.cells[index].train.steps, lines[-1]["loss"])


def failed_since(began: float, cell: Config) -> dict | None:
    """The record of a cell that another process failed after `began` (seconds since the epoch), or None."""
    path = configs.folder(cell) / "result.json"
    try:
        record = json.loads(path.read_text()) if path.stat().st_mtime >= began else None
    except (OSError, ValueError, RecursionError):
        return None
    failed = isinstance(record, dict) and record.get("status") in STATUSES and record["status"] not in SETTLED
    return record if failed else None


def _in_use(cell: Config) -> bool:
    """Whether another process trains a cell, what a command that was killed left running, say."""
    try:
        records.refuse_if_in_use(configs.folder(cell))
    except InUse:
        return True
    return False


def _keep(cell: Config, record: dict) -> None:
    """A cell that failed leaves its reason in its folder, in the place of an older one. No folder is made for it, since
    one that is gone was moved away; the row has the reason in any case."""
    if record["status"] != "interrupted" and stored(cell) is None:
        with contextlib.suppress(OSError):
            text = json.dumps(record, indent=2) + "\n"
            files.replace_text(configs.folder(cell) / "result.json", text, folder=False)
