"""A small run, left alone once and then disturbed, and whether both end in the same bits."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from xformers_lab.errors import RunFailed
from xformers_lab.train import checkpoint, records

# Whatever could be lost: dropout, Adam's moments, a moving average, random features, statistics that are no parameters.
RUN = (
    *("task=copy", "seq_len=16", "batch=4", "dim=16", "layers=2", "heads=2"),
    *("attention=full+performer:redraw=step", "norm=pre:normaliser=powernorm", "dropout=0.1", "ema=0.9"),
    *("steps=60", "save_every=10", "eval_every=20", "eval_batches=1"),
)
STEPS, SAVE_EVERY = 60, 10
# A trial that gives no answer for so long is over.
PATIENCE = 300.0
# `xlab` with files that may grow to so many bytes and no further.
LIMITED = """
import resource, sys
from xformers_lab.cli import main
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main(sys.argv[2:]))
"""
# Lines are shown no closer than so many seconds.
SAY_EVERY = 2.0


class Lost(Exception):
    """What went otherwise than it should, in words."""


@dataclasses.dataclass(frozen=True)
class End:
    """What a run ended in: its record without times and places, every step's loss, a hash of every array."""

    record: dict
    losses: list
    arrays: dict[str, str]


class Started:
    """The processes of all trials, which trials in several threads start."""

    def __init__(self):
        self._processes: list[subprocess.Popen] = []
        self._lock, self._stopped = threading.Lock(), False

    def start(self, command: Sequence[str], **options) -> subprocess.Popen:
        """Raises Lost once they are stopped."""
        with self._lock:
            if self._stopped:
                raise Lost("the trials were stopped")
            self._processes.append(process := subprocess.Popen(command, **options))
            return process

    def stop(self) -> None:
        """End them, with all that they started, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.poll() is None:
                    strike(process, signal.SIGKILL)


@dataclasses.dataclass
class Trial:
    """folder: where the runs lie; times: how often to disturb, None for the few of each; say: shows a line; started:
    what is started, of all trials that are tried at once."""

    folder: pathlib.Path
    times: int | None
    say: Callable[[str], object]
    alone: End | None = None
    started: Started = dataclasses.field(default_factory=Started)

    def leave_alone(self) -> None:
        """Train the run that nothing disturbs, which all others are compared with."""
        self.say("a run that nothing disturbs")
        try:
            self.alone = end_of(self.finish(self.runs("alone")))
        except Lost as lost:
            raise RunFailed(f"the run that nothing disturbs: {lost}") from None

    def of(self, what: str, few: int, disturb: Callable[["Trial", random.Random, int], Iterator[str]]) -> dict:
        """The finding of one kind of disturbance. `disturb` yields once for each, with words on what it showed, and
        raises Lost where something was."""
        times, held, words, started = self.times or few, 0, "", time.monotonic()
        said = started
        try:
            for words in disturb(self, random.Random(0), times):
                held += 1
                if held == times or time.monotonic() - said > SAY_EVERY:
                    self.say(f"{what} {held}/{times}: {words}")
                    said = time.monotonic()
        except Lost as lost:
            words = str(lost)
        measured = {"times": times, "held": held, "seconds": round(time.monotonic() - started, 1)}
        return {"what": what, "found": f"{held} of {times}: {words}", "ok": held == times, "measured": measured}

    def runs(self, name: str) -> pathlib.Path:
        """A folder for runs that no other trial has."""
        return pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def start(self, words: Sequence[str], limit: int | None = None, **variables: str) -> subprocess.Popen:
        """`xlab` in a process group of its own. limit: bytes that a file may grow to."""
        program = ["-m", "xformers_lab"] if limit is None else ["-c", LIMITED, str(limit)]
        return self.started.start(
            [sys.executable, *program, *words],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def stop(self) -> None:
        """End every process that a trial has started, whichever trial."""
        self.started.stop()

    def go_on(self, runs: pathlib.Path, **options) -> subprocess.Popen:
        """The run in the folder is begun, or resumed where it has a checkpoint."""
        run_dir = run_in(runs)
        if run_dir is not None and checkpoint.steps(run_dir):
            return self.start(["resume", str(run_dir), "--json"], **options)
        return self.start(["train", *RUN, f"runs={runs}", "--json"], **options)

    def finish(self, runs: pathlib.Path, **options) -> pathlib.Path:
        """The run in the folder, begun or resumed, at its end -> its own folder; raises Lost where it does not end."""
        ended = ending(self.go_on(runs, **options))
        if ended.returncode:
            raise Lost(f"it did not go on (exit code {ended.returncode}): {last_line(ended.stderr)}")
        run_dir = run_in(runs)
        assert run_dir is not None
        return run_dir

    def same(self, run_dir: pathlib.Path) -> None:
        """Raises Lost where a finished run differs from the one left alone."""
        end, alone = end_of(run_dir), self.alone
        assert alone is not None
        other = [name for name in alone.arrays if end.arrays.get(name) != alone.arrays[name]]
        keys = [key for key in alone.record if end.record[key] != alone.record[key]]
        if other or keys or end.losses != alone.losses:
            differing = [*other[:2], *keys[:2], *(["a step's loss"] if end.losses != alone.losses else [])]
            raise Lost(f"it ended otherwise than the run left alone: {', '.join(differing)}")


def run_in(runs: pathlib.Path) -> pathlib.Path | None:
    """The folder of the only run in `runs`; None before it has one."""
    folders = [path.parent for path in runs.glob("*/*/config.json")]
    return folders[0] if folders else None


def end_of(run_dir: pathlib.Path) -> End:
    """What a finished run ended in; raises Lost where it has no result."""
    record = records.read_json(run_dir / "result.json")
    if record is None:
        raise Lost("it has no result")
    newest = run_dir / "checkpoints" / str(checkpoint.steps(run_dir)[-1])
    arrays = {
        name: hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
        for name, array in checkpoint.arrays(newest).items()
    }
    lines = records.read(run_dir)
    keys = ("id", "status", "loss", "metric", "validation", "steps", "skipped")
    return End({key: record[key] for key in keys}, [(line["step"], line["loss"]) for line in lines], arrays)


def ending(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """What a process printed and its exit code; ended, with all that it started, where it takes too long."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        strike(process, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def strike(process: subprocess.Popen, number: int) -> None:
    """A signal to a process and to all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def switch_off(process: subprocess.Popen, runs: pathlib.Path) -> None:
    """Kill what trains the run and what started that, which a signal would let save first."""
    run_dir = run_in(runs)
    owner = records.read_json(run_dir / "owner.json") if run_dir is not None else None
    if owner is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(owner["pid"], signal.SIGKILL)
    strike(process, signal.SIGKILL)


def wait_for_steps(process: subprocess.Popen, runs: pathlib.Path, after: int) -> bool:
    """Whether the run took a step beyond `after` before it ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        run_dir = run_in(runs)
        if run_dir is not None and last_step(run_dir) > after:
            return True
        time.sleep(0.002)
    return False


def last_step(run_dir: pathlib.Path) -> int:
    """The newest step whose line is written; 0 before the first."""
    return max((line["step"] for line in records.read(run_dir)), default=0)


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no word"
