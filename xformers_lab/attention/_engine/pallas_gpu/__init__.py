"""Block-sparse flash attention (Dao et al., 2022, arXiv 2205.14135) for NVIDIA GPUs, of any pattern of positions: one
kernel in Pallas, which Triton compiles, for the forward pass and two for the backward.

A layout says on the host which blocks are live, so that others are never looked at; inside those that are partly live
the pattern's predicate is computed. Scores are never stored: the backward computes them again from the log-sum-exps.

Patterns whose parts need different orders of positions are run part by part, each on positions that are gathered in its
order, and merged exactly by their log-sum-exps, as the block engine does.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.block_sparse.view import places, taken
from xformers_lab.attention._engine.order import PAD
from xformers_lab.attention._engine.pallas_gpu import kernels
from xformers_lab.attention._engine.pallas_gpu.blocks import Work, work
from xformers_lab.attention._engine.pallas_gpu.kernels import TUNING, Tuning
from xformers_lab.attention._engine.pallas_gpu.tile import Marks, Rule
from xformers_lab.attention._engine.softmax import EMPTY

# The label of a key that is padding, which no query has.
HIDDEN = np.iinfo(np.int32).min
# Products of matrices have at least so many rows and columns.
LEAST = 16


@dataclasses.dataclass(frozen=True)
class Tunings:
    """How each of the three kernels is cut and compiled."""

    forward: Tuning = TUNING
    by_rows: Tuning = TUNING
    by_columns: Tuning = TUNING


TUNINGS = Tunings()


def attend(
    q,
    k,
    v,
    *,
    patterns: Sequence[Pattern],
    valid=None,
    documents=None,
    softcap: float | None = None,
    tunings: Tunings = TUNINGS,
    interpret: bool = False,
):
    """Softmax attention of q (B, T, N, H) to k (B, S, K, H) and v (B, S, K, V), each shared by N / K heads; zeros where
    nothing is seen.

    patterns: one for all heads, or one for each. valid (B, S): keys that are no padding. documents (B, S): of which a
    query sees its own alone. Query t stands at position S - T + t. softcap: scores are softcap tanh(score / softcap).
    interpret: run the kernels without a GPU. -> (B, T, N, V) in v's type; scores and sums are float32.
    """
    given = q, k, v, valid, documents
    run = functools.partial(_attend, softcap=softcap, tunings=tunings, interpret=interpret)
    different = list(dict.fromkeys(patterns))
    if len(different) == 1:
        return run(*given, pattern=different[0])
    shared, out = q.shape[2] // k.shape[2], {}
    for pattern in different:
        heads = np.array([head for head, own in enumerate(patterns) if own == pattern])
        keys, values = (x[:, :, heads // shared] for x in (k, v))
        of_heads = run(q[:, :, heads], keys, values, valid, documents, pattern=pattern)
        out |= {int(head): of_heads[:, :, place] for place, head in enumerate(heads)}
    return jnp.stack([out[head] for head in range(len(patterns))], 2)


def _attend(q, k, v, valid, documents, *, pattern, softcap, tunings, interpret):
    scale, V = q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = (_padded(x, power_of_two(x.shape[-1]), 0, 3) for x in (q, k, v))
    return _flash(q, k, v, valid, documents, pattern, scale, softcap, tunings, interpret)[..., :V]


def power_of_two(size: int) -> int:
    """The least that is no less, and enough for a product: blocks have such sizes."""
    return max(LEAST, 1 << (size - 1).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def _flash(q, k, v, valid, documents, pattern, scale, softcap, tunings, interpret):
    return _forward(q, k, v, valid, documents, pattern, scale, softcap, tunings, interpret)[0]


def _forward(q, k, v, valid, documents, pattern, scale, softcap, tunings: Tunings, interpret):
    total, lse = None, None
    tuning = _fitted(tunings.forward, q, k)
    for each in work(pattern, q.shape[1], k.shape[1], tuning.block_q, tuning.block_k):
        view = _View(each, tuning, q.shape[1], k.shape[1])
        arrays = view.queries(q), view.keys(k), view.keys(v), view.marks(valid, documents)
        out, stat = kernels.forward(*arrays, each, view.rule(scale, softcap), tuning, interpret)
        out, stat = view.merged(out, stat)
        out, stat = view.unqueries(out), view.unqueries(stat, axis=2)
        if total is None or lse is None:
            total, lse = out, stat
        else:
            both = jnp.logaddexp(lse, stat)
            share = lambda one, both=both: jnp.swapaxes(jnp.exp(one - both), 1, 2)[..., None]
            total, lse = total * share(lse) + out * share(stat), both
    assert total is not None
    total = total.astype(v.dtype)
    return total, (q, k, v, valid, documents, total, lse)


def _backward(pattern, scale, softcap, tunings: Tunings, interpret, saved, grad):
    q, k, v, valid, documents, out, lse = saved
    T, S = q.shape[1], k.shape[1]
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), grad.astype(jnp.float32))

    def prepared(tuning: Tuning, turned: bool):
        tuning = _fitted(tuning, q, k)
        for each in work(pattern, T, S, tuning.block_q, tuning.block_k, turned):
            view = _View(each, tuning, T, S)
            # A query that pads a block has no weights.
            of_rows = view.queries(grad), view.queries(lse, np.inf, axis=2), view.queries(delta, axis=2)
            arrays = view.queries(q), view.keys(k), view.keys(v), of_rows, view.marks(valid, documents)
            yield view, (*arrays, each, view.rule(scale, softcap), tuning, interpret)

    summed = lambda arrays: functools.reduce(operator.add, arrays)
    by_rows, by_columns = prepared(tunings.by_rows, False), prepared(tunings.by_columns, True)
    dq = summed(view.unqueries(view.summed(kernels.by_rows(*given))) for view, given in by_rows)
    pairs = [[view.unkeys(view.summed(x)) for x in kernels.by_columns(*given)] for view, given in by_columns]
    dk, dv = (summed(arrays) for arrays in zip(*pairs, strict=True))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_flash.defvjp(_forward, _backward)


def _fitted(tuning: Tuning, q, k) -> Tuning:
    """No larger blocks than there are positions."""
    enough_q, enough_k = (power_of_two(x.shape[1]) for x in (q, k))
    return Tuning(min(tuning.block_q, enough_q), min(tuning.block_k, enough_k), tuning.warps, tuning.stages)


class _View:
    """Arrays (B, positions, ...) in the order of one part's positions, in whole blocks, and back."""

    def __init__(self, each: Work, tuning: Tuning, T: int, S: int):
        self.work, self.part, self.tuning, self.T, self.S = each, each.ordered, tuning, T, S

    def rule(self, scale: float, softcap: float | None) -> Rule:
        padded = len(self.part.keys) != self.S
        sizes = self.tuning.block_q, self.tuning.block_k
        return Rule(self.part.pattern, *sizes, scale, softcap, self.S - self.T, self.S if padded else None)

    def marks(self, valid, documents) -> Marks:
        part, q_label, k_label = self.part, None, None
        if documents is not None:
            k_label = documents.astype(jnp.int32)
            q_label = self.queries(k_label[:, np.maximum(np.arange(self.T) + self.S - self.T, 0)])
        if valid is not None:
            k_label = jnp.where(valid, 0 if k_label is None else k_label, HIDDEN).astype(jnp.int32)
        given = lambda x: None if x is None else jnp.asarray(x)
        return Marks(
            q_at=None if part.natural_queries else jnp.asarray(part.queries),
            k_at=None if part.natural_keys else jnp.asarray(part.keys),
            q_label=q_label,
            k_label=None if k_label is None else self.keys(k_label),
            masks=given(self.work.masks),
            numbers=given(self.work.programs.masks),
        )

    def queries(self, x, fill: float = 0, axis: int = 1):
        part = self.part
        if part.natural_queries:
            return _padded(x, len(part.queries), fill, axis)
        return taken(x, np.where(part.queries == PAD, PAD, part.queries - (self.S - self.T)), fill, axis)

    def keys(self, x):
        part = self.part
        return _padded(x, len(part.keys), 0, 1) if part.natural_keys else taken(x, part.keys, axis=1)

    def unqueries(self, x, axis: int = 1):
        if self.part.natural_queries:
            return jax.lax.slice_in_dim(x, 0, self.T, axis=axis)
        return jnp.take(x, places(self.part.queries, self.S - self.T, self.T), axis=axis)

    def unkeys(self, x):
        if self.part.natural_keys:
            return x[:, : self.S]
        return taken(x, places(self.part.keys, 0, self.S), axis=1)

    # ---- rows that several programs compute ------------------------------------------------------------------------

    def merged(self, out, lse):
        """Outputs (B, slots block, N, H) and log-sum-exps (B, N, slots block) -> of rows alone."""
        programs, block = self.work.programs, self.tuning.block_q
        if not len(programs.rows):
            return out, lse
        out, lse = out.reshape(out.shape[0], -1, block, *out.shape[2:]), lse.reshape(*lse.shape[:2], -1, block)
        parts = jnp.take(out, programs.pieces, axis=1, mode="fill", fill_value=0)  # (B, R, M, block, N, H)
        stats = jnp.take(lse, programs.pieces, axis=2, mode="fill", fill_value=EMPTY)  # (B, N, R, M, block)
        both = jax.nn.logsumexp(stats, 3)
        weights = jnp.exp(stats - both[:, :, :, None])
        mean = jnp.einsum("brmcnh,bnrmc->brcnh", parts, weights)
        out = out[:, : programs.count].at[:, programs.rows].set(mean)
        lse = lse[:, :, : programs.count].at[:, :, programs.rows].set(both)
        return out.reshape(out.shape[0], -1, *out.shape[3:]), lse.reshape(*lse.shape[:2], -1)

    def summed(self, x):
        """(B, slots block, heads, H) -> of rows alone."""
        programs = self.work.programs
        if not len(programs.rows):
            return x
        block = x.shape[1] // programs.slots
        x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
        totals = jnp.take(x, programs.pieces, axis=1, mode="fill", fill_value=0).sum(2)
        x = x[:, : programs.count].at[:, programs.rows].set(totals)
        return x.reshape(x.shape[0], -1, *x.shape[3:])


def _padded(x, length: int, fill: float, axis: int):
    if x.shape[axis] == length:
        return x
    padding = [(0, length - x.shape[axis] if at == axis else 0) for at in range(x.ndim)]
    return jnp.pad(x, padding, constant_values=fill)
