"""Block-sparse flash attention (Dao et al., 2022, arXiv 2205.14135) for NVIDIA GPUs, of any pattern of positions: one
kernel in Pallas, which Triton compiles, for the forward pass and two for the backward.

A layout says on the host which blocks are live, so that others are never looked at; inside those that are partly live
the pattern's predicate is computed. Scores are never stored: the backward computes them again from the log-sum-exps.

Patterns whose parts need different orders of positions are run part by part, each on positions that are gathered in its
order, and merged exactly by their log-sum-exps, as the block engine does.
"""

import functools

import jax

from xformers_lab.attention._engine.asked import Asked
from xformers_lab.attention._engine.by_device import by_device
from xformers_lab.attention._engine.pallas_gpu.blocks import has_table, work
from xformers_lab.attention._engine.pallas_gpu.flash import flash
from xformers_lab.attention._engine.pallas_gpu.tuning import TUNINGS, fitted
from xformers_lab.errors import Refused
from xformers_lab.layouts import SEQUENCE
from xformers_lab.nn import on_mesh
from xformers_lab.nn.platform import capability

name: str = "pallas"
LARGEST_HEAD = 256
# Triton's products of half precision run on the matrix units of these and newer ones, Ampere's.
OLDEST = 8.0


def why_not(asked: Asked) -> str | None:
    """Why it cannot run a call, None where it can."""
    reasons = (
        ("it is for NVIDIA GPUs from Ampere on, and this process has none", not (asked.interpret or _here())),
        ("it takes no bias: use position=rope, learned, sinusoidal or none", asked.bias),
        ("it takes float32, bfloat16 or float16", asked.dtype not in ("float32", "bfloat16", "float16")),
        (f"it takes heads of up to {LARGEST_HEAD}", max(asked.H, asked.V) > LARGEST_HEAD),
        ("devices share out positions, which it needs all of", on_mesh.shares(SEQUENCE)),
    )
    return next((reason for reason, holds in reasons if holds), None) or _why_no_lists(asked)


def attend(q, k, v, *, asked: Asked, valid=None, documents=None) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v of q (B, T, N, H), k (B, S, K, H) and v (B, S, K, V), see `kernels.Kernel`."""
    run = functools.partial(flash, patterns=asked.patterns, softcap=asked.softcap, interpret=asked.interpret)
    return by_device(run, q, k, v, valid, documents, alike=asked.pattern is not None)


def _why_no_lists(asked: Asked) -> str | None:
    """What takes evaluation: whether the masks of patterns that look something up are too many."""
    for pattern in filter(has_table, dict.fromkeys(asked.patterns)):
        for tuning, turned in ((TUNINGS.forward, False), (TUNINGS.by_rows, False), (TUNINGS.by_columns, True)):
            sizes = fitted(tuning, asked.T, asked.S, asked.H, asked.V, asked.dtype)
            try:
                work(pattern, asked.T, asked.S, sizes.block_q, sizes.block_k, turned)
            except Refused as refused:
                return str(refused)
    return None


def _here() -> bool:
    return (capability() or 0) >= OLDEST
