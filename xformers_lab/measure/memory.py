"""Memory of a compiled function, in bytes, and how much the device has left."""

import pathlib

import jax


def compiled_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What one call holds: temp_bytes, argument_bytes, output_bytes, and on accelerators peak_bytes, all together.

    The figures come from XLA's buffer assignment: they need no data, no run, and repeat exactly with one version of
    XLA, but not between versions, so compare ratios. On CPU two of them lie. Where YNNPACK runs a fused group of
    operations, its buffers are not in temp_bytes: a plain forward softmax attention over 4,096 tokens reports 0 and
    takes 532 MiB. And XLA:CPU's own peak is arguments and outputs only, so there is no peak_bytes on CPU. For how
    memory grows with length on CPU, see `flops.largest_intermediate`. All zeros where the backend has no analysis.
    """
    analysis = compiled.memory_analysis()
    names = ("temp", "argument", "output", "alias")
    temp, argument, output, alias = (int(getattr(analysis, f"{name}_size_in_bytes", 0)) for name in names)
    memory = {"temp_bytes": temp, "argument_bytes": argument, "output_bytes": output}
    if jax.default_backend() != "cpu":
        memory["peak_bytes"] = temp + argument + output - alias
    return memory


def device_peak_bytes() -> int | None:
    """The most bytes this process ever held on its first accelerator; None on CPU, which keeps no such count.

    A mark of the whole process that never falls: right for a process that does one thing, such as a training run. For
    one of several functions take the peak_bytes of `compiled_memory`.
    """
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def available_bytes() -> int | None:
    """Bytes that could still be allocated where arrays live by default; None where nobody says."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    return min([left for left in (_host_bytes(), _container_bytes()) if left is not None], default=None)


def _host_bytes() -> int | None:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container_bytes() -> int | None:
    """What the limit of a container (cgroup v2) leaves."""
    folder = pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
