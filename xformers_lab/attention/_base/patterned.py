"""Base of every mechanism that is softmax attention over a fixed pattern of positions: a pattern is all it adds."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from xformers_lab.attention._base.attention import Cost
from xformers_lab.attention._base.by_kernel import by_kernel
from xformers_lab.attention._base.call import Call
from xformers_lab.attention._base.one_head import OneHead
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.chunks import heads_at_once, largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.pattern import All, Causal, Pattern
from xformers_lab.attention._engine.products import EXACT
from xformers_lab.attention._engine.softmax import masked_softmax
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

LONG = 1024


class Patterned(OneHead):
    """softmax(q k^T / sqrt(H) + bias) v over the keys that `pattern` allows, run by the block-sparse engine.

    A subclass sets `pattern` (without causality, which is added where asked), one for all heads or a tuple of one for
    each, and may set `block`, the size of the engine's blocks of queries and keys where its geometry suggests one.
    """

    keeps_keys: ClassVar[bool] = False
    documents_apart: ClassVar[bool] = True
    adds_pair_values: ClassVar[bool] = True
    block: int | None = None
    # How many of the first positions decoding keeps for good, beside a ring of the newest.
    kept: int = 0
    # Rows of a mechanism's own that stand in front of all positions.
    front: int = 0

    def __init__(self, size: Size, pattern: Pattern | tuple[Pattern, ...], *, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.pattern = pattern

    def of_length(self):
        first = self.pattern[0] if isinstance(self.pattern, tuple) else self.pattern
        return {"random_blocks_of": first.drawn_among} if first.drawn_among else {}

    def seen(self, causal: bool, head: int = 0) -> Pattern:
        pattern = self.pattern[head] if isinstance(self.pattern, tuple) else self.pattern
        if not causal:
            return pattern
        return Causal() if isinstance(pattern, All) else pattern & Causal()

    def all_seen(self, causal: bool) -> list[Pattern]:
        """One pattern for all heads, or that of each."""
        return [self.seen(causal, head) for head in range(len(self.pattern) if isinstance(self.pattern, tuple) else 1)]

    def why_no_kernel(self) -> str | None:
        return None if type(self).attend is Patterned.attend else "its weights are not those of a pattern alone"

    def drawn(self, causal: bool, head: int = 0) -> Callable | None:
        """The pattern, unless its kind says that what a query sees is decided by something else besides."""
        return self.seen(causal, head) if type(self).kind in ("full", "sparse by position") else None

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        """Queries and keys per block of the engine.

        Wide rows make large products; causal rows are narrower, so that less of the triangle is computed in vain. From
        LONG positions on, causal keys come in eighths: 9/16 of the square is computed, at every length.
        """
        if self.block is not None:
            return self.block, self.block
        if causal and S >= LONG:
            eighth = _even(S, -(-S // 8))
            return _even(T, min(256, eighth)), eighth
        most = 128 if causal else 512
        return _even(T, most), _even(S, most)

    def attend_heads(self, call: Call):
        if self.why_no_kernel() is None:
            mean = by_kernel(self, call, self.all_seen(call.causal))
            if mean is not None:
                return self.behind(mean, call), call.carry, Aux()
        if isinstance(self.pattern, tuple):
            return self.behind(self._own_patterns(call), call), call.carry, Aux()
        return super().attend_heads(call)

    def _own_patterns(self, call: Call):
        """(B, T, N, H): heads of one pattern at a time."""
        q, k, v, outputs = call.q, call.k, self.summands(call), []
        heads, times = range(q.shape[2]), q.shape[2] // k.shape[2]
        blocks = self.blocks(q.shape[1], k.shape[1], call.causal)
        for pattern, group in itertools.groupby(heads, lambda head: self.seen(call.causal, head)):
            chosen = np.array(list(group))
            run = functools.partial(dense, pattern=pattern)
            if call.method == "attend":
                run = functools.partial(block_sparse, pattern=pattern, blocks=blocks)

            def one(q, k, v, _, of_sample, of_head, run=run):
                (valid, documents), (bias, pairs) = of_sample, of_head
                return run(q, k, v, valid=valid, documents=documents, bias=bias, pair_values=pairs), None

            keys, values = (x[:, :, chosen // times] for x in (k, v))
            of_head = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], (call.bias, call.pair_values))
            of_sample, plan = (call.valid, call.documents), plan_of(self.size)
            at_once = heads_at_once(plan, pattern, q.shape[1], k.shape[1], blocks) if call.method == "attend" else 1
            how = {"plan": plan, "at_once": at_once}
            outputs.append(over_heads(one, q[:, :, chosen], keys, values, None, of_sample, of_head, **how)[0])
        return jnp.concatenate(outputs, 2)

    def heads_at_once(self, T: int, S: int, causal: bool) -> int:
        return heads_at_once(plan_of(self.size), self.seen(causal), T, S, self.blocks(T, S, causal))

    def key_counts(self, T: int, S: int, valid, documents, causal: bool):
        """Of the pattern, a query at a time: what it sees is not stored for all of them."""
        if isinstance(self.pattern, All):
            return super().key_counts(T, S, valid, documents, causal)
        keys, patterns = jnp.arange(S), self.all_seen(causal)
        there = jnp.ones((1, S), bool) if valid is None else valid

        def of(at):
            known = there
            if documents is not None:
                known = there & (documents == jnp.take(documents, jnp.clip(at, 0), 1)[:, None])
            seen = jnp.stack([pattern(at + self.front, keys + self.front) for pattern in patterns])
            return (seen & known[:, None]).sum(-1)

        return jnp.moveaxis(lax.map(of, jnp.arange(T) + S - T, batch_size=64), 0, 1)

    def next_counts(self, at, count):
        if isinstance(self.pattern, All):
            return super().next_counts(at, count)
        keys, patterns = jnp.arange(self.size.length), self.all_seen(True)

        def of(at, count):
            known = (keys <= at) & (keys > at - count[:, None])
            seen = jnp.stack([pattern(at + self.front, keys + self.front) for pattern in patterns])
            return (seen & known[:, None]).sum(-1)

        return jax.vmap(of, in_axes=(0, 1), out_axes=1)(at, count)

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, pair_values=None):
        blocks = self.blocks(q.shape[0], k.shape[0], causal)
        added: dict[str, Any] = {"valid": valid, "documents": documents, "bias": bias, "pair_values": pair_values}
        return block_sparse(q, k, v, pattern=self.seen(causal), blocks=blocks, **added)

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, pair_values=None):
        added = {"valid": valid, "documents": documents, "bias": bias, "pair_values": pair_values}
        return dense(q, k, v, pattern=self.seen(causal), **added)

    def cost(self, T: int, S: int) -> Cost:
        pairs = live_pairs(self.seen(False), T, S, *self.blocks(T, S, causal=False))
        H = self.size.head
        return Cost(flops=4 * H * pairs, memory=self.largest(T, S), state=2 * self.slots(S) * H)

    def largest(self, T: int, S: int) -> int:
        """Elements of the largest array of one head: a wide row of scores, a batch of narrow ones, or the keys."""
        return largest_array(self.seen(False), T, S, self.size.head, self.blocks(T, S, causal=False))

    def slots(self, length: int) -> int:
        """How many positions decoding must keep of up to `length`: all, unless the pattern is near, and then the first
        `kept` and the newest."""
        return length

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        # Heads before positions: one query then reads its keys in one piece, and XLA:CPU copies nothing for a product.
        rows = jnp.zeros((B, self.size.key_heads, self.slots(length), self.size.head), dtype)
        none = jnp.zeros((), jnp.int32)
        return {"k": rows, "v": rows, "seen": none, "empty": none}

    def begin(self, cache, empty):
        """Patterns lie on places: the empty ones count."""
        if "empty" not in cache:  # a subclass that keeps every key, newest last
            return super().begin(cache, empty)
        return cache | {"seen": cache["seen"] + empty, "empty": empty}, empty

    def decode_heads(self, cache, call: Call):
        """The first `kept` positions have a slot each, then comes a ring: slot s of R holds the newest position that is
        s modulo R, so that a pattern that is tied to absolute positions (a grid, say) decodes alike."""
        cache, at, positions, seen = self.remembered(cache, call)
        more = {} if call.pair_values is None else {"pair_values": call.pair_values}
        out = self.attend_cached(call.q, cache["k"], cache["v"], at, positions, seen, call.bias, **more)
        return self.finish(out[:, None], call.as_row())[:, 0], cache, call.carry

    def remembered(self, cache, call: Call):
        """The cache with one token more, its position (), those of all slots (R,), and what it sees of them (N, R)."""
        at = cache["seen"]
        pairs = (("k", call.k), ("v", self.summed(call.v)))
        held = {name: _written(cache[name], new[:, :, None], self._slot(at, cache)) for name, new in pairs}
        positions, filled = self._held(at, cache)
        return cache | held | {"seen": at + 1}, at, positions, self._seen_by(at, positions) & filled

    def decode_heads_several(self, cache, call: Call):
        return self.read_several(cache, call)

    def read_several(self, cache, call: Call, added=None):
        """New queries look at what the slots hold and at new keys, which then go where they belong; where every
        position has a slot, they go there first, and scores of slots may have something `added` (B, T, N, R)."""
        at, T, R = cache["seen"], call.q.shape[1], cache["k"].shape[2]
        new = at + jnp.arange(T)
        pairs = {name: jnp.swapaxes(rows, 1, 2) for name, rows in (("k", call.k), ("v", self.summed(call.v)))}
        if self.slots(R + 1) > R:
            held = {name: _written(cache[name], rows, self._slot(at, cache)) for name, rows in pairs.items()}
            positions, filled = self._held(at + T - 1, cache)
            keys, values = held["k"], held["v"]
        else:
            positions, filled = self._held(at - 1, cache)
            positions, filled = jnp.concatenate([positions, new]), jnp.concatenate([filled, jnp.ones(T, bool)])
            keys, values = (jnp.concatenate([cache[name], rows], 2) for name, rows in pairs.items())
            # Of several that share a slot the newest stays.
            stays = (new < self.kept) | (new >= at + T - self._ring_of(R))
            slot = jnp.where(stays, self._slot(new, cache), R)
            held = {name: cache[name].at[:, :, slot].set(rows, mode="drop") for name, rows in pairs.items()}

        def one(q, at, added):
            seen = self._seen_by(at, positions) & filled
            more = {"added": added, "pair_values": call.pair_values}
            more = {name: leaves for name, leaves in more.items() if leaves is not None}
            return self.attend_cached(q, keys, values, at, positions, seen, call.bias, **more)

        out = jax.vmap(one, in_axes=(1, 0, 1), out_axes=1)(call.q, new, added)
        return self.finish(out, call), cache | held | {"seen": at + T}

    def rewound(self, before, after, taken, *, read: int):
        """Slots that later tokens wrote hold again what they held before."""
        slots = before.keys() == {"k", "v", "seen", "empty"} and self.convs is None
        if not slots or read > self._ring_of(before["k"].shape[2]):
            return super().rewound(before, after, taken, read=read)
        late = self._held(after["seen"] - 1, after)[0] >= before["seen"] + taken
        held = {name: jnp.where(late[:, None], before[name], after[name]) for name in ("k", "v")}
        return after | held | {"seen": before["seen"] + taken}

    def _ring_of(self, slots: int) -> int:
        return max(slots - self.kept, 1)

    def _slot(self, at, cache):
        """Where what stands at a position is kept."""
        ring = self._ring_of(cache["k"].shape[2])
        return jnp.where(at < self.kept, at, self.kept + (at - self.kept) % ring)

    def _held(self, newest, cache):
        """The positions (R,) that the slots hold when the last one is `newest` (), and which of them hold one."""
        slots = jnp.arange(cache["k"].shape[2])
        first = slots < self.kept
        positions = jnp.where(first, slots, newest - (newest - slots) % self._ring_of(len(slots)))
        filled = (positions <= newest) & (first | (positions >= self.kept))
        return positions, filled & ((positions >= self.front + cache["empty"]) | (slots < self.front))

    def _seen_by(self, at, positions):
        """(N, R): what each head's pattern lets a query at position `at` () see."""
        return jnp.stack([self.seen(True, head)(at, positions) for head in range(self.size.heads)])

    def attend_cached(self, q, keys, values, at, positions, seen, bias, added=None, pair_values=None):
        """(B, N, H): one query of each head, standing `at`, on rows (B, K, R, H) of `positions` (R,) that are `seen`
        (N, R). added (B, N, R): what is added to scores besides, where a mechanism says more of them."""
        (B, N, H), K = q.shape, self.size.key_heads
        by_group = lambda x: x.reshape(B, K, N // K, -1)
        s = jnp.einsum("bkgh,bkrh->bkgr", by_group(q * H**-0.5), keys, **EXACT).reshape(B, N, -1)
        s = s if added is None else s + added
        s = s if bias is None else s + jax.vmap(lambda of_head: of_head(at[None, None], positions[None])[0])(bias)
        weights = masked_softmax(s, seen)
        p = by_group(weights.astype(values.dtype))
        out = jnp.einsum("bkgr,bkrh->bkgh", p, values, **EXACT)
        if pair_values is not None:
            summed = lambda of_head, p: of_head(p, at[None, None], positions[None])
            out = out + by_group(jax.vmap(summed, in_axes=(0, 1), out_axes=1)(pair_values, weights))
        return out.astype(values.dtype).reshape(q.shape)


def _written(rows, new, slot):
    """Rows (B, K, R, H) with new ones (B, K, T, H) from a slot () on, in their place where a program may."""
    return lax.dynamic_update_slice_in_dim(rows, new.astype(rows.dtype), slot, 2)


def near_block(width: int, causal: bool) -> int:
    """Blocks for a band that is `width` wide on each side, causal: on one; 16 to 128.

    Of that width, or half of it where a row has one side alone: finer ones waste less of the band, coarser ones loop
    less.
    """
    share = width / 2 if causal else width
    return min(128, max(16, 8 * math.ceil(share / 8)))


def run_block(size: int) -> int:
    """Blocks for runs of `size` positions: one run, several short ones, or equal shares of a long one."""
    return size * -(-32 // size) if size < 32 else -(-size // -(-size // 512))


def _even(length: int, most: int) -> int:
    """The size of the fewest equal blocks of at most `most` positions that cover `length`, a multiple of eight."""
    blocks = -(-length // most)
    return -(-length // (8 * blocks)) * 8
