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
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

Pair = tuple[jax.Array, jax.Array]  # states of tokens and of segments


class Tnt(Depth):
    """Transformer in transformer: in every layer an inner block reads each segment alone, and an outer block reads the
    segments (Han et al., 2021, arXiv 2103.00112, equations 2 to 6).

        y_g = inner(y_g),    z = outer(z + W [y_g1; ...; y_gk]),    at the end y_gt + z_g

    y are tokens (B, G, k, D), k = segment, at first the embeddings; z are segments (B, G, D), at first 0; W is a linear
    layer of its own in every layer. Padding counts as zeros in W, a segment of padding alone is padding. A decoder adds
    z_(g-1) at the end, for z_g knows all of its segment; in its outer blocks a segment sees those before it and itself.

    Inner blocks count positions from the start of their segment, outer ones count segments. "computation" counts an
    outer block as 1/k. Decoding runs the outer blocks once in k tokens. Deviations from the paper: inner and outer
    states are equally wide; a token gets its segment's state at the end, where the paper reads a class token alone.

    Options:
        segment: k, tokens of a segment (none: the root of seq_len)
    """

    def __init__(self, size: Size, *, segment: int | None = None, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        self.segments = Segments.of(size, segment)
        k, G = self.segments.size, self.segments.count

        def nested(index: int, rngs: nnx.Rngs):
            inner, outer = (make_block(index, rngs, length=length) for length in (k, G))
            return Nested(size, inner, outer, k, rngs=rngs)

        self.layers = Fixed(size, make_block=nested, period=period, rngs=rngs)
        self.causal, self.dim = [*self.layers.periods, *self.layers.rest][0].inner.causal, size.dim

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        B, T, D = x.shape
        y, inside = self.segments.apart(x, context)
        segments = self.segments
        z = jnp.zeros((B, len(y) // B, D), x.dtype)
        vectors = lambda y: segments.joined(y, inside, context, B)[0].reshape(*z.shape[:2], -1)
        among = segments.joined(y, inside, context, B)[2]
        (y, z), _, aux = self.layers.run((y, z), {}, (inside, among, vectors), key=key)
        return segments.add_states(y, z, T, self.causal), aux

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Of every layer, and the state of the segment before (1, B, D)."""
        return {"layers": self.layers.init_cache(B, length), "before": jnp.zeros((1, B, self.dim), jnp.float32)}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        layers, before = cache["layers"], cache["before"][0]
        pair = (x, jnp.zeros_like(x))
        (y, z), stack, _ = self.layers.run_step(pair, layers["layers"], layers["below"], context, at=at)
        last = at % self.segments.size == self.segments.size - 1
        state = jnp.where(last, z.astype(jnp.float32), before)[None]
        return y + before.astype(y.dtype), {"layers": layers | {"layers": stack}, "before": state}


class Nested(nnx.Module):
    """A block in a block: what `Fixed` takes as one layer of pairs (y, z)."""

    def __init__(self, size: Size, inner: Any, outer: Any, segment: int, *, rngs: nnx.Rngs):
        if jax.eval_shape(lambda: inner.initial_carries(1, size.length, size.length)):
            raise Refused(
                f"attention={inner.name} hands something to the layer above, which here sees tokens and segments in "
                "turn; use another attention"
            )
        self.inner, self.outer, self.segment, self.dim = inner, outer, segment, size.dim
        self.join = Linear(segment * size.dim, size.dim, dtype=size.dtype, rngs=rngs)

    def __call__(
        self, x: Pair, carries: dict[str, Any], context: Any, *, key: jax.Array | None = None
    ) -> tuple[Pair, dict[str, Any], Aux]:
        (y, z), (inside, among, vectors) = x, context
        first, second = (None, None) if key is None else jax.random.split(key)
        y, _, aux = self.inner(y, {}, inside, key=first)
        z, _, more = self.outer(z + self.join(vectors(y)), {}, among, key=second)
        return (y, z), carries, (computation(1) | aux) + shared(computation(1) | more, self.segment)

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return {}

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        k = self.segment
        rows = jnp.zeros((B, k, self.dim), jnp.float32)
        return {"inner": self.inner.init_cache(B, k), "outer": self.outer.init_cache(B, -(-length // k)), "rows": rows}

    def step(
        self, x: Pair, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[Pair, Any, dict[str, Any]]:
        (y, z), k = x, self.segment
        graph, variables = nnx.split(self)
        fresh = lambda _: nnx.merge(graph, variables).inner.init_cache(len(y), k)
        inner = lax.cond(at % k == 0, fresh, lambda inner: inner, cache["inner"])
        y, inner, _ = self.inner.step(y, inner, {}, context, at % k)
        rows = lax.dynamic_update_index_in_dim(cache["rows"], y.astype(jnp.float32), at % k, 1)

        def whole(z, outer):
            """The segment's last token: its vector is complete."""
            block = nnx.merge(graph, variables)
            joined = block.join(rows.astype(z.dtype).reshape(len(z), -1))
            z, outer, _ = block.outer.step(z + joined, outer, {}, dataclasses.replace(context, tokens=None), at // k)
            return z, outer

        z, outer = lax.cond(at % k == k - 1, whole, lambda *unchanged: unchanged, z, cache["outer"])
        return (y, z), {"inner": inner, "outer": outer, "rows": rows}, carries
