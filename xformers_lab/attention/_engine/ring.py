"""Softmax attention over positions that devices share out: keys and values travel from device to device in a ring (Liu,
Zaharia and Abbeel, 2023, arXiv 2310.01889), and scores are never stored, neither for the backward pass (Dao et al.,
2022, arXiv 2205.14135).

Each device keeps its T / devices queries. In every round it adds what they see of the keys that are with it, and hands
these on; in the backward pass the gradients of keys and values travel with them. So each holds a share of everything,
and of the scores one tile for each head.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.pattern import by_distance
from xformers_lab.attention._engine.softmax import EMPTY, MASKED
from xformers_lab.layouts import ROWS, SEQUENCE, TENSOR
from xformers_lab.nn import on_mesh

TILE = 512  # most queries, and most keys, whose scores are computed at once


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which keys a query sees by their distance: none after itself (causal), and none that is further away than the
    window (None: any)."""

    causal: bool
    window: int | None = None

    def __call__(self, q_at, k_at):
        """Whether the pairs of positions, which broadcast, are live."""
        seen = q_at >= k_at if self.causal else jnp.full(jnp.broadcast_shapes(q_at.shape, k_at.shape), True)
        return seen if self.window is None else seen & (jnp.abs(q_at - k_at) <= self.window)

    def alive(self, q_first, k_first, tile: int):
        """Whether any pair of two tiles is live, from their first positions."""
        alive = q_first + tile > k_first if self.causal else jnp.bool_(True)
        if self.window is None:
            return alive
        nearest = jnp.maximum(k_first - (q_first + tile - 1), q_first - (k_first + tile - 1))
        return alive & (nearest <= self.window)


def rule_of(pattern: Pattern) -> Rule | None:
    """A pattern by distance alone as a rule; None of any other."""
    known = by_distance(pattern)
    return None if known is None else Rule(*known)


def fits(q, k) -> bool:
    """Whether devices share out the positions of q (B, T, N, H) and k (B, S, K, H), as many of both to each."""
    if not on_mesh.shares(SEQUENCE):
        return False
    return q.shape[1] == k.shape[1] and q.shape[1] % _sizes()[SEQUENCE] == 0


def attend(q, k, v, *, rule: Rule, valid=None, documents=None, bias=None):
    """softmax(q k^T / sqrt(H) + bias) v of q (B, T, N, H); k, v (B, T, K, H), each shared by N / K heads.

    valid (B, T): keys that are no padding. documents (B, T): a query sees its own alone. bias: its leaves have a
    leading axis N; a head's slice is called with positions of queries and keys. -> (B, T, N, H)
    """
    sizes, K = _sizes(), k.shape[2]
    rows = ROWS if q.shape[0] % math.prod(sizes[name] for name in ROWS) == 0 else None
    heads = TENSOR if K % sizes[TENSOR] == 0 else None
    of_tokens, of_heads = PartitionSpec(rows, SEQUENCE), PartitionSpec(rows, SEQUENCE, heads)
    of_bias = jax.tree.map(lambda leaf: PartitionSpec(heads), bias)
    of_each = lambda leaf: None if leaf is None else of_tokens
    local = functools.partial(_local, rule=rule, devices=sizes[SEQUENCE])
    specs = (of_heads, of_heads, of_heads, of_bias, of_each(valid), of_each(documents))
    # Unchecked: that a loop's start and its end vary over the same axes would have to be said of every array.
    run = jax.shard_map(local, in_specs=specs, out_specs=of_heads, check_vma=False)
    return run(q, k, v, bias, valid, documents)


def _sizes():
    return jax.sharding.get_abstract_mesh().shape


