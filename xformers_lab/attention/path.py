import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Attention, Call, Complexity, Cost, why_not_one_way
from xformers_lab.attention._base.recurrent import unit
from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.linear.gated import inverse, product
from xformers_lab.attention._engine.query_blocks import LONG, seen_from
from xformers_lab.attention._engine.softmax import MASKED, on_data, same_document, softmax_average
from xformers_lab.attention.full import Full
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

# Queries whose scores are computed together, at most.
ROWS = 256
# Of a long sequence queries come in so many portions, which look at no more keys than they may: 5/8 of the square.
PORTIONS = 4


class Path(Full):
    """PaTH attention: positions by accumulated Householder transformations (Yang et al., 2025, arXiv 2505.16381,
    section 3).

    out_t = sum_(s <= t) softmax_s(q_t H_t H_(t-1) ... H_(s+1) k_s / sqrt(H)) v_s, H_l = I - b_l w_l w_l^T, with a
    direction w_l of unit length and b_l = 2 sigmoid(u x_l + c) in each head: every position between key and query
    turns, mirrors or wipes out what the key says in one direction. Use it with position=none.

    Products within a block of positions are one triangular inverse (the UT transform, appendix), so that scores are
    products of matrices. Padding transforms nothing. A bias is added to the scores.
    Deviations from the paper: w has no short convolution in front of its norm.

    Options:
        rank: width of the layer between the input and all heads' w
        chunk: positions whose transformations are joined into one
    """

    kind = "prior"
    exact = True
    complexity = Complexity(
        time="O(T S H (1 + H / chunk))",
        memory="O(S (H + chunk))",
        decoding="every key, transformed, and value",
        time_note=", 5/8 of it where S >= 1024",
        memory_note="per row of blocks, the T x S scores are never stored",
    )
    refuses: ClassVar = {"bidirectional": "a key is transformed by what stands behind it, up to the query"}

    def __init__(self, size: Size, *, rank: int = 32, chunk: int = 64, rngs: nnx.Rngs):
        if rank < 1 or chunk < 1:
            raise Refused(f"rank and chunk must be at least 1, got {rank} and {chunk}")
        super().__init__(size, rngs=rngs)
        self.chunk = chunk
        self.down = Linear(size.dim, rank, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.up = Linear(rank, size.key_heads * size.head, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.strength = Linear(size.dim, size.key_heads, dtype=size.dtype, rngs=rngs)

    def _transformations(self, x):
        """w (..., K, H) and b (..., K) of inputs (..., D): heads that share keys share them too."""
        w = unit(self.heads_of(self.up(self.down(x))))
        return w, 2 * jax.nn.sigmoid(self.strength(x).astype(jnp.float32))

    def from_keys(self, x):
        w, b = (jnp.repeat(y, self.size.heads // self.size.key_heads, 2) for y in self._transformations(x))
        return {"w": w, "b": b}

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, w, b):
        T, S = q.shape[0], k.shape[0]
        if T > S:  # queries that stand before the first key
            options = {"valid": valid, "documents": documents, "causal": causal, "bias": bias, "w": w, "b": b}
            return jnp.pad(self.attend(q[T - S :], k, v, **options), ((T - S, 0), (0, 0)))
        w, b = _of_valid(w, b, valid, causal)
        return self._attended(q, k, v, w, b, valid=valid, documents=documents, bias=bias)

    def _attended(self, q, k, v, w, b, *, valid=None, documents=None, bias=None, front=None):
        """`attend` with w and b 0 where padding stands. front (R, H): keys of R positions before these S, which nothing
        between them transforms; v, valid and documents are of all R + S."""
        T, S, H = q.shape[0], k.shape[0], q.shape[1]
        R = 0 if front is None else len(front)
        C = min(self.chunk, S)
        first, ahead = (S - T) // C, (S - T) % C
        of_keys = [in_blocks(x.astype(jnp.float32), C) for x in (k, w, b[:, None])]
        queries = in_blocks(jnp.pad(q.astype(jnp.float32) * H**-0.5, ((ahead, 0), (0, 0))), C)
        own, queries, keys, through = jax.checkpoint(_blocks, static_argnums=4)(queries, *of_keys, first)

        def row(block, limit):
            """Outputs (n, C, H) of n blocks of queries, the first of which has this number."""
            number, own, queries = block
            number = on_data(number, queries)
            mine = (number + jnp.arange(len(queries)))[:, None, None]

            def back(queries, block):
                other, keys, through = block
                s = jnp.where(mine == other, own, product("ncf,df->ncd", queries, keys))
                return jnp.where(mine > other, queries @ through, queries), s

            blocks = jnp.arange(limit), keys[:limit], through[:limit]
            turned, s = lax.scan(back, queries, blocks, reverse=True)
            s = jnp.moveaxis(s, 0, 2).reshape(len(queries) * C, -1)[:, :S]
            s = s if front is None else jnp.concatenate([product("ncf,rf->ncr", turned, front).reshape(-1, R), s], 1)
            at = R + number * C + jnp.arange(len(s))[:, None]
            s = s if bias is None else s + bias(at, jnp.arange(s.shape[1])[None])
            seen = seen_from(at, s.shape[1], valid, True, documents)
            return softmax_average(jnp.where(seen, s, MASKED), seen, v[: s.shape[1]]).reshape(len(queries), C, -1)

        rows, together = _rows(len(queries), C)
        numbers = first + together * jnp.arange(rows)
        of_rows = numbers, *(in_blocks(x, together) for x in (own, queries))
        out = []
        for start, stop in _portions(rows, S):
            limit = min(len(keys), first + stop * together)
            run = jax.checkpoint(lambda block, limit=limit: row(block, limit), prevent_cse=False)
            out.append(lax.map(run, jax.tree.map(lambda x, start=start, stop=stop: x[start:stop], of_rows)))
        return jnp.concatenate(out).reshape(-1, H)[ahead : ahead + T]

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, w, b):
        T, S, H = q.shape[0], k.shape[0], q.shape[1]
        at, positions = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        earlier = jnp.arange(S)[:, None]
        w, b = _of_valid(w, b, valid, causal)
        queries = jnp.pad(q.astype(jnp.float32), ((max(S - T, 0), 0), (0, 0)))[-S:] / H**0.5

        def one(keys, t):
            keys = jnp.where(earlier < t, keys - b[t] * jnp.outer(keys @ w[t], w[t]), k.astype(jnp.float32))
            return keys, keys @ queries[t]

        s = lax.scan(one, k.astype(jnp.float32), jnp.arange(S))[1]
        s = jnp.pad(s, ((max(T - S, 0), 0), (0, 0)))[-T:]
        s = s if bias is None else s + bias(at, positions)
        seen = positions <= at
        seen = seen if documents is None else seen & same_document(documents, at, positions)
        return softmax_average(s, seen if valid is None else seen & valid, v)

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, min(self.chunk, S)
        first = (S - T) // C
        blocks = -(-S // C)
        rows, together = _rows(blocks - first, C)
        pairs = sum(
            (stop - start) * together * min(blocks, first + stop * together) * C * C
            for start, stop in _portions(rows, S)
        )
        of_block = 14 * C * C * H + 7 * C**3 + 2 * C * H * H
        memory = max(together * C * S, S * max(C, H), blocks * H * H)
        return Cost(flops=pairs * (4 * H + 2 * H * H / C) + blocks * of_block, memory=memory, state=2 * S * H)

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        """Keys in float32, for every token transforms them once more."""
        cache = super().init_cache(B, length, dtype)
        return cache | {"k": cache["k"].astype(jnp.float32)}

    def decode_heads_several(self, cache, call: Call):
        """`attend` of new queries on new keys, and on those kept, which nothing transforms up to the first of them."""
        at, T, R = cache["seen"], call.q.shape[1], cache["k"].shape[2]
        w, b = (jnp.moveaxis(y, 2, 1) for y in self._transformations(call.x))
        new = {"k": jnp.swapaxes(call.k, 1, 2), "v": jnp.swapaxes(self.summed(call.v), 1, 2)}
        there = jnp.pad(self._held(at - 1, cache)[1], (0, T), constant_values=True)
        times = call.q.shape[2] // w.shape[1]
        of_heads = jax.tree.map(lambda y: jnp.repeat(y, times, 1), {"w": w, "b": b, "front": cache["k"]})
        values = jnp.swapaxes(jnp.concatenate([cache["v"], new["v"].astype(cache["v"].dtype)], 2), 1, 2)

        def one(q, k, v, of_head, _, bias):
            bias = None if bias is None else Behind(bias, at, R)
            return self._attended(q, k, v, valid=there, bias=bias, **of_head), None

        out = over_heads(one, call.q, call.k, values, of_heads, None, call.bias, plan=plan_of(self.size))[0]
        transformed = functools.partial(_transformed, chunk=min(self.chunk, T))
        kept, keys = jax.vmap(jax.vmap(transformed))(cache["k"], new["k"].astype(jnp.float32), w, b)
        written = lambda rows, new: lax.dynamic_update_slice_in_dim(rows, new.astype(rows.dtype), at, 2)
        held = {"k": written(kept, keys), "v": written(cache["v"], new["v"])}
        return self.finish(out.astype(call.v.dtype), call), cache | held | {"seen": at + T}

    def decode_heads(self, cache, call: Call):
        w, b = (y[:, :, None] for y in self._transformations(call.x))
        along = (cache["k"] * w).sum(-1, keepdims=True)
        cache, at, positions, seen = self.remembered(cache | {"k": cache["k"] - b[..., None] * along * w}, call)
        out = self.attend_cached(call.q, cache["k"], cache["v"], at, positions, seen, call.bias)
        return out, cache, call.carry

    def rewound(self, before, after, taken, *, read: int):
        """Refused: every later token transforms the keys before it."""
        return Attention.rewound(self, before, after, taken, read=read)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Behind:
    """A bias of rows of which the first `slots` are kept, each in the place of its position, and the others are new,
    the first of them `at` ()."""

    bias: Any
    at: jax.Array
    slots: int = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at, k_at):
        position = lambda row: jnp.where(row < self.slots, row, self.at + row - self.slots)
        return self.bias(position(q_at), position(k_at))


def _of_valid(w, b, valid, causal: bool):
    """Directions (S, H) and strengths (S,) with zeros where padding stands."""
    if not causal:
        raise Refused(why_not_one_way(Path))
    return (w, b) if valid is None else (jnp.where(valid[:, None], w, 0), jnp.where(valid, b, 0))


def _blocks(q, k, w, b, first: int):
    """What blocks of C positions come to; q (n, C, H) are the blocks from number `first` on, k, w (M, C, H), b (M, C,
    1).

    Of positions j < i of a block the transformations between are I - sum w_a m_ac w_c^T over j < c <= a <= i, where m
    is the inverse of the triangle I + b tril(w w^T, -1), times b: of any stretch it is a part of the same matrix.

    Returns:
        Scores (n, C, C) within each block; queries (n, C, H) transformed up to its beginning; keys (M, C, H)
        transformed up to its end; the transformation (M, H, H) by the whole block.
    """
    m, later, keys, through = _of_keys(k, w, b)
    reach = jnp.tril(product("mcf,mdf->mcd", q, w[first:])) @ m[first:]
    own = product("mcf,mdf->mcd", q, k[first:]) - reach @ later[first:]
    return own, q - reach @ w[first:], keys, through


def _of_keys(k, w, b):
    """The matrices m and tril(w k^T, -1) of blocks, and the keys and transformations of `_blocks`."""
    below = jnp.tril(product("mcf,mdf->mcd", w, w), -1)
    m = inverse(b * below) * jnp.swapaxes(b, 1, 2)
    later = jnp.tril(product("mcf,mdf->mcd", w, k), -1)
    keys = k - product("mac,maf->mcf", m @ later, w)
    return m, later, keys, jnp.eye(w.shape[2]) - product("maf,mah->mfh", w, m @ w)


def _transformed(kept, k, w, b, *, chunk: int):
    """Keys (R, H) in front of T positions, and those of these positions, k, w (T, H), b (T,), transformed up to the
    last of them."""
    _, _, keys, through = _of_keys(*(in_blocks(x, chunk) for x in (k, w, b[:, None])))

    def back(after, block):
        keys, through = block
        return after @ through, keys @ after.T

    whole, keys = lax.scan(back, jnp.eye(k.shape[1]), (keys, through), reverse=True)
    return kept @ whole.T, joined(keys, len(k))


def _rows(blocks: int, C: int) -> tuple[int, int]:
    """How many rows so many blocks of queries make, and how many blocks each."""
    rows = -(-blocks // max(1, ROWS // C))
    return rows, -(-blocks // rows)


def _portions(rows: int, S: int) -> list[tuple[int, int]]:
    """From which row to which each portion goes."""
    size = -(-rows // PORTIONS) if S >= LONG else rows
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
