"""A position that every layer has one of, with parameters of its own."""

from flax import nnx

from xformers_lab import spec
from xformers_lab.errors import Refused
from xformers_lab.position import Position


class EachLayer(Position):
    """In a model's place for its position: what a layer may ask before it has its own, and how its block builds that.

    The layers of a stack are copies of one program, so their parameters lie in blocks, and those of positions too.

    one: a position as layers have it; choice: what it was built from.
    """

    each_layer = True

    def __init__(self, one: Position, choice: str, *, causal: bool, rngs: nnx.Rngs):
        super().__init__(one.size, rngs=rngs)
        self.choice, self.causal, self.mixing = choice, causal, None
        if one.embeds or one.before:
            raise Refused(f"position={choice} marks the tokens before the first layer, so no layer has one of its own")
        self.turns, self.share, self.key_terms = one.turns, one.share, one.key_terms
        self.adds_to_values = one.adds_to_values
        try:
            one.check_documents()
        except Refused as reason:
            self.mixing = str(reason)

    def own(self, rngs: nnx.Rngs) -> Position:
        """That of one more layer."""
        return spec.build("position", self.choice, self.size, causal=self.causal, rngs=rngs)

    def check_documents(self) -> None:
        if self.mixing is not None:
            raise Refused(self.mixing)

    def bias(self):
        raise Refused(
            f"position={self.choice} is of the layers of a stack, and here is a layer that has none of its own: use "
            "depth=fixed, or the position without each_layer=true"
        )
