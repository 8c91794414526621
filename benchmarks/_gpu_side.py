"""This laboratory's side on a GPU: attention by a kernel that is asked for, in half precision, and what it must be.

A case enqueues `INNER` calls and waits for the last: one at a time, short ones would be timed with their launch.
"""

import contextlib
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab import spec
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.asked import interpreted
from xformers_lab.attention._engine.pallas_gpu.flash import flash
from xformers_lab.attention._engine.pallas_gpu.tuning import Tuning, Tunings
from xformers_lab.nn.plan import Plan
from xformers_lab.nn.platform import platform

INNER = 10
# Where the script is tried without a GPU, kernels run in Pallas' interpreter.
INTERPRETED = bool(os.environ.get("INTERPRETED"))
# Of a check: no multiple of any block, two documents, padding in front.
LENGTH, HEADS, KEY_HEADS, HEAD = 500, 4, 2, 64


def case(name: str, **options):
    return globals()[name](**options)


def machine() -> dict:
    device = jax.devices()[0]
    return {"gpu": device.device_kind, "jax": jax.__version__}


def patterned() -> list[str]:
    """Mechanisms that are the average over a pattern, as it stands."""
    kinds = {name: spec.entry("attention", name) for name in spec.names("attention")}
    plain = lambda kind: kind.attend is Patterned.attend and kind.attend_heads is Patterned.attend_heads
    return [name for name, kind in kinds.items() if issubclass(kind, Patterned) and plain(kind)]


def attention(choice: str, kernel: str, T: int, B: int, N: int, H: int, causal: bool, grad: bool):
    """Forward of `mix`, or forward and backward against a fixed cotangent, on (B, T, N, H)."""
    mechanism = _built(choice, kernel, T, N, N, H)
    x = jax.random.normal(jax.random.key(1), (B, T, N * H), jnp.bfloat16)  # what gates look at
    return _timed(lambda q, k, v: mechanism.mix(q, k, v, x=x, causal=causal)[0], T, B, N, H, grad)


def tuned(choice: str, tuning: list[int], T: int, B: int, N: int, H: int, causal: bool, grad: bool):
    """The block-sparse kernel with blocks, warps and stages of this Tuning."""
    patterns = _built(choice, "auto", T, N, N, H).all_seen(causal)
    tunings = Tunings(*[Tuning(*tuning)] * 3)
    forward = lambda q, k, v: flash(q, k, v, patterns=patterns, tunings=tunings, interpret=INTERPRETED)
    return _timed(forward, T, B, N, H, grad)


def check(choice: str, kernel: str, causal: bool) -> dict:
    """The largest error of outputs and of gradients beside the definition in float32, as a share of the largest number;
    and whether what is not to be seen leaves outputs as they are, to the bit, and padding has no gradient."""
    T = 100 if INTERPRETED else LENGTH
    mechanism = _built(choice, kernel, T, HEADS, KEY_HEADS, HEAD)
    shapes = [(2, T, heads, HEAD) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    q, k, v, weights = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(_keys(4), shapes, strict=True)
    )
    at, half = np.arange(T)[None], T // 2
    valid = jnp.asarray(at >= np.array([[0], [T // 10]]))
    documents = jnp.asarray((at >= half).astype(np.int32).repeat(2, 0))

    x = jax.random.normal(jax.random.key(1), (2, T, HEADS * HEAD), jnp.bfloat16)  # what gates look at
    how = {"x": x, "causal": causal, "valid": valid, "documents": documents}

    def whole(method, q, k, v):
        form = lambda *qkv: mechanism.mix(*qkv, method=method, **how)[0]
        out, pull = jax.vjp(form, q, k, v)
        return out, *pull(weights.astype(out.dtype))

    with interpreted() if INTERPRETED else contextlib.nullcontext():
        run = jax.jit(lambda *qkv: whole("attend", *qkv))
        mine = run(q, k, v)
        # Queries of the second document, the last of them the `last`th, see none of the first and nothing later.
        last = T - T // 8
        hidden = (at < half) | ((at > last) & causal) | ~np.asarray(valid)
        other = jnp.where(jnp.asarray(hidden)[:, :, None, None], 50.0, 0.0).astype(k.dtype)
        changed = run(q, k + other, v - other)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda *qkv: whole("reference", *qkv))(*(x.astype(jnp.float32) for x in (q, k, v)))
    errors = [
        float(jnp.abs(one.astype(jnp.float32) - other).max() / jnp.abs(other).max())
        for one, other in zip(mine, exact, strict=True)
    ]
    untouched = bool((mine[0][:, half : last + 1] == changed[0][:, half : last + 1]).all())
    bare = not any(bool(grad[~valid].any()) for grad in mine[2:])
    return {"error": errors[0], "gradient_error": max(errors[1:]), "leaks": not (untouched and bare)}


def _built(choice: str, kernel: str, T: int, N: int, K: int, H: int):
    plan = dataclasses.replace(Plan.of(platform()), kernel=kernel)
    return spec.build("attention", choice, length=T, dim=N * H, heads=N, kv_heads=K, plan=plan)


def _timed(forward, T: int, B: int, N: int, H: int, grad: bool):
    q, k, v, cotangent = (jax.random.normal(key, (B, T, N, H), jnp.bfloat16) for key in _keys(4))
    run = jax.jit((lambda q, k, v: jax.vjp(forward, q, k, v)[1](cotangent)) if grad else forward)

    def several():
        with interpreted() if INTERPRETED else contextlib.nullcontext():
            jax.block_until_ready([run(q, k, v) for _ in range(INNER)][-1])

    return several


def _keys(count: int):
    return jax.random.split(jax.random.key(0), count)
