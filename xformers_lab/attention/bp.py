import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost, Stepwise
from xformers_lab.attention._engine.softmax import softmax_average
from xformers_lab.attention._engine.spans import sees, windows
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


def _pyramid(k, v, valid, levels: int):
    """For each level the means of keys and values (spans, 2 H), and which spans hold a position that is no padding
    (None: all do)."""
    S = k.shape[0]
    sums, counts = jnp.concatenate([k, v], 1).astype(jnp.float32), jnp.ones(S) if valid is None else valid
    sums, counts, spans = jnp.where(counts[:, None] > 0, sums, 0), counts.astype(jnp.float32), []
    for _ in range(levels):
        means = sums / jnp.maximum(counts, 1)[:, None]
        spans.append((means.astype(k.dtype), None if valid is None else counts > 0))
        halves = lambda x: jnp.pad(x, [(0, len(x) % 2)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, 2, *x.shape[1:])
        sums, counts = halves(sums).sum(1), halves(counts).sum(1)
    return spans


def _graph(nodes: int, T: int, S: int, causal: bool):
    """The paper's construction, edge by edge: which positions (spans, S) a span holds, which spans (T, spans) a query
    sees."""
    levels = S.bit_length() + 1
    offsets = np.cumsum([0] + [(S + (1 << level) - 1) >> level for level in range(levels)])
    number = lambda level, index: offsets[level] + index if 0 <= index < offsets[level + 1] - offsets[level] else None
    members, edges = np.zeros((offsets[-1], S), bool), np.zeros((T, offsets[-1]), bool)
    for level in range(levels):
        for index in range(offsets[level + 1] - offsets[level]):
            members[offsets[level] + index, index << level : (index + 1) << level] = True
    for t in range(T):
        at = S - T + t
        reached = [number(0, at)]
        for way in (-1,) if causal else (-1, 1):
            pointer, half = at + way, None
            for level in range(levels):
                for step in range(nodes):
                    # The first span of a level may lie half in what the level below has covered: its other half then.
                    reached.append(number(level, pointer) if half is None or step else number(level - 1, half))
                    pointer += way
                half = pointer if pointer % 2 == (way > 0) else None
                pointer >>= 1
        edges[t, [node for node in reached if node is not None]] = True
    return members, edges


class Bp(Stepwise):
    """BP-Transformer: spans of a binary partition, coarser with distance (Ye et al., 2019, arXiv 1911.04070).

    out_t = sum_u softmax_u(q_t . k_u / sqrt(H)) v_u over the token itself and spans u that tile all other positions:
    going away from t on either side, k spans of 1 position, then k of 2, of 4 and so on; k_u and v_u are means over a
    span.

    Causal: only spans that end before t. A drawing shows a span as its last position.
    Deviations from the paper: span nodes have no state of their own that is updated from layer to layer, as they have
    in depth=binary_partition; a span is the mean of the keys and values of its positions that are no padding.

    Options:
        nodes: spans of each size on each side, k in the paper
    """

    kind = "sparse by position"
    exact = True
    accuracy = "for its spans"
    complexity = Complexity(
        time="O(T k log(T / k) H)",
        memory="O(T (k log T + H))",
        decoding="2 k + 2 sums of keys and values for each power of 2",
    )
    refuses: ClassVar = {"bias": "a span of several positions has no one position"}

    def __init__(self, size: Size, *, nodes: int = 4, rngs: nnx.Rngs):
        if nodes < 1:
            raise Refused(f"nodes must be at least 1, got {nodes}")
        super().__init__(size, rngs=rngs)
        self.nodes = nodes

    def drawn(self, causal: bool, head: int = 0):
        """A span that a query sees, at its last position, on either side."""

        def seen(q, k):
            seen = k == q
            for level in range(self.size.length.bit_length() + 1):
                ends = ((k + 1) % (1 << level) == 0) | (k == self.size.length - 1)
                seen |= ends & sees(self.nodes, q, k >> level, level, right=not causal)
            return seen

        return seen

    def attend(self, q, k, v, *, valid=None, causal):
        return jax.checkpoint(functools.partial(self._blocks, causal=causal))(q, k, v, valid)

    def _blocks(self, q, k, v, valid, *, causal: bool):
        T, S, H = q.shape[0], k.shape[0], q.shape[1]
        block, shared = windows(self.nodes, T, S, causal)
        at = (jnp.arange(T + -T % block) + S - T).reshape(-1, block, 1)
        levels = _pyramid(k, v, valid, 1 + max(window.level for window in shared))
        slabs, seen = [], []
        for window in shared:
            spans, filled = levels[window.level]
            take = lambda x, window=window: jax.vmap(lambda s: lax.dynamic_slice_in_dim(x, s, window.width))(
                window.starts
            )
            slabs.append(take(spans))
            index = (window.starts[:, None] + np.arange(window.width))[:, None]
            live = sees(self.nodes, at, index, window.level, left=window.left, right=window.right)
            seen.append(live if filled is None else live & take(filled)[:, None])
        slab, seen = jnp.concatenate(slabs, 1), jnp.concatenate(seen, 2)
        scaled = jnp.pad(q * H**-0.5, ((0, -T % block), (0, 0))).reshape(-1, block, H).astype(q.dtype)
        s = jnp.einsum("bqh,bkh->bqk", scaled, slab[..., :H], preferred_element_type=jnp.float32)
        return jax.vmap(softmax_average)(s, seen, slab[..., H:]).reshape(-1, v.shape[1])[:T]

    def reference(self, q, k, v, *, valid=None, causal):
        T, S = q.shape[0], k.shape[0]
        members, edges = _graph(self.nodes, T, S, causal)
        members = jnp.asarray(members) if valid is None else members & valid[None]
        share = members / jnp.maximum(members.sum(1, keepdims=True), 1)
        keys, values = share @ k, share @ v
        s, seen = q * q.shape[1] ** -0.5 @ keys.T, edges & members.any(1)[None]
        return softmax_average(s, seen, values).astype(v.dtype)

    @staticmethod
    def limit(length: int):
        return {"nodes": length}

    def cost(self, T: int, S: int) -> Cost:
        H, (block, shared) = self.size.head, windows(self.nodes, T, S, False)
        width, blocks = sum(window.width for window in shared), -(-T // block)
        state = 2 * S.bit_length() * (2 * self.nodes + 2) * H
        return Cost(flops=4 * T * width * H, memory=blocks * width * max(block, 2 * H), state=state)

    on_places = "its spans go"

    def init_state(self, length: int, dtype=jnp.float32):
        sums = jnp.zeros((length.bit_length(), 2 * self.nodes + 2, self.size.head), jnp.float32)
        return {"k": sums, "v": sums, "seen": jnp.zeros((), jnp.int32)}

    def step(self, state, q, k, v):
        """Each level has a ring of spans, the newest of them growing; a query sees those that are complete."""
        at, (levels, R, H) = state["seen"], state["k"].shape
        level = jnp.arange(levels)
        newest = at >> level
        fresh = (at == newest << level)[:, None]

        def add(sums, new):
            slot = sums[level, newest % R]
            return sums.at[level, newest % R].set(jnp.where(fresh, 0, slot) + new / (1 << level)[:, None])

        keys, values = add(state["k"], k), add(state["v"], v)
        index = newest[:, None] - (newest[:, None] - jnp.arange(R)) % R
        seen = sees(self.nodes, at, index, level[:, None]) & (index >= 0)
        s = jnp.dot(q * H**-0.5, keys.reshape(-1, H).T, preferred_element_type=jnp.float32)
        out = softmax_average(s, seen.reshape(-1), values.reshape(-1, H)).astype(v.dtype)
        return out, {"k": keys, "v": values, "seen": at + 1}
