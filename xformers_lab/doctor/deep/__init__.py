"""What a run survives, tried on this machine: each file here is one trial.

A trial disturbs a small run as a machine might, in processes of its own, and compares what comes of it with the same
run left alone: every array of the last checkpoint, every step's loss, the metric, bit for bit.
"""

import concurrent.futures
import dataclasses
import importlib
import os
import pathlib
import pkgutil
import tempfile
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from xformers_lab.errors import UsageError, nearest

if TYPE_CHECKING:
    from xformers_lab.doctor.deep._trial import Trial

# Trials at once, where there are as many cores: most of what they take is the start of processes, which keeps one busy.
AT_ONCE = 2


def names() -> list[str]:
    """The trials, in the order of the alphabet."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def refuse_unknown(chosen: Sequence[str], times: int | None) -> None:
    """Raises UsageError of a name that is no trial, and of a number of times that is none."""
    for name in chosen:
        if name not in names():
            raise UsageError(f'--deep {name}: no trial "{name}": {nearest(name, names(), "trials")}')
    if times is not None and times < 1:
        raise UsageError(f"--times {times}: a trial is done once or more often")


def examine(chosen: Sequence[str] = (), times: int | None = None, say: Callable[[str], object] = print) -> list[dict]:
    """Findings, as `doctor.examine` has them, of the trials that are chosen (none: all); times: how often each disturbs
    a run (None: its own few); say(line) is called as they go, in their order, though AT_ONCE are tried at a time.
    Raises UsageError as `refuse_unknown` does, RunFailed where the run that nothing disturbs fails.

    A finding's `measured` has `times`, how often it was tried, `held`, how often it went as it should, and `seconds`.
    """
    from xformers_lab.doctor.deep._trial import Trial

    refuse_unknown(chosen, times)
    with tempfile.TemporaryDirectory(prefix="xlab-doctor-") as folder:
        trial = Trial(pathlib.Path(folder), times, say)
        trial.leave_alone()
        modules = [importlib.import_module(f"{__name__}.{name}") for name in chosen or names()]
        return _side_by_side(trial, modules)


def _side_by_side(trial: "Trial", modules: Sequence[ModuleType]) -> list[dict]:
    """The findings; whatever ends this, Ctrl-C too, ends every process that a trial has started."""
    from xformers_lab.doctor.deep._in_order import InOrder

    lines = InOrder(trial.say, len(modules))

    def one(place: int, module: ModuleType) -> dict:
        try:
            here = dataclasses.replace(trial, say=lambda line: lines.say(place, line))
            return here.of(module.WHAT, module.TIMES, module.disturb)
        finally:
            lines.over(place)

    with concurrent.futures.ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(one, range(len(modules)), modules))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            trial.stop()
            raise
