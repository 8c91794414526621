"""How much memory there is: the host's, and what jax may use of the devices'."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from xformers_lab import hardware

GiB = 2**30


def examine(devices: Sequence[Any]) -> dict:
    """The finding on memory; devices: of jax, whose limits count where they are no CPUs."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices if device.platform != "cpu"]
    return told(hardware.memory(), available(), limits)


def told(total: int | None, free: int | None, limits: Sequence[int | None]) -> dict:
    """The finding, from bytes; limits: of each accelerator, None of one that does not say."""
    host = "host: unknown" if total is None else f"host: {total / GiB:.1f} GiB"
    if total is not None and free is not None:
        host += f", {min(free, total) / GiB:.1f} GiB free"
    known = [limit for limit in limits if limit is not None]
    words = (
        [f"{len(known)} x {min(known) / GiB:.1f} GiB of the device{'s' if len(known) > 1 else ''} for jax"]
        if known
        else []
    )
    if len(known) < len(limits):
        words.append("a device does not tell its own")
    return {"what": "memory", "found": "; ".join([host, *words]), "ok": True}


def available(meminfo: pathlib.Path = pathlib.Path("/proc/meminfo")) -> int | None:
    """Bytes that the system could give at this moment; None where it does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
