"""The shelf of residual placements: where the residual branch and its normaliser sit. One file = one `Norm`.

Around a sub-layer f the lab computes `after(x, f(before(x, context)), context)`; each sub-layer has its own placement,
which may change the sub-layer before it first runs (`start(f)`). One that wants smaller first weights says how much,
`f.scale_init(share)`, and leaves to the sub-layer which those are (see ffn/__init__.py). A placement that defines
`final(x, context)` gets one more instance of itself for the end of the stack, which has no sub-layer and is not
started. One that defines `after` declares `adds = False`, for a depth may have to take back what a sub-layer added.
`context` says which rows of x are valid and whether this is training; a placement hands it on to its normalisers, a
shelf of their own: `self.normalise(x, context)`, or `apply(normaliser, x, context)` of nn/layer_context.py for one
more. A `size` knows the depth of the stack, and that of the other side of an encoder-decoder.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab import spec
from xformers_lab.nn.layer_context import LayerContext, apply, takes_context
from xformers_lab.nn.size import Size


class Norm(nnx.Module):
    """A placement with one normaliser. adds: whether `after(x, y, context)` is x + branch(y, context), so that it can
    be taken back; final: None, or a method final(x, context) for what leaves the stack.

    streams: how many residual streams of D channels stand side by side in x, (..., streams D), alike at the start; with
    several of them `before` makes one of them for the sub-layer, and `final` for the head.

    Options:
        normaliser: a file of norm/normaliser
    """

    adds: ClassVar[bool] = True
    final: Any = None
    streams: int = 1

    def __init__(self, size: Size, *, normaliser: str = "layernorm", rngs: nnx.Rngs):
        self.norm = spec.build("normaliser", normaliser, size, rngs=rngs)

    @property
    def documents_apart(self) -> bool:
        """Whether a row's output depends on no other row, for packed documents: a normaliser that names `context` asks
        which rows there are, and looks at all of them."""
        return not any(takes_context(part) for part in vars(self).values() if isinstance(part, nnx.Module))

    def widened(self, x: jax.Array) -> jax.Array:
        """States (..., D) as the residual streams that the first layer is given."""
        return x if self.streams == 1 else jnp.concatenate([x] * self.streams, -1)

    def start(self, layer: Any) -> None:
        """Change the sub-layer that it is placed around, or its first parameters, where the paper asks for it."""

    def normalise(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """The placement's normaliser on x (..., D)."""
        return apply(self.norm, x, context)

    def before(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """The input of the sub-layer, from the residual stream x (B, T, D), in decoding (B, D)."""
        return x

    def branch(self, y: jax.Array, context: LayerContext) -> jax.Array:
        """What is added to the residual stream where the sub-layer gave y, shaped like x."""
        return y

    def after(self, x: jax.Array, y: jax.Array, context: LayerContext) -> jax.Array:
        """The residual stream after the sub-layer gave y. A placement that only adds to x defines `branch` instead."""
        return x + self.branch(y, context)
