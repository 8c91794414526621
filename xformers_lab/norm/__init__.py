"""The shelf of residual placements: where the residual branch and its normaliser sit. One file = one `Norm`.

Around a sub-layer f the lab computes `after(x, f(before(x, rows)), rows)`; each sub-layer has its own placement, which
may change the sub-layer before it first runs (`start(f)`). One that asks for smaller first weights says how much,
`f.scale_init(share)`, and leaves to the sub-layer which those are (see ffn/__init__.py). A placement that defines
`final(x, rows)` gets one more instance of itself for the end of the stack, which has no sub-layer and is not started.
`rows` says which rows of x are valid and whether this is training; a placement hands it on to its normalisers, a shelf
of their own: `self.normalise(x, rows)`, or `apply(normaliser, x, rows)` of rows.py for one more. A `size` knows the
depth of the stack, and that of the other side of an encoder-decoder.
"""

from typing import ClassVar

from flax import nnx

from xformers_lab import spec
from xformers_lab.nn.layer_context import LayerContext, apply
from xformers_lab.nn.size import Size


class Norm(nnx.Module):
    """A placement with one normaliser.

    Options:
        normaliser: a file of norm/normaliser
    """

    final: ClassVar = None

    def __init__(self, size: Size, *, normaliser: str = "layernorm", rngs: nnx.Rngs):
        self.norm = spec.build("normaliser", normaliser, size, rngs=rngs)

    def start(self, layer) -> None:
        """Change the sub-layer that it is placed around, or its first parameters, where the paper asks for it."""

    def normalise(self, x, rows: LayerContext):
        """The placement's normaliser on x."""
        return apply(self.norm, x, rows)

    def before(self, x, rows: LayerContext):
        """The input of the sub-layer, from the residual stream x (B, T, D), in decoding (B, D)."""
        return x

    def branch(self, y, rows: LayerContext):
        """What is added to the residual stream where the sub-layer gave y."""
        return y

    def after(self, x, y, rows: LayerContext):
        """The residual stream after the sub-layer gave y. A placement that only adds to x defines `branch` instead."""
        return x + self.branch(y, rows)

    @classmethod
    def adds(cls) -> bool:
        """Whether `after(x, y)` is x + branch(y), so that it can be taken back."""
        return cls.after is Norm.after
