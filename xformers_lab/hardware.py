"""What this process runs on, as far as the system tells it. Needs no jax."""

import os
import pathlib
import platform


def processor() -> str:
    """The processor's name."""
    return _of_processor("model name") or platform.processor() or platform.machine()


def instructions() -> str:
    """What the processor can do, in the system's words; what else tells it from others where that is not told."""
    return _of_processor("flags", "Features") or platform.processor()


def _of_processor(*keys: str) -> str:
    """What the system says of the first processor under one of these keys; empty where it says nothing."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")


def cores() -> int | None:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's where that is less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            total = min(total, int((pathlib.Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):
            continue
    return total


def load() -> float | None:
    """How many processes wanted a core of the machine, on average over the last minute; None where no system tells."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
