"""The kernels together, differentiable: patterns of heads, parts of patterns, and the sizes of blocks."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.pallas_gpu import kernels
from xformers_lab.attention._engine.pallas_gpu.blocks import work
from xformers_lab.attention._engine.pallas_gpu.tuning import TUNINGS, Tuning, Tunings, fitted, power_of_two
from xformers_lab.attention._engine.pallas_gpu.view import View, padded


def flash(
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
    run = functools.partial(_of_pattern, softcap=softcap, tunings=tunings, interpret=interpret)
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


def _of_pattern(q, k, v, valid, documents, *, pattern, softcap, tunings, interpret):
    scale, V = q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = (padded(x, power_of_two(x.shape[-1]), 0, 3) for x in (q, k, v))
    return _flash(q, k, v, valid, documents, pattern, scale, softcap, tunings, interpret)[..., :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def _flash(q, k, v, valid, documents, pattern, scale, softcap, tunings, interpret):
    return _forward(q, k, v, valid, documents, pattern, scale, softcap, tunings, interpret)[0]


def _forward(q, k, v, valid, documents, pattern, scale, softcap, tunings: Tunings, interpret):
    total, lse, (T, S) = None, None, (q.shape[1], k.shape[1])
    tuning = _fitted(tunings.forward, q, k, v)
    for each in work(pattern, T, S, tuning.block_q, tuning.block_k):
        view = View(each, tuning, T, S)
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
        tuning = _fitted(tuning, q, k, v)
        for each in work(pattern, T, S, tuning.block_q, tuning.block_k, turned):
            view = View(each, tuning, T, S)
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


def _fitted(tuning: Tuning, q, k, v) -> Tuning:
    return fitted(tuning, q.shape[1], k.shape[1], k.shape[3], v.shape[3], str(q.dtype))
