"""Positions that layers have in turn, such as rotary ones in some and none in the others."""

from collections.abc import Sequence

import jax
from flax import nnx

from xformers_lab import spec
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._each_layer import EachLayer


def build(choice: str, size: Size, *, causal: bool, rngs: nnx.Rngs) -> Position:
    """A position, or of a choice `a+b` the cycle of its parts; raises UsageError."""
    names = spec.split(choice, "+")
    parts = [_part(name, size, causal=causal, rngs=rngs) for name in names]
    return parts[0] if len(parts) == 1 else Cycle(size, parts, names, rngs=rngs)


def _part(name: str, size: Size, *, causal: bool, rngs: nnx.Rngs) -> Position:
    one = spec.build("position", name, size, causal=causal, rngs=rngs)
    return EachLayer(one, name, causal=causal, rngs=rngs) if one.each_layer else one


class Cycle(Position):
    """Layer l has the position of place l modulo their number. None of them marks the tokens, which all layers see."""

    def __init__(self, size: Size, parts: Sequence[Position], names: Sequence[str], *, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        for part, name in zip(parts, names, strict=True):
            if part.embeds:
                raise Refused(
                    f"position={'+'.join(names)}: {name} marks the tokens before the first layer, for all layers; a "
                    "cycle is of positions that layers have of their own, such as rope+none"
                )
        self.parts = nnx.List(parts)

    def of_layer(self, layer: int) -> Position:
        return self.parts[layer % len(self.parts)]

    def drawn(self, key: jax.Array) -> Position:
        copy = nnx.clone(self)
        copy.parts = nnx.List(part.drawn(jax.random.fold_in(key, place)) for place, part in enumerate(self.parts))
        return copy

    def check_documents(self) -> None:
        for part in self.parts:
            part.check_documents()
