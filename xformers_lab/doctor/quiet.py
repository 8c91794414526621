"""Whether the machine is quiet enough to time anything on."""

import time

from xformers_lab import hardware, record

BUSY = "; something else is busy here: no time measured now is to be trusted, so end it, or wait"


def cores() -> dict:
    """Whether the cores are free: half of them wanted by others slows every timing here."""
    count, load = hardware.cores() or 1, hardware.load()
    free = load is None or load <= max(1.0, count / 2)
    said = "" if load is None else f", load {load:.1f}"
    return {
        "what": "cores",
        "found": f"{count} of {hardware.processor()}{said}{'' if free else BUSY}",
        "ok": free or None,
    }


def timer() -> dict:
    """How far the same small computation's times spread: the noise that every timing here carries."""
    ratio = spread()
    quiet = ratio <= record.BUSY
    found = f"median / minimum of a 512^3 product: {ratio:.2f}"
    return {"what": "timer noise", "found": found + ("" if quiet else BUSY), "ok": quiet or None}


def spread() -> float:
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
