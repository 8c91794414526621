"""What the kernels share: one tile of scores, block_q queries by block_k keys, and what of it is seen."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.softmax import MASKED

# Exponentials are of base 2, which the hardware has.
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is the same for all tiles of a kernel. shift: the position of the first query; keys: how many there are,
    None where no block of them is padded; softcap: scores are softcap tanh(score / softcap)."""

    pattern: Pattern
    block_q: int
    block_k: int
    scale: float
    softcap: float | None
    shift: int
    keys: int | None


class Marks(NamedTuple):
    """What a tile's mask is read from, references or arrays; None where it is of no matter.

    q_at (T,), k_at (S,): positions, where they are not the natural ones. q_label, k_label (T,), (S,): a query sees keys
    of its label alone; without q_label, those of label 0. masks (M, block_q, block_k): of blocks whose predicate has a
    table, and numbers (n,): which one belongs to an entry.
    """

    q_at: Any = None
    k_at: Any = None
    q_label: Any = None
    k_label: Any = None
    masks: Any = None
    numbers: Any = None


def rows_of(ref, number, block: int):
    """A block of rows of an array (n, ...)."""
    return ref[pl.ds(number * block, block)]


def seen(rule: Rule, marks: Marks, entry, row, column, mixed: bool):
    """Which scores of a tile count, booleans that broadcast to (block_q, block_k); None: all."""
    found = []
    if mixed and marks.masks is not None:
        found.append(marks.masks[marks.numbers[entry]] != 0)
    elif mixed:
        q = _positions(marks.q_at, row, rule.block_q, rule.shift)[:, None]
        k = _positions(marks.k_at, column, rule.block_k, 0)[None]
        found.append(rule.pattern(q, k))
        if marks.k_at is not None:
            found.append(k >= 0)
        elif rule.keys is not None:
            found.append(k < rule.keys)
    if marks.k_label is not None:
        label = rows_of(marks.k_label, column, rule.block_k)[None]
        asked = 0 if marks.q_label is None else rows_of(marks.q_label, row, rule.block_q)[:, None]
        found.append(label == asked)
    if not found:
        return None
    shape = rule.block_q, rule.block_k
    return functools.reduce(jnp.logical_and, [jnp.broadcast_to(each, shape) for each in found])


def scores(rule: Rule, q, k, mask):
    """Of q (block_q, H) and k (block_k, H) in base 2, float32, MASKED where not seen; and what their derivative by the
    products is to be multiplied by beyond the scale, where there is a cap."""
    s, slope = product(q, k, 1, 1), None
    if rule.softcap is None:
        s = s * (rule.scale * LOG2E)
    else:
        t = jnp.tanh(s * (rule.scale / rule.softcap))
        s, slope = t * (rule.softcap * LOG2E), 1 - t * t
    return (s if mask is None else jnp.where(mask, s, MASKED)), slope


def product(a, b, of_a: int, of_b: int):
    """a and b contracted along these axes, in float32."""
    return lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _positions(ref, number, block: int, first: int):
    if ref is not None:
        return rows_of(ref, number, block)
    return first + number * block + lax.iota(jnp.int32, block)
