"""How fast a device multiplies matrices in float32 and bfloat16, beside what it could, and whether bfloat16 pays."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab import record
from xformers_lab.doctor.peaks import TERA, Peaks
from xformers_lab.errors import in_words, ran_out_of_memory
from xformers_lab.measure import speed
from xformers_lab.measure.speed import Timing

# Rows and columns of square matrices, and tokens and width of a layer: enough to keep a device busy.
SQUARE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
LAYER = {"cpu": (512, 256), "gpu": (16384, 1024), "tpu": (16384, 1024)}
WIDER = 4  # the hidden width of the layer, in widths of the model
# Relative errors of a product, as roots of mean squares: above the first its inputs were cut to 10 bits of mantissa, as
# TF32 has, above the second to bfloat16's 7. Sums of several such products are as exact as float32, which is far below.
CUT = {"tf32": 3e-5, "bfloat16": 1.3e-3}
WORDS = {"float32": "", "tf32": ", inputs cut to TF32", "bfloat16": ", inputs cut to bfloat16"}
# Rates within this ratio of one another are called alike.
ALIKE = 1.15

FLOAT32, EXACT, BFLOAT16 = "float32 product", "float32 at precision highest", "bfloat16 product"
LAYER32, LAYER16 = "float32 layer", "bfloat16 layer"


def examine(device: Any, peaks: Peaks | None, quiet: bool) -> list[dict]:
    """Findings on the rates of one device of jax; peaks: what it could do at most, None where nobody tells; quiet:
    whether the machine was, so far."""
    kind = arithmetic(device)
    work = dict(_work(device, kind))
    timings = speed.interleaved({name: call for name, (call, _) in work.items()})
    rows = SQUARE.get(device.platform, SQUARE["gpu"])
    findings = []
    for name, of in ((FLOAT32, kind), (EXACT, "float32"), (BFLOAT16, "bfloat16")):
        if name in work:
            size = f"{rows} x {rows}{WORDS[kind] if name == FLOAT32 else ''}"
            findings.append(rate(name, timings[name], work[name][1], size, of, peaks, quiet))
    return [*findings, worth(timings[LAYER32], timings[LAYER16], quiet)]


def arithmetic(device: Any) -> str:
    """What a float32 product is computed in by default, by its error: float32, tf32 or bfloat16."""
    x, y = np.random.default_rng(0).normal(size=(2, 256, 256)).astype(np.float32)
    exact = x.astype(np.float64) @ y.astype(np.float64)
    return told_by(np.asarray(jnp.matmul(*jax.device_put((x, y), device))), exact)


def told_by(product: np.ndarray, exact: np.ndarray) -> str:
    """The type that a float32 product was computed in: float32, tf32 or bfloat16."""
    error = math.sqrt(np.mean((product.astype(np.float64) - exact) ** 2) / np.mean(exact**2))
    return next((name for name in reversed(CUT) if error > CUT[name]), "float32")


def rate(
    name: str, timing: Timing | Exception, flops: int, size: str, of: str, peaks: Peaks | None, quiet: bool
) -> dict:
    """The finding on one product.

    Args:
        timing: of the product, or why it has none.
        flops: what it computes.
        size: of its matrices, in words.
        of: the type that it is computed in, whose peak is compared.
        peaks, quiet: as for `examine`.
    """
    if isinstance(timing, Exception):
        return _failed(name, timing)
    reached = flops / timing.seconds_min
    quiet = quiet and _steady(timing)
    found = f"{per_second(reached)} ({size}), {_of_peak(reached, of, peaks)}"
    if not quiet:
        found += "; at least, for the machine was busy"
    peak = None if peaks is None else peaks.flops.get(of)
    measured = {"flops_per_second": reached, "computed_in": of, "peak_flops_per_second": peak}
    return {"what": name, "found": found, "ok": quiet or None, "measured": measured}


def worth(float32: Timing | Exception, bfloat16: Timing | Exception, quiet: bool) -> dict:
    """The finding on bfloat16 in training, by a layer's forward and backward pass in each type."""
    what = "bf16 in training"
    if isinstance(float32, Exception):
        return _failed(what, float32)
    if isinstance(bfloat16, Exception):
        return _failed(what, bfloat16)
    quiet = quiet and _steady(float32) and _steady(bfloat16)
    ratio = float32.seconds_min / bfloat16.seconds_min
    words = advice(ratio) if quiet else "too busy a machine to choose by; run it again when it is quiet"
    found = f"{ratio:.2g} times the rate of float32 in a layer's forward and backward pass: {words}"
    return {"what": what, "found": found, "ok": quiet or None, "measured": {"ratio": ratio}}


