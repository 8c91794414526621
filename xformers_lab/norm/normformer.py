import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention import Attention
from xformers_lab.errors import Refused
from xformers_lab.nn.layer_context import LayerContext, apply, takes_context
from xformers_lab.nn.size import Size
from xformers_lab.norm import Norm


class Normformer(Norm):
    """NormFormer: pre-normalisation with three operations more (Shleifer et al., 2021, arXiv 2110.09456).

    x + n2(attention(n1(x))), where head i of the attention is multiplied by a learned g_i, 1 at the start, before the
    output projection; x + down(n3(hidden layer of n1(x))) for the feed-forward; n1 once more at the end of the stack.
    A mechanism whose last step is no linear layer `out` on its heads, and a feed-forward without a linear layer `down`
    after its hidden one, are refused.

    Options:
        normaliser: a file of norm/normaliser
    """

    def __init__(self, size: Size, *, normaliser: str = "layernorm", rngs: nnx.Rngs):
        super().__init__(size, normaliser=normaliser, rngs=rngs)
        self.size, self.normaliser = size, normaliser

    def start(self, layer: Any) -> None:
        """Puts what belongs inside the sub-layer in front of its last projection."""
        attends = isinstance(layer, Attention)
        name = "out" if attends else "down"
        last = getattr(layer, name, None)
        width = self.size.heads * self.size.head
        if not isinstance(last, nnx.Linear) or (attends and last.in_features != width):
            kind = type(layer).__name__.lower()
            raise Refused(f"norm=normformer has no place in {kind}: it has no linear layer `{name}` at its end")
        if attends:
            self.outer = self._built(self.size.dim)
            setattr(layer, name, Scaled(last, self.size.heads))
        else:
            setattr(layer, name, Normalised(last, self._built(last.in_features)))

    def _built(self, width: int) -> nnx.Module:
        size = dataclasses.replace(self.size, dim=width, heads=1, kv_heads=None)
        return spec.build("normaliser", self.normaliser, size, rngs=nnx.Rngs(0))  # none of them draws anything

    def before(self, x: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(x, context)

    def branch(self, y: jax.Array, context: LayerContext) -> jax.Array:
        return apply(self.outer, y, context) if hasattr(self, "outer") else y

    def final(self, x: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(x, context)


class Scaled(nnx.Module):
    """A linear layer on heads (..., N H), each multiplied by a learned number."""

    def __init__(self, linear: nnx.Linear, heads: int):
        self.linear, self.gain = linear, nnx.Param(jnp.ones(heads), decays=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        gain = jnp.repeat(self.gain[...].astype(x.dtype), x.shape[-1] // self.gain.shape[0])
        return self.linear(x * gain.reshape((1,) * (x.ndim - 1) + gain.shape))


class Normalised(nnx.Module):
    """A linear layer on what a normaliser gives."""

    def __init__(self, linear: nnx.Linear, norm: nnx.Module):
        self.linear, self.norm = linear, norm

    def __call__(self, x: jax.Array, context: LayerContext | None = None) -> jax.Array:
        if context is None and takes_context(self.norm):
            raise Refused("the feed-forward layer must run `down` as self.last(hidden, valid=valid, key=key)")
        return self.linear(apply(self.norm, x, context or LayerContext()))
