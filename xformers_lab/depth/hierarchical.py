import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._segments import Segments
from xformers_lab.depth._stack import shared
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size


class Hierarchical(Depth):
    """Hierarchical transformer: low layers read segments alone, high layers read one state per segment (HIBERT: Zhang,
    Wei and Zhou, 2019, arXiv 1905.06566; as a decoder, with what segments before said).

        h_g = low layers(x_g),    y = high layers(mean h_1, ..., mean h_G),    h_gt + y_g

    x_g are the k = segment tokens of segment g, means are those of its valid tokens. A decoder adds y_(g-1), for y_g
    knows all of its segment. A segment of padding alone is padding. Attention never sees more than k tokens, or T / k
    segments: at k near the root of T its work grows as T^1.5.

    Low layers count positions from the start of their segment, high layers count segments. What a mechanism hands to
    the layer above ends with its level. "computation" counts a high layer as 1/k. Decoding runs the high layers once in
    k tokens. Deviations from the paper: segments have a fixed length, not that of sentences, and their state is the
    mean of their tokens in place of that of a last token; every token gets back the state of its segment.

    Options:
        segment: k, tokens of a segment (none: the root of seq_len)
        low: layers below; the others read segments (none: half of them)
    """

    def __init__(
        self,
        size: Size,
        *,
        segment: int | None = None,
        low: int | None = None,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        low = size.layers // 2 if low is None else low
        if not 1 <= low < size.layers:
            raise Refused(f"low={low} of layers={size.layers}: there must be a layer below and one above")
        self.segments = Segments.of(size, segment)
        lengths = self.segments.size, self.segments.count

        def level(first: int, count: int, length: int):
            make = lambda index, rngs: make_block(first + index, rngs, length=length)
            return Fixed(dataclasses.replace(size, layers=count), make_block=make, period=period, rngs=rngs)

        self.low = level(0, low, lengths[0])
        self.high = level(low, size.layers - low, lengths[1])
        self.causal, self.dim = [*self.low.periods, *self.low.rest][0].causal, size.dim

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        (B, T, _), k = x.shape, self.segments.size
        first, second = (None, None) if key is None else jax.random.split(key)
        rows, inside = self.segments.apart(x, context)
        rows, _, aux = self.low.run(rows, self.low.initial_carries(len(rows), k, k), inside, key=first)
        whole, valid, among = self.segments.joined(rows, inside, context, B)
        count = k if valid is None else jnp.maximum(valid.sum(-1), 1)[..., None]
        means = (whole.sum(2, dtype=jnp.float32) / count).astype(x.dtype)
        G = means.shape[1]
        y, _, more = self.high.run(means, self.high.initial_carries(B, G, G), among, key=second)
        return self.segments.add_states(rows, y, T, self.causal), aux + shared(more, k)

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Of the low layers for one segment, of the high ones for all; the sum of the segment so far, and the state of
        the one before, (1, B, D) each."""
        zeros, k = jnp.zeros((1, B, self.dim), jnp.float32), self.segments.size
        high = self.high.init_cache(B, -(-length // k))
        return {"low": self.low.init_cache(B, k), "high": high, "sum": zeros, "before": zeros}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        k, B = self.segments.size, len(x)
        graph, variables = nnx.split(self)

        def begin(cache):
            """A segment is whole: the high layers read it, and the next begins."""
            depth = nnx.merge(graph, variables)
            mean = (cache["sum"][0] / k).astype(x.dtype)
            y, high = depth.high.step(mean, cache["high"], dataclasses.replace(context, tokens=None), at=at // k - 1)
            low, zeros = depth.low.init_cache(B, k), jnp.zeros_like(cache["sum"])
            return {"low": low, "high": high, "sum": zeros, "before": y[None].astype(jnp.float32)}

        cache = lax.cond((at % k == 0) & (at > 0), begin, lambda cache: cache, cache)
        h, low = self.low.step(x, cache["low"], context, at=at % k)
        out = h + cache["before"][0].astype(h.dtype)
        return out, cache | {"low": low, "sum": cache["sum"] + h.astype(jnp.float32)}
