"""A self-test of a few seconds: is this installation fit to measure anything?"""

import platform
import sys
import tempfile
import time
from importlib import metadata

from xformers_lab import hardware, record

_BUSY = "; something else is busy here: no time measured now is to be trusted, so end it, or wait"


def examine() -> list[dict]:
    """Findings as {what, found, ok}; a finding that is not ok says what to do. ok is None of what may be otherwise in a
    minute: other work on the machine, beside which nothing should be timed."""
    import jax

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    devices = jax.devices()
    findings = [
        {"what": "python", "found": f"{platform.python_version()} at {sys.executable}", "ok": True},
        {"what": "packages", "found": versions, "ok": True},
        {"what": "devices", "found": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})", "ok": True},
        _cores(),
    ]
    return [*findings, _timer(), _repeats()]


def _cores() -> dict:
    """Whether the cores are free: half of them wanted by others slows every timing here."""
    cores, load = hardware.cores() or 1, hardware.load()
    free = load is None or load <= max(1.0, cores / 2)
    said = "" if load is None else f", load {load:.1f}"
    return {"what": "cores", "found": f"{cores}{said}{'' if free else _BUSY}", "ok": free or None}


def _timer() -> dict:
    """How far the same small computation's times spread: the noise that every timing here carries."""
    spread = _spread()
    quiet = spread <= record.BUSY
    ratio = f"median / minimum of a 512^3 product: {spread:.2f}"
    return {"what": "timer noise", "found": ratio + ("" if quiet else _BUSY), "ok": quiet or None}


def _spread() -> float:
    """Median over least time of the same product."""
    import jax
    import jax.numpy as jnp

    run = jax.jit(lambda x: x @ x)
    x = jnp.ones((512, 512))
    times = []
    for _ in range(30):
        began = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - began)
    times = sorted(times[5:])
    return times[len(times) // 2] / times[0]


def _repeats() -> dict:
    """The same tiny run twice must end in the same loss and metric, bit for bit."""
    from xformers_lab.config import Config, edit
    from xformers_lab.train import loop

    with tempfile.TemporaryDirectory() as folder:
        tiny = edit(Config(), task="copy", seq_len=16, steps=6, batch=4, eval_batches=1, dim=16)
        first = loop.run(edit(tiny, runs=f"{folder}/a"))
        second = loop.run(edit(tiny, runs=f"{folder}/b"))
    same = (first["loss"], first["metric"]) == (second["loss"], second["metric"])
    return {
        "what": "same seed, same result",
        "found": "bit for bit" if same else "NOT repeatable on this device",
        "ok": same,
    }
