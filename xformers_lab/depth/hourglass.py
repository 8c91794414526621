import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._segments import mean_of, runs
from xformers_lab.depth._stack import shared
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Hourglass(Depth):
    """Hourglass: the layers in the middle run on a sequence that is `factor` times shorter (Nawrot et al., 2021, arXiv
    2110.13711).

        x = first layers(x),    y = middle layers(shorten(shift(x))),    last layers(x + upsample(y))

    shorten makes one state of each run of k = factor, their mean or a linear layer of them side by side; upsample gives
    it to all k, or k linear layers of it, one to each. In a decoder shift moves x right by k - 1: run g holds x of k g
    - (k - 1) to k g, and its result goes to k g and after, so that none sees what comes later; an encoder does not
    shift. Padding counts in no run, nor does what is shifted in; a run of padding alone is padding.

    In the middle positions count runs: rotations and added scores are of their distance. What a mechanism hands to the
    layer above ends with each of the three parts. "computation" counts a layer of the middle as 1/k. Decoding runs the
    middle once in k tokens. The paper nests hourglasses, and prefers attention for shortening and upsampling; here are
    one level and the two simpler ways of each, which it has too.

    Options:
        factor: k, how many tokens make one of the middle
        outer: layers before the middle, and as many after; none: a quarter of them each, at least one
        shorten: mean of a run, or a linear layer of its k tokens
        upsample: repeat: the same for the k tokens; linear: k linear layers
    """

    def __init__(
        self,
        size: Size,
        *,
        factor: int = 2,
        outer: int | None = None,
        shorten: Literal["mean", "linear"] = "mean",
        upsample: Literal["repeat", "linear"] = "repeat",
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        outer = max(1, size.layers // 4) if outer is None else outer
        middle = size.layers - 2 * outer
        if outer < 1 or middle < 1:
            raise Refused(
                f"layers={size.layers} are no hourglass: {outer} before, {outer} after and {middle} in the middle, "
                "each at least 1; use at least 3 layers"
            )
        if factor < 2:
            raise Refused(f"factor must be at least 2, got {factor}; use depth=fixed")

        def part(first: int, count: int, length: int | None = None):
            make = lambda index, rngs: make_block(first + index, rngs, length=length)
            return Fixed(dataclasses.replace(size, layers=count), make_block=make, period=period, rngs=rngs)

        self.parts = nnx.List(
            [part(0, outer), part(outer, middle, -(-size.length // factor)), part(outer + middle, outer)]
        )
        self.causal = [*self.parts[0].periods, *self.parts[0].rest][0].causal
        self.factor, self.shorten, self.upsample, self.dim = factor, shorten, upsample, size.dim
        linear = lambda inputs, outputs: Linear(inputs, outputs, dtype=size.dtype, rngs=rngs)
        if shorten == "linear":
            self.down = linear(factor * size.dim, size.dim)
        if upsample == "linear":
            self.up = linear(size.dim, factor * size.dim)

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        B, T, _ = x.shape
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        first, middle, last = self.parts
        x, _, aux = first.run(x, first.initial_carries(B, T, T), context, key=keys[0])
        # A decoder's runs end with the token that they are named after.
        held, inside = runs(x, context.valid, self.factor, self.factor - 1 if self.causal else 0)
        # With nothing padded each run holds something valid: the last of its tokens, or the first.
        valid = None if context.valid is None else inside.any(-1)
        short = dataclasses.replace(context, valid=valid, tokens=None)
        y, G = self.pooled(held, inside), held.shape[1]
        y, _, more = middle.run(y, middle.initial_carries(B, G, G), short, key=keys[1])
        x = x + self.spread(y).reshape(B, G * self.factor, -1)[:, :T]
        x, _, most = last.run(x, last.initial_carries(B, T, T), context, key=keys[2])
        return x, aux + shared(more, self.factor) + most

    def pooled(self, held: jax.Array, valid: jax.Array) -> jax.Array:
        """held (..., k, D) and what is valid of it (..., k) -> (..., D)."""
        if self.shorten == "mean":
            return mean_of(held, valid)
        return self.down(jnp.where(valid[..., None], held, 0).reshape(*held.shape[:-2], -1))

    def spread(self, y: jax.Array) -> jax.Array:
        """(..., D) -> what each of the k tokens of a run gets of it, (..., k, D)."""
        if self.upsample == "linear":
            return self.up(y).reshape(*y.shape[:-1], self.factor, -1)
        return jnp.broadcast_to(y[..., None, :], (*y.shape[:-1], self.factor, y.shape[-1]))

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Caches of the parts; the states below the middle of the last k tokens, and what the last run gave to each of
        its tokens. Samples are the second axis of every leaf."""
        lengths = (length, -(-length // self.factor), length)
        parts = [part.init_cache(B, length) for part, length in zip(self.parts, lengths, strict=True)]
        zeros = jnp.zeros((1, B, self.factor, self.dim), jnp.float32)
        return {"parts": parts, "recent": zeros, "spread": zeros}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        first, _, last = self.parts
        below, between, above = cache["parts"]
        x, below = first.step(x, below, context, at=at)
        recent = jnp.concatenate([cache["recent"][0, :, 1:], x[:, None].astype(jnp.float32)], 1)
        k, (graph, variables) = self.factor, nnx.split(self)

        def run(between, spread):
            depth = nnx.merge(graph, variables)
            valid = jnp.broadcast_to(at - jnp.arange(k - 1, -1, -1) >= 0, recent.shape[:2])
            y = depth.pooled(recent.astype(x.dtype), valid)
            short = dataclasses.replace(context, tokens=None)
            y, between = depth.parts[1].step(y, between, short, at=at // k)
            return between, depth.spread(y).astype(jnp.float32)

        between, spread = lax.cond(at % k == 0, run, lambda *unchanged: unchanged, between, cache["spread"][0])
        x = x + jnp.take(spread, at % k, 1).astype(x.dtype)
        x, above = last.step(x, above, context, at=at)
        return x, {"parts": [below, between, above], "recent": recent[None], "spread": spread[None]}