def _local(q, k, v, bias, valid, documents, *, rule: Rule, devices: int):
    """`attend` as one device does it."""
    K = k.shape[2]
    grouped = lambda leaf: leaf.reshape(K, -1, *leaf.shape[1:])
    q = jnp.moveaxis(q, 1, 2)  # (B, N, t, H)
    shape = q.shape
    q = q.reshape(shape[0], K, -1, *shape[2:])
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    out = _ring(q, k, v, jax.tree.map(grouped, bias), valid, documents, rule, devices)
    return jnp.moveaxis(out.reshape(*shape[:3], -1), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _ring(q, k, v, bias, valid, documents, rule: Rule, devices: int):
    """q (B, K, G, t, H), k and v (B, K, t, H), leaves of bias (K, G, ...), valid and documents (B, t), a device's share
    of each -> (B, K, G, t, H)."""
    return _forward(q, k, v, bias, valid, documents, rule, devices)[0]


def _forward(q, k, v, bias, valid, documents, rule: Rule, devices: int):
    me, t = lax.axis_index(SEQUENCE), q.shape[3]

    def head(q, k, v, state, bias, valid, mine, theirs, k_first):
        tiles = _Tiles(rule, t, me * t, k_first, valid, mine, theirs)

        def add(state, i, j):
            top, total, out = (tiles.cut(each, i) for each in state)
            s = tiles.scores(tiles.cut(q, i), tiles.cut(k, j), bias, i, j)
            higher = jnp.maximum(top, s.max(-1))
            p, fade = jnp.exp(s - higher[:, None]), jnp.exp(top - higher)
            seen = jnp.dot(p.astype(v.dtype), tiles.cut(v, j), preferred_element_type=jnp.float32)
            new = higher, total * fade + p.sum(-1), out * fade[:, None] + seen
            return tuple(tiles.put(whole, part, i) for whole, part in zip(state, new, strict=True))

        return tiles.over_live(add, state)

    def one_round(number, carry):
        travelling, state = carry
        k, v, valid, theirs = travelling
        first = (me - number) % devices * t
        state = _over_heads(head)(q, k, v, state, bias, valid, documents, theirs, first)
        return _handed_on(travelling, devices), state

    rows = jnp.zeros(q.shape[:-1], jnp.float32)
    state = rows + EMPTY, rows, jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32)
    _, (top, total, out) = lax.fori_loop(0, devices, one_round, ((k, v, valid, documents), state))
    total = jnp.maximum(total, 0.5)  # a row that sees a key has a sum of at least 1
    out = (out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, bias, valid, documents, out, top + jnp.log(total))


def _backward(rule: Rule, devices: int, saved, grad):
    """With p = exp(s - log-sum-exp) the gradient by scores s is p (dout . v - dout . out). That is the one of `weighed`
    below, in which the log-sum-exp and dout . out are numbers."""
    q, k, v, bias, valid, documents, out, log_sum = saved
    me, t = lax.axis_index(SEQUENCE), q.shape[3]
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    leaves, whole = jax.tree.flatten(bias)
    moves = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    floats = [leaf for leaf, moved in zip(leaves, moves, strict=True) if moved]
    fixed = [leaf for leaf, moved in zip(leaves, moves, strict=True) if not moved]

    def joined(floats, fixed):
        floats, fixed = iter(floats), iter(fixed)
        return jax.tree.unflatten(whole, [next(floats if moved else fixed) for moved in moves])

    def head(q, k, v, of_rows, bias, valid, mine, theirs, k_first):
        tiles, (floats, fixed) = _Tiles(rule, t, me * t, k_first, valid, mine, theirs), bias

        def add(grads, i, j):
            grad, log_sum, delta = (tiles.cut(each, i) for each in of_rows)

            def weighed(q, k, v, floats):
                s = tiles.scores(q, k, joined(floats, fixed), i, j)
                by_p = jnp.dot(grad.astype(v.dtype), v.T, preferred_element_type=jnp.float32)
                return (jnp.exp(s - log_sum[:, None]) * (by_p - delta[:, None])).sum()

            parts = tiles.cut(q, i), tiles.cut(k, j), tiles.cut(v, j)
            *new, of_bias = jax.grad(weighed, argnums=(0, 1, 2, 3))(*parts, floats)
            pairs = zip(grads, new, (i, j, j), strict=False)
            summed = [tiles.put(total, tiles.cut(total, at) + part, at) for total, part, at in pairs]
            return *summed, jax.tree.map(jnp.add, grads[-1], of_bias)

        return tiles.over_live(add, _zeros((q, k, v, floats)))

    def one_round(number, carry):
        travelling, dq, dbias = carry
        k, v, valid, theirs, dk, dv = travelling
        first = (me - number) % devices * t
        rows = grad, log_sum, delta
        new = _over_heads(head)(q, k, v, rows, (floats, fixed), valid, documents, theirs, first)
        dk, dv = dk + new[1].sum(2), dv + new[2].sum(2)
        dbias = jax.tree.map(lambda total, part: total + part.sum(0), dbias, new[3])
        return _handed_on((k, v, valid, theirs, dk, dv), devices), dq + new[0], dbias

    # After as many rounds as there are devices, what travels is at home again.
    start = (k, v, valid, documents, *_zeros((k, v))), _zeros(q), _zeros(floats)
    (*_, dk, dv), dq, dbias = lax.fori_loop(0, devices, one_round, start)
    typed = [new.astype(old.dtype) for new, old in ((dq, q), (dk, k), (dv, v))]
    dbias = [new.astype(old.dtype) for new, old in zip(dbias, floats, strict=True)]
    return *typed, joined(dbias, [None] * len(fixed)), None, None


