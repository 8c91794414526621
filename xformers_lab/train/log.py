"""The lines of metrics.jsonl while a run is training, and the curve that its record has of them."""

import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable

import jax

from xformers_lab.measure import speed
from xformers_lab.train import records
from xformers_lab.train.failures import MEND, Diverged

PATIENCE = 10  # non-finite steps in a row that end a run
WARM = 2  # steps of a process that are not timed
POINTS = 100  # of the curve in a record

Progress = Callable[[int, int, dict], None]
"""Called as progress(step, total, metrics) after each step; metrics holds floats, `loss` among them."""


def curve(lines: list[dict]) -> list[list]:
    """[step, mean training loss since the last point, seconds of all steps so far], at most POINTS of them, without
    skipped steps. A step that was not timed counts as the median does; seconds are None where none was."""
    timed = [line["seconds"] for line in lines if line.get("seconds")]
    usual = statistics.median(timed) if timed else 0.0
    spent = itertools.accumulate(line.get("seconds") or usual for line in lines)
    losses = [
        (line["step"], line["loss"], seconds if timed else None)
        for line, seconds in zip(lines, spent, strict=True)
        if line["loss"] is not None and not line.get("skipped")
    ]
    width = max(1, math.ceil(len(losses) / POINTS))
    groups = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [[group[-1][0], statistics.fmean(loss for _, loss, _ in group), group[-1][2]] for group in groups]


def due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps (0: never) is done behind this one; behind the last it always is."""
    return step == last or (every > 0 and step % every == 0)


class Log:
    """The lines of metrics.jsonl, as they are in the file."""

    def __init__(self, run_dir: pathlib.Path, lines: list[dict], total: int, progress: Progress):
        self.run_dir, self.lines, self.total, self.progress = run_dir, lines, total, progress
        self.began = self.read = 0
        self.since = 0.0

    def dispatched(self, *, idle: bool) -> None:
        """A step is about to be handed to the device, which is `idle` or still busy with the one before."""
        if idle:
            self.since = time.perf_counter()

    def line(self, step: int, metrics: dict) -> dict:
        """Waits for a step to complete. Its seconds count from the completion of the step before."""
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        self.read += 1
        seconds = now - self.since if self.read > WARM and not speed.shared() else None
        self.since = now
        ok = bool(metrics.pop("ok"))
        return {"step": step, **{name: float(value) for name, value in metrics.items()}, "seconds": seconds} | (
            {} if ok else {"skipped": True}
        )

    def write(self, line: dict) -> None:
        """Raises Diverged at the last of PATIENCE skipped steps in a row."""
        line = records.finite(line)
        self.lines.append(line)
        records.append(self.run_dir, line)
        self.progress(line["step"], self.total, line)
        if all(recent.get("skipped") for recent in self.lines[-PATIENCE:]) and len(self.lines) >= PATIENCE:
            first = self.lines[-PATIENCE]["step"]
            raise Diverged(
                f"loss, gradient or parameters became non-finite at step {first} and stayed so for {PATIENCE} steps; "
                f"{MEND}"
            )

    def replace_last(self, line: dict) -> None:
        records.cut(self.run_dir, self.lines.pop()["step"] - 1)
        self.write(line)
