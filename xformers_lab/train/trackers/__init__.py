"""What shows a run elsewhere while it trains: `--track tensorboard`, `--track wandb`. Needs no jax.

A tracker is a file of this folder with a class `Tracker` (see `Tracker` here), EXTRA, the extra that installs what it
needs, and PACKAGE, what that is. It gets the lines of metrics.jsonl, which stay the truth: a run that is resumed hands
in those of its earlier steps again. A tracker works in a thread of its own, so that one that fails or hangs ends itself
and not the run.
"""

import contextlib
import importlib
import importlib.util
import pathlib
import pkgutil
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from xformers_lab.errors import UsageError, nearest, said
from xformers_lab.train import records

PATIENCE = 30.0  # seconds that a tracker has to end in, once the run has


class Tracker(Protocol):
    """One run in one tracker. It is made before the first step is shown, with all steps that the run took before to
    come; what it raises ends it."""

    def __init__(self, run_dir: pathlib.Path, identity: str, config: Mapping[str, Any]): ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, of a step; steps rise."""

    def finish(self) -> None:
        """No more will come."""


def names() -> list[str]:
    """What --track may say."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def require(chosen: Sequence[str]) -> None:
    """Raises UsageError where there is no such tracker, or its package is not installed."""
    for name in chosen:
        if name not in names():
            raise UsageError(f'no tracker "{name}": {nearest(name, names())}')
        module = _module(name)
        if module.PACKAGE not in sys.modules and importlib.util.find_spec(module.PACKAGE) is None:
            raise UsageError(f"--track {name} needs {module.PACKAGE}: pip install 'xformers_lab[{module.EXTRA}]'")


class Followers:
    """The trackers of one run; say(line) says that one of them has stopped, and why."""

    def __init__(self, threads: Sequence["_Thread"], say: Callable[[str], None]):
        self.threads, self.say = threads, say

    def observe(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl, after it was written."""
        for thread in self.threads:
            thread.observe(line)
            thread.report(self.say)

    def tested(self, record: Mapping[str, Any]) -> None:
        """Show what a run that came to its end scored on the test split."""
        line = {"step": record.get("step"), "test_loss": record.get("loss"), "test_metric": record.get("metric")}
        for thread in self.threads:
            if thread.thread is not None:  # a run that had ended before shows nothing
                thread.lines.put(line)


@contextlib.contextmanager
def following(
    chosen: Sequence[str],
    run_dir: pathlib.Path,
    identity: str,
    config: Mapping[str, Any],
    say: Callable[[str], None],
) -> Iterator[Followers]:
    """Show a run in trackers while the `with` lasts."""
    threads = [_Thread(name, run_dir, identity, config) for name in dict.fromkeys(chosen)]
    try:
        yield Followers(threads, say)
    finally:
        for thread in threads:
            thread.end()
            thread.report(say)


class _Thread:
    """A tracker in a thread, which gets lines by a queue. It begins with the first line: a run that had ended before
    has none."""

    def __init__(self, name: str, run_dir: pathlib.Path, identity: str, config: Mapping[str, Any]):
        self.name, self.about = name, (run_dir, identity, config)
        self.lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.stopped = ""  # why, in words
        self.reported = False

    def observe(self, line: Mapping[str, Any]) -> None:
        if self.stopped:
            return
        if self.thread is None:
            # This line is among them: it stands in the file already.
            for before in records.read(self.about[0]):
                self.lines.put(before)
            self.thread = threading.Thread(target=self._work, name=f"track {self.name}", daemon=True)
            self.thread.start()
        else:
            self.lines.put(line)

    def end(self) -> None:
        if self.thread is None:
            return
        self.lines.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive() and not self.stopped:
            self.stopped = f"it did not end within {PATIENCE:g} s"

    def report(self, say: Callable[[str], None]) -> None:
        """Say once that it stopped."""
        if self.stopped and not self.reported:
            self.reported = True
            say(f"--track {self.name} stopped, the run goes on without it: {self.stopped}")

    def _work(self) -> None:
        try:
            tracker = _module(self.name).Tracker(*self.about)
            while (line := self.lines.get()) is not None:
                tracker.scalars(line["step"], numbers(line))
            tracker.finish()
        except BaseException as error:  # a tracker's exit is none of the run's
            self.stopped = f"{type(error).__name__}: {said(error)}"


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their names; what was not finite is none."""
    return {name: float(value) for name, value in line.items() if name != "step" and isinstance(value, int | float)}


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
