import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._segments import Segments
from xformers_lab.depth._stack import shared
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.embedding import ADDED, START
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Hierarchical(Depth):
    """Hierarchical transformer: low layers read segments alone, high layers read one state per segment (HIBERT: Zhang,
    Wei and Zhou, 2019, arXiv 1905.06566; as a decoder, with what segments before said).

        h_g = low layers(x_g),    y = high layers(mean h_1, ..., mean h_G),    h_gt + y_g

    x_g are the k = segment tokens of segment g, means are those of its valid tokens. A decoder adds y_(g-1), for y_g
    knows all of its segment. A segment of padding alone is padding. Attention never sees more than k tokens, or T / k
    segments: at k near the root of T its work grows as T^1.5.

    Hi-Transformer (Wu et al., 2021, arXiv 2106.01040) is top=N:back=token:pool=attention:numbered=true: the state of
    its segment stands in front of the tokens, and `top` layers more read both, each segment alone:

        [., out_g] = top layers([y_g, h_g1, ..., h_gk])

    pool=attention has the state of a segment be that of hierarchical attention networks (Yang et al., 2016):

        sum_t a_t h_gt,    a = softmax_t(u . tanh(W h_gt + b))

    Low and top layers count positions from the start of their segment, high layers count segments. What a mechanism
    hands to the layer above ends with its level. "computation" counts a high layer as 1/k. Decoding runs the high
    layers once in k tokens. Deviations from the papers: segments have a fixed length, not that of sentences; their
    state is the mean of their tokens, or pool=attention, in place of that of a last token; every token gets back the
    state of its segment, and a sequence's answer is pooled from tokens, not from segments; Hi-Transformer puts the
    state behind the tokens, where a decoder would not see it.

    Options:
        segment: k, tokens of a segment (none: the root of seq_len)
        low: layers below; the others read segments (none: half of them)
        top: layers above, which read tokens again
        back: how tokens get the state of their segment: add, or token, one more token for the top layers to look at
        pool: the state of a segment: the mean of its tokens, or attention, weighted by what they hold
        numbered: whether a learned vector of each segment's number is added to its state, for positions that are added
            to embeddings say nothing about segments
    """

    later_options: ClassVar = ("top", "back", "pool", "numbered")

    def __init__(
        self,
        size: Size,
        *,
        segment: int | None = None,
        low: int | None = None,
        top: int = 0,
        back: Literal["add", "token"] = "add",
        pool: Literal["mean", "attention"] = "mean",
        numbered: bool = False,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        low = (size.layers - top) // 2 if low is None else low
        if top < 0 or (back == "token" and not top):
            raise Refused(f"top={top}: layers above, and back=token needs one that looks at the token")
        high = size.layers - low - top
        if low < 1 or high < 1:
            above = f" and top={top}" if top else ""
            raise Refused(f"low={low}{above} of layers={size.layers}: there must be a layer below and one above")
        self.segments = Segments.of(size, segment)
        k, G = self.segments.size, self.segments.count

        def level(first: int, count: int, length: int):
            make = lambda index, rngs: make_block(first + index, rngs, length=length)
            return Fixed(dataclasses.replace(size, layers=count), make_block=make, period=period, rngs=rngs)

        self.low, self.high = level(0, low, k), level(low, high, G)
        self.causal, self.dim = [*self.low.periods, *self.low.rest][0].causal, size.dim
        self.more = int(back == "token")
        self.top = level(low + high, top, k + self.more) if top else None
        self.pool = Pool(size, rngs=rngs) if pool == "attention" else None
        start = START * jax.random.normal(rngs.params(), (G, size.dim)) if numbered else None
        self.table = nnx.Param(start, decays=False) if numbered else None

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        (B, T, _), k = x.shape, self.segments.size
        first, second = (None, None) if key is None else jax.random.split(key)
        rows, inside = self.segments.apart(x, context)
        rows, _, aux = self.low.run(rows, self.low.initial_carries(len(rows), k, k), inside, key=first)
        whole, valid, among = self.segments.joined(rows, inside, context, B)
        states = self._states(whole, valid).astype(x.dtype)
        G = states.shape[1]
        if self.table is not None:
            states = states + self._numbers(jnp.arange(G), x.dtype)
        y, _, more = self.high.run(states, self.high.initial_carries(B, G, G), among, key=second)
        aux = aux + shared(more, k)
        if self.top is None:
            return self.segments.add_states(rows, y, T, self.causal), aux
        if not self.more:
            rows = self.segments.add_states(rows, y, G * k, self.causal).reshape(rows.shape)
        else:
            rows = jnp.concatenate([self._of_segment(y).reshape(B * G, 1, -1), rows], 1)
            seen = None if inside.valid is None else jnp.pad(inside.valid, ((0, 0), (1, 0)), constant_values=True)
            inside = dataclasses.replace(inside, valid=seen, tokens=None)
        carries, third = self.top.initial_carries(len(rows), *[rows.shape[1]] * 2), None
        if key is not None:
            third = jax.random.fold_in(key, 1)
        rows, _, more = self.top.run(rows, carries, inside, key=third)
        return rows[:, self.more :].reshape(B, G * k, -1)[:, :T], aux + more

    def _states(self, whole: jax.Array, valid: jax.Array | None) -> jax.Array:
        """One state of each segment, (B, G, k, D) of which valid (B, G, k) count, zeros elsewhere -> (B, G, D)."""
        if self.pool is not None:
            return self.pool(whole, valid)
        count = self.segments.size if valid is None else jnp.maximum(valid.sum(-1), 1)[..., None]
        return whole.sum(2, dtype=jnp.float32) / count

    def _numbers(self, numbers: jax.Array, dtype: Any) -> jax.Array:
        """What is added to the states of segments by their numbers."""
        assert self.table is not None
        return (self.table[...][numbers] * (ADDED / START)).astype(dtype)

    def _of_segment(self, y: jax.Array) -> jax.Array:
        """The state that a segment's tokens are given, of (B, G, D): causally that of the segment before."""
        return jnp.concatenate([jnp.zeros_like(y[:, :1]), y[:, :-1]], 1) if self.causal else y

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Of the low and top layers for one segment, of the high ones for all; what is gathered of the segment so far,
        and the state of the one before, (1, B, D)."""
        zeros, k = jnp.zeros((1, B, self.dim), jnp.float32), self.segments.size
        cache = {"low": self.low.init_cache(B, k), "high": self.high.init_cache(B, -(-length // k)), "sum": zeros}
        cache |= {} if self.pool is None else self.pool.nothing(B)
        cache |= {} if self.top is None else {"top": self.top.init_cache(B, k + self.more)}
        return cache | {"before": zeros}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        k, B = self.segments.size, len(x)
        graph, variables = nnx.split(self)
        of_segment = dataclasses.replace(context, tokens=None)

        def begin(cache):
            """A segment is whole: the high layers read it, and the next begins."""
            depth = nnx.merge(graph, variables)
            state = (cache["sum"][0] / (k if depth.pool is None else cache["weight"][0])).astype(x.dtype)
            if depth.table is not None:
                state = state + depth._numbers(at // k - 1, x.dtype)
            y, high = depth.high.step(state, cache["high"], of_segment, at=at // k - 1)
            low, zeros = depth.low.init_cache(B, k), jnp.zeros_like(cache["sum"])
            new = {"low": low, "high": high, "sum": zeros, "before": y[None].astype(jnp.float32)}
            return cache | new | ({} if depth.pool is None else depth.pool.nothing(B))

        def begin_top(cache):
            depth = nnx.merge(graph, variables)
            assert depth.top is not None
            top = depth.top.init_cache(B, k + depth.more)
            if depth.more:
                top = depth.top.step(cache["before"][0].astype(x.dtype), top, of_segment, at=jnp.zeros((), jnp.int32))[
                    1
                ]
            return cache | {"top": top}

        cache = lax.cond((at % k == 0) & (at > 0), begin, lambda cache: cache, cache)
        h, low = self.low.step(x, cache["low"], context, at=at % k)
        cache = cache | {"low": low} | self._gathered(cache, h)
        out = h if self.more else h + cache["before"][0].astype(h.dtype)
        if self.top is None:
            return out, cache
        cache = lax.cond(at % k == 0, begin_top, lambda cache: cache, cache)
        context = of_segment if self.more else context
        out, top = self.top.step(out, cache["top"], context, at=at % k + self.more)
        return out, cache | {"top": top}

    def _gathered(self, cache: dict[str, Any], h: jax.Array) -> dict[str, jax.Array]:
        """What the cache holds of a segment with one more token (B, D)."""
        if self.pool is not None:
            return self.pool.step(cache, h)
        return {"sum": cache["sum"] + h.astype(jnp.float32)}


class Pool(nnx.Module):
    """The states of k tokens as one: their mean by weights softmax(u . tanh(W h + b))."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.hidden = Linear(size.dim, size.dim, dtype=size.dtype, rngs=rngs)
        self.asks = nnx.Param(size.dim**-0.5 * jax.random.normal(rngs.params(), (size.dim,)), decays=False)

    def _scores(self, h: jax.Array) -> jax.Array:
        return jnp.tanh(self.hidden(h).astype(jnp.float32)) @ self.asks[...]

    def __call__(self, h: jax.Array, valid: jax.Array | None) -> jax.Array:
        """(..., k, D), of which valid (..., k) count, zeros elsewhere -> (..., D) in float32."""
        scores = self._scores(h)
        share = jax.nn.softmax(scores if valid is None else jnp.where(valid, scores, MASKED), -1)
        return jnp.einsum("...k,...kd->...d", share, h.astype(jnp.float32))

    def nothing(self, B: int) -> dict[str, jax.Array]:
        """The largest score of no tokens, and the sum of their weights, (1, B, 1)."""
        return {"most": jnp.full((1, B, 1), MASKED, jnp.float32), "weight": jnp.zeros((1, B, 1), jnp.float32)}

    def step(self, cache: dict[str, Any], h: jax.Array) -> dict[str, jax.Array]:
        """`sum`, `weight` and `most` with one more token (B, D): weights are by the largest score so far."""
        score = self._scores(h)[None, :, None]
        most = jnp.maximum(cache["most"], score)
        kept, new = jnp.exp(cache["most"] - most), jnp.exp(score - most)
        return {"sum": kept * cache["sum"] + new * h, "weight": kept * cache["weight"] + new, "most": most}