_ring.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The pairs of a device's t queries, which begin at q_first, and t keys, which begin at k_first, in tiles. valid
    (t,): keys that are no padding; mine, theirs (t,): the documents of queries and of keys; None: no matter."""

    rule: Rule
    t: int
    q_first: Any
    k_first: Any
    valid: Any
    mine: Any
    theirs: Any

    @property
    def size(self) -> int:
        """The largest that divides t and is at most TILE."""
        return max(size for size in range(1, min(self.t, TILE) + 1) if self.t % size == 0)

    def cut(self, x, at):
        return lax.dynamic_slice_in_dim(x, at, self.size)

    def put(self, x, part, at):
        return lax.dynamic_update_slice_in_dim(x, part, at, 0)

    def scores(self, q, k, bias, i, j):
        """Of the queries (size, H) from the i-th on and the keys from the j-th on, float32, MASKED where not seen."""
        q_at = (self.q_first + i + jnp.arange(self.size))[:, None]
        k_at = (self.k_first + j + jnp.arange(self.size))[None]
        s = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        s = s if bias is None else s + bias(q_at, k_at)
        seen = self.rule(q_at, k_at)
        if self.valid is not None:
            seen &= self.cut(self.valid, j)[None]
        if self.mine is not None:
            seen &= self.cut(self.mine, i)[:, None] == self.cut(self.theirs, j)[None]
        return jnp.where(seen, s, MASKED)

    def over_live(self, step, carry):
        """carry = step(carry, i, j) for every tile, of queries from the i-th on and keys from the j-th, with a live
        pair in it."""
        across = self.t // self.size

        def one(number, carry):
            i, j = number // across * self.size, number % across * self.size
            alive = self.rule.alive(self.q_first + i, self.k_first + j, self.size)
            return lax.cond(alive, lambda carry: step(carry, i, j), lambda carry: carry, carry)

        return lax.fori_loop(0, across**2, one, carry)


def _over_heads(head):
    """`head(q, k, v, of_rows, of_head, valid, mine, theirs, first)` of every head of every sample: q and of_rows (B, K,
    G, ...), k and v (B, K, ...), of_head (K, G, ...), valid and documents (B, ...)."""
    of_group = jax.vmap(head, (0, None, None, 0, 0, None, None, None, None))
    of_sample = jax.vmap(of_group, (0, 0, 0, 0, 0, None, None, None, None))
    return jax.vmap(of_sample, (0, 0, 0, 0, None, 0, 0, 0, None))


def _handed_on(tree, devices: int):
    """What the device before has of it."""
    around = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, SEQUENCE, around), tree)


def _zeros(tree):
    """Sums of these, in float32."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)
