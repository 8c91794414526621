"""The sizes a mechanism is built for: the lab gives them, an option never repeats them."""

import dataclasses
import math

from xformers_lab.errors import Refused
from xformers_lab.nn.plan import Plan


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of one model, in the alphabet used everywhere: T length, D dim, N heads, K kv_heads, H head, L layers.

    `length` is the number of positions the model is built for; geometry that depends on the sequence (the stride of
    strided attention, the grid of axial attention, a table of learned positions) is fixed by it, so that a shorter
    prefix sees the same pattern as the whole.
    `source_layers`, of a decoder with cross-attention: how many layers the encoder that it looks at has; and
    `target_layers`, of that encoder: how many the decoder has. 0 of a stack that stands alone.

    `plane` says that the positions are an image, its rows and columns, row by row, behind `ahead` others (a class
    token). A part of a model that is built for another length has the same plane, and is none.

    `marks`: how many positions of a row the task marks, at most; None where nobody says, for no task is known.

    `plan`: how it is run; None leaves that to the platform (see plan.py).
    """

    length: int = 128
    dim: int = 64
    heads: int = 1
    kv_heads: int | None = None
    layers: int = 1
    dtype: str = "float32"
    source_layers: int = 0
    target_layers: int = 0
    plane: tuple[int, int] | None = None
    ahead: int = 0
    marks: int | None = None
    plan: Plan | None = None

    def __post_init__(self):
        for name in ("length", "dim", "heads", "layers"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise Refused(f"dim={self.dim} is not divisible by heads={self.heads}")
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise Refused(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}")

    @property
    def key_heads(self) -> int:
        """K: the number of key/value heads; each is shared by heads / K query heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head(self) -> int:
        """H: the size of one head."""
        return self.dim // self.heads

    def on_plane(self) -> tuple[int, int]:
        """Rows and columns of the plane that the positions fill row by row: the image's, else nearly a square.

        Raises Refused where the positions are not those of the image alone.
        """
        if self.plane is None:
            columns = math.ceil(math.sqrt(self.length))
            return math.ceil(self.length / columns), columns
        rows, columns = self.plane
        if self.ahead:
            raise Refused(
                f"on the {rows}x{columns} plane of an image there is no place for what stands in front of it, a class "
                "token: use model=vit:pool=mean"
            )
        if rows * columns != self.length:
            raise Refused(
                f"layers of {self.length} positions are not the {rows}x{columns} plane of the image: use a depth that "
                "gives every layer all positions, as depth=fixed does"
            )
        return self.plane
