"""How fast a device could be: what its maker publishes, or what a processor's units make of its clock. Needs no jax."""

import dataclasses
import functools
import os
import pathlib
import re
import statistics
import tomllib
from collections.abc import Collection, Mapping

GIGA, TERA = 10**9, 10**12
# FLOPs that a processor's core does in a cycle, float32: units for a fused multiply-add, two FLOPs, and lanes of each.
AVX512_TWICE, AVX512, AVX2 = 2 * 2 * 16, 1 * 2 * 16, 2 * 2 * 8
ZEN4, ZEN5 = 25, 26  # AMD's families: the first with AVX-512 has one unit for it, the next has two
# bfloat16, in instructions that have it: tiles, FLOPs a core and cycle; and pairs of numbers in a lane of float32.
AMX, PAIRS = 1024, 2


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What one device could do at most.

    flops: FLOPs a second by type: float32, tf32 (float32 inputs cut to 10 bits), bfloat16; what nobody tells is not
    there. published: whether its maker says so, where it is no estimate of ours. sources: by type who says so, or how
    it was worked out. memory: bytes; bandwidth, links: bytes a second between a device and its memory, and between it
    and its neighbours.
    """

    flops: Mapping[str, float]
    published: bool
    sources: Mapping[str, str]
    memory: int | None = None
    bandwidth: float | None = None
    links: float | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs: what jax calls one of its devices, and how many it has for each chip."""

    kind: str
    per_chip: int


@functools.cache
def _devices() -> list[dict]:
    return tomllib.loads((pathlib.Path(__file__).parent / "peaks.toml").read_text())["device"]


@functools.cache
def _table() -> dict[str, Peaks]:
    peaks = {}
    for device in _devices():
        flops = {name: device[name] * TERA for name in ("float32", "tf32", "bfloat16") if name in device}
        sources = dict.fromkeys(flops, str(device["source"]))
        rates = {name: device[name] * GIGA for name in ("bandwidth", "links") if name in device}
        memory = device["memory"] * 2**30 if "memory" in device else None
        peaks |= {kind: Peaks(flops, True, sources, memory, **rates) for kind in device["kinds"]}
    return peaks


@functools.cache
def generations() -> dict[str, Generation]:
    """TPUs by what libtpu calls them in the name of a topology: v5e of v5e:4x4."""
    named = (device for device in _devices() if "topology" in device)
    return {device["topology"]: Generation(device["kinds"][0], device.get("per_chip", 1)) for device in named}


def published(kind: str) -> Peaks | None:
    """The peaks of a device that jax calls so; None of one that peaks.toml has not."""
    return _table().get(kind)


def processor(told: str, allowed: Collection[int], hertz: float | None = None) -> Peaks | None:
    """The peaks of a processor by its flags and its clock; None where they are not told, as on ARM.

    Args:
        told: /proc/cpuinfo.
        allowed: the numbers of the processors that this process may use; two threads of one core count once.
        hertz: the highest clock where something tells it, else that of /proc/cpuinfo at this moment.
    """
    blocks = [dict(_entries(block)) for block in told.strip().split("\n\n")]
    mine = [block for block in blocks if block.get("processor", "").isdigit() and int(block["processor"]) in allowed]
    flags = set(mine[0].get("flags", "").split()) if mine else set()
    clocks = [float(block["cpu MHz"]) * 1e6 for block in mine if re.fullmatch(r"[\d.]+", block.get("cpu MHz", ""))]
    hertz = hertz or (statistics.median(clocks) if clocks else None)
    cycle = _per_cycle(flags, mine[0]) if mine else {}
    if hertz is None or not cycle:
        return None
    cores = len({(block.get("physical id"), block.get("core id", block["processor"])) for block in mine})
    words = lambda each: f"{cores} core{'s' if cores > 1 else ''} x {each} FLOPs a cycle x {hertz / 1e9:.2f} GHz"
    flops = {name: cores * each * hertz for name, each in cycle.items()}
    return Peaks(flops, False, {name: words(each) for name, each in cycle.items()})


def this_processor() -> Peaks | None:
    """The peaks of this machine's processor."""
    try:
        told = pathlib.Path("/proc/cpuinfo").read_text()
        allowed = os.sched_getaffinity(0)
    except (AttributeError, OSError):
        return None
    try:
        fastest = float(pathlib.Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) * 1e3
    except (OSError, ValueError):
        fastest = None
    return processor(told, allowed, fastest)


def _per_cycle(flags: set[str], block: Mapping[str, str]) -> dict[str, int]:
    """FLOPs that a core does in a cycle by type; nothing where no flag tells."""
    if "avx512f" in flags:
        amd = block.get("vendor_id") == "AuthenticAMD"
        float32 = AVX512 if amd and int(block.get("cpu family", ZEN4)) < ZEN5 else AVX512_TWICE
    elif {"avx2", "fma"} <= flags:
        float32 = AVX2
    else:
        return {}
    if "amx_bf16" in flags:
        return {"float32": float32, "bfloat16": AMX}
    return {"float32": float32, **({"bfloat16": PAIRS * float32} if "avx512_bf16" in flags else {})}


def _entries(block: str) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in block.splitlines())
    return [(key.strip(), value.strip()) for key, colon, value in pairs if colon]