def advice(ratio: float) -> str:
    """What to do where bfloat16 has so many times the rate of float32."""
    if ratio > ALIKE:
        return "dtype=bfloat16 pays"
    return "keep dtype=float32" if ratio < 1 / ALIKE else "dtype=bfloat16 saves memory, not time"


def per_second(flops: float) -> str:
    """A rate in words: 83.2 GFLOP/s, 412 TFLOP/s."""
    unit, name = (TERA, "TFLOP/s") if flops >= TERA else (1e9, "GFLOP/s")
    return f"{flops / unit:.3g} {name}" if flops < 999.5 * unit else f"{flops / unit:.0f} {name}"


def _of_peak(reached: float, of: str, peaks: Peaks | None) -> str:
    if peaks is None:
        return "what it could do at most is not known here"
    if of not in peaks.flops:
        return f"and no peak of {of} is {'published' if peaks.published else 'known: it has no units for it'}"
    peak = peaks.flops[of]
    most = "the published" if peaks.published else f"what {peaks.sources[of]} make,"
    return f"{reached / peak:.0%} of {most} {per_second(peak)}"


def _steady(timing: Timing) -> bool:
    """Whether equal work took nearly equal times."""
    return timing.seconds_median <= record.BUSY * timing.seconds_min


def _failed(name: str, error: Exception) -> dict:
    """A device whose memory others hold is no broken one."""
    full = ran_out_of_memory(error)
    reason = "no memory is free for it; end what else uses this device" if full else in_words(error)
    return {"what": name, "found": f"not measured: {reason}", "ok": None if full else False}


def _work(device: Any, kind: str) -> Iterator[tuple[str, tuple[Callable[[], object], int]]]:
    """What is timed, by name: a call, and its FLOPs. Where float32 is `kind` by default, it is timed in full too."""
    n = SQUARE.get(device.platform, SQUARE["gpu"])
    products: Mapping[str, tuple[str, str | None]] = {
        FLOAT32: ("float32", None),
        **({EXACT: ("float32", "highest")} if kind != "float32" else {}),
        BFLOAT16: ("bfloat16", None),
    }
    for name, (dtype, precision) in products.items():
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        yield name, (_called(product, device, dtype, (n, n), (n, n)), 2 * n**3)
    tokens, width = LAYER.get(device.platform, LAYER["gpu"])
    shapes = (width, WIDER * width), (WIDER * width, width)
    for name, dtype in ((LAYER32, "float32"), (LAYER16, "bfloat16")):
        step = jax.jit(jax.grad(functools.partial(_loss, dtype), argnums=(0, 1, 2)))
        yield name, (_called(step, device, "float32", (tokens, width), *shapes), 3 * 4 * tokens * WIDER * width**2)


def _called(run: Callable, device: Any, dtype: str, *shapes: tuple[int, ...]) -> Callable[[], object]:
    """`run` on arrays of random numbers, which are made at its first call: there may be no memory for them."""

    @functools.cache
    def arrays() -> list[jax.Array]:
        with jax.default_device(device):
            keys = jax.random.split(jax.random.key(0), len(shapes))
            scale = lambda shape: 1 / math.sqrt(shape[-1])
            return [jax.random.normal(key, s, dtype) * scale(s) for key, s in zip(keys, shapes, strict=True)]

    return lambda: run(*arrays())


def _loss(dtype: str, x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A feed-forward layer as models have it: parameters in float32, products in dtype; x (T, D)."""
    x, up, down = (array.astype(dtype) for array in (x, up, down))
    return jnp.mean((jax.nn.gelu(x @ up) @ down).astype(jnp.float32) ** 2)
