"""Threads enough for the devices that one CPU stands for.

XLA keeps a thread for each core or, where these are more, for each device of a CPU. A device that waits for the others
in a collective keeps its thread, and one that waits in two keeps two. Devices that begin such collectives in another
order then wait for each other, until XLA ends the process after 40 seconds. With threads to spare none has to.
"""

import os
import re
from collections.abc import MutableMapping

PER_DEVICE = 8
FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def simulated(environment: MutableMapping[str, str] = os.environ) -> int:
    """The devices that XLA's flag or JAX's variable asks of the CPU; 1 where neither does."""
    last = FLAG.findall(environment.get("XLA_FLAGS", ""))[-1:]
    asked = (*last, environment.get("JAX_NUM_CPU_DEVICES", ""))
    return max([1, *(int(count) for count in asked if count.isdecimal())])


def enough(devices: int, environment: MutableMapping[str, str] = os.environ, *, processes: int = 1) -> None:
    """Let XLA have `PER_DEVICE` threads for each of a process's devices where there are several, in this process or in
    `processes` together, unless the user has said how many.

    It counts only before JAX makes its devices."""
    if devices > 1 or processes > 1:
        threads = max(os.cpu_count() or 1, PER_DEVICE * devices)
        environment.setdefault("PJRT_NPROC", str(threads))
