"""The devices of a target, where programs are compiled for them: those of a grid of TPUs that is not here, or of a CPU
that stands for many."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from xformers_lab import cpu_threads
from xformers_lab.errors import UsageError
from xformers_lab.plan.target import Target
from xformers_lab.supervise.interrupt import SIGNALS

# What libtpu asks of a machine with TPUs, answered where there are none, so that it neither waits nor complains.
# Programs are compiled and never run, so that several processes may load it: no lock is taken, and none is left behind.
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "4",
    "TPU_MIN_LOG_LEVEL": "4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MEGACORE = ("v4",)  # generations whose chips are one device on a machine that has them, and two by libtpu's default


def environment(most: int, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """That of a process that plans, for at `most` so many devices of a CPU."""
    chosen = {**WITHOUT_A_TPU, **given, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(most)}
    chosen["XLA_FLAGS"] = re.sub(cpu_threads.FLAG, "", chosen.get("XLA_FLAGS", "")).strip()
    cpu_threads.enough(most, chosen)
    return chosen


def of(target: Target, count: int) -> Sequence[Any]:
    """So many devices of a target, in the order that a run would have them; of a GPU none. Raises UsageError where
    there is no such grid, or this process has fewer."""
    if target.platform == "gpu":
        return []
    if target.platform == "tpu":
        return _grid(target)
    if len(here := jax.devices("cpu")) < count:
        raise UsageError(f"platform={target.name}: {count} devices, and this process stands for {len(here)}")
    return here[:count]


def _grid(target: Target) -> Sequence[Any]:
    from jax.experimental import topologies

    name, _, grid = target.name.partition(":")
    sides = [int(side) for side in grid.split("x")]
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name in MEGACORE else {}
    if 1 in sides[:2]:  # a host has 2 x 2 chips, unless it is told that the grid has fewer
        options["chips_per_host_bounds"] = (min(sides[0], 2), min(sides[1], 2), 1)
    try:
        with _signals_kept():
            return topologies.get_topology_desc(platform="tpu", topology_name=target.name, **options).devices
    except Exception as error:
        said = str(error).strip().splitlines()[0]
        mend = f"sides of 2, 4, 8, ... chips ({name}:2x2, {name}:4x4), or one chip, {name}:1x1"
        raise UsageError(f"topology={target.name}: libtpu knows no such grid ({said}); try {mend}") from None


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Signals that end a process end it as before: libtpu, once it is loaded, writes pages about each."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)
