"""All keys, one block of queries at a time: for weights that are more than a softmax of the scores, and for mechanisms
that take or give a map (T, S) of queries and keys.

The backward computes each block again, so that what is T x S is only what a mechanism takes or gives, and time is that
of all pairs. Weights that look at positions alone belong to the block-sparse engine.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.attention._engine.products import EXACT
from xformers_lab.attention._engine.softmax import MASKED, on_data, same_document

# Queries per block, at most. Of `by_blocks`: rows of some thousand scores then stay in the cache of a CPU. Of `rows`,
# not causal and causal: enough for wide products, few enough that a block of scores stays in cache.
BLOCK, ROWS, CAUSAL_ROWS = 128, 512, 256
# From this many keys on, causal queries come in portions that see no more keys than they may. Of `by_blocks` quarters,
# which compute 5/8 of the square; of `rows` eighths, 9/16.
LONG, QUARTERS, EIGHTHS = 1024, 4, 8


def by_blocks(row, queries, S: int, causal: bool, *, at_once: int = BLOCK):
    """row(queries of a block, at (C, 1), keys) on blocks of C queries; its results are joined along the first axis.

    queries is a pytree of arrays with a leading axis T; query t stands at position S - T + t, which is its `at`. A
    block can see no more than the first `keys` of the S keys.
    """
    parts = []
    for first, last, keys in _portions(_length(queries), S, QUARTERS if causal else 1):
        part = jax.tree.map(lambda x, first=first, last=last: x[first:last], queries)
        parts.append(_each_block(functools.partial(row, keys=keys), part, S - _length(queries) + first, at_once))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)


def rows(q, k, v, weigh, leaves, *, valid=None, documents=None, causal=False, at_once: int | None = None):
    """weigh(scores, seen, positions, leaves) @ v -> (..., T, H) in v's type.

    q (..., T, H), k and v (..., S, H), valid (S,) bool or None, documents (S,) int32 or None, of which a query sees
    its own; query t stands at position S - T + t. Axes in front, of heads, `weigh` may mix. It gets float32 scores
    (..., C, S') of C queries, scaled by 1 / sqrt(H), seen (C, S') bool, positions ((C, 1), (1, S')), and `leaves`,
    a pytree that is differentiated; it gives float32 weights, zero where nothing is seen. at_once: queries per
    block, by default as many as one head should have.
    """
    T, S = q.shape[-2], k.shape[-2]
    at_once, parts = at_once or (CAUSAL_ROWS if causal else ROWS), []
    for first, last, keys in _portions(T, S, EIGHTHS if causal else 1):
        part = q[..., first:last, :], k[..., :keys, :], v[..., :keys, :], None if valid is None else valid[:keys]
        parts.append(_rows(*part, documents, leaves, weigh, S - T + first, causal, at_once))
    return jnp.concatenate(parts, -2)


def seen_from(at, keys: int, valid=None, causal: bool = False, documents=None):
    """(C or 1, keys) bool: what queries at positions `at` (C, 1) may see of the first `keys` keys; valid and documents
    (S,)."""
    seen = jnp.arange(keys)[None] <= (at if causal else keys)
    seen = seen if documents is None else seen & same_document(documents, at, jnp.arange(keys)[None])
    return seen if valid is None else seen & valid[:keys]


def masked(s, at, valid, causal: bool, bias=None, documents=None):
    """Scores s (C, keys) of queries at positions `at` (C, 1) with their bias, MASKED where a key may not be seen."""
    s = s if bias is None else s + bias(at, jnp.arange(s.shape[1])[None])
    return jnp.where(seen_from(at, s.shape[1], valid, causal, documents), s, MASKED)


def widened(x, S: int):
    """(C, keys) with zeros for the keys up to S."""
    return jnp.pad(x, ((0, 0), (0, S - x.shape[1])))


def largest(T: int, S: int, H: int, at_once: int = ROWS) -> int:
    """Elements of the largest array of one head: a block of scores, or queries or keys."""
    return max(_size(T, at_once) * S, T * H, S * H)


def pairs(T: int, S: int, causal: bool) -> int:
    """How many pairs of queries and keys `by_blocks` computes."""
    return sum((last - first) * keys for first, last, keys in _portions(T, S, QUARTERS if causal else 1))


# ---- blocks ------------------------------------------------------------------------------------------------------


def _portions(T: int, S: int, count: int) -> Iterator[tuple[int, int, int]]:
    """The first and the last query of each of `count` portions, and how many keys it may see; one of short ones."""
    if count == 1 or min(T, S) < LONG:
        yield 0, T, S
        return
    size = -(-T // count)
    for first in range(0, T, size):
        last = min(first + size, T)
        yield first, last, max(1, S - T + last)  # T > S: queries before the first key are given one, which is masked


def _each_block(row, queries, first: int, at_once: int):
    """row(queries of a block, their positions) block after block, joined; the first query stands at `first`."""
    T = _length(queries)
    C = _size(T, at_once)
    if T == C:
        return jax.checkpoint(row)(queries, first + jnp.arange(T)[:, None])
    blocks = jax.tree.map(lambda x: in_blocks(x, C), queries), first + jnp.arange(T + -T % C).reshape(-1, C, 1)
    run = jax.checkpoint(lambda block: row(block[0], on_data(block[1], _data(block[0]))), prevent_cse=False)
    return jax.tree.map(lambda x: joined(x, T), lax.map(run, blocks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _rows(q, k, v, valid, documents, leaves, weigh, first, causal, at_once):
    return _forward(q, k, v, valid, documents, leaves, weigh, first, causal, at_once)[0]


def _forward(q, k, v, valid, documents, leaves, weigh, first, causal, at_once):
    T, scale, kT = q.shape[-2], q.shape[-1] ** -0.5, jnp.swapaxes(k, -1, -2)

    def row(block):
        number, q = block
        seen, positions = _looked_at(first + number * q.shape[-2], q, k, valid, documents, causal)
        p = weigh(_product(q * scale, kT), seen, positions, leaves)
        return _product(p.astype(v.dtype), v).astype(v.dtype)

    blocks = in_blocks(q, _size(T, at_once), axis=-2)
    out = lax.map(row, (jnp.arange(len(blocks)), blocks))
    return joined(out, T, axis=-2), (q, k, v, valid, documents, leaves)


def _backward(weigh, first, causal, at_once, saved, grad):
    q, k, v, valid, documents, leaves = saved
    T, scale = q.shape[-2], q.shape[-1] ** -0.5
    kT, vT = jnp.swapaxes(k, -1, -2), jnp.swapaxes(v, -1, -2)

    def row(totals, block):
        number, q, g = block
        seen, positions = _looked_at(first + number * q.shape[-2], q, k, valid, documents, causal)
        p, pull = jax.vjp(lambda s, leaves: weigh(s, seen, positions, leaves), _product(q * scale, kT), leaves)
        ds, dleaves = pull(_product(g, vT))
        p, ds = p.astype(v.dtype), ds.astype(k.dtype)
        # Transposed, because XLA:CPU runs a product whose left side is contracted on its major axis much slower.
        added = _product(jnp.swapaxes(q, -1, -2), ds), _product(jnp.swapaxes(g, -1, -2), p), dleaves
        return jax.tree.map(jnp.add, totals, added), _product(ds, k)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    totals = zeros(kT), zeros(vT), jax.tree.map(jnp.zeros_like, leaves)
    blocks, grads = (in_blocks(x, _size(T, at_once), axis=-2) for x in (q, grad))
    (dkT, dvT, dleaves), dq = lax.scan(row, totals, (jnp.arange(len(blocks)), blocks, grads))
    dk, dv = jnp.swapaxes(dkT, -1, -2) * scale, jnp.swapaxes(dvT, -1, -2)
    dq = joined(dq, T, axis=-2) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, dleaves


_rows.defvjp(_forward, _backward)


def _product(a, b):
    return jnp.matmul(a, b, **EXACT)


def _looked_at(first, q, k, valid, documents, causal: bool):
    """What queries from position `first` on may see (C, S), and the positions (C, 1) and (1, S)."""
    at, S = (first + jnp.arange(q.shape[-2]))[:, None], k.shape[-2]
    all_seen = valid is None and documents is None and not causal  # a constant, with which XLA masks nothing
    seen = jnp.ones((len(at), S), bool) if all_seen else seen_from(at, S, valid, causal, documents)
    return seen, (at, jnp.arange(S)[None])


def _data(queries):
    """An array of queries that is differentiated."""
    return next(x for x in jax.tree.leaves(queries) if jnp.issubdtype(x.dtype, jnp.floating))


def _length(queries) -> int:
    return jax.tree.leaves(queries)[0].shape[0]


def _size(T: int, at_once: int) -> int:
    """The size of the fewest equal blocks of at most `at_once` queries."""
    return -(-T // -(-T // at_once))
