import dataclasses
import math
from typing import Literal

import numpy as np
from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned, run_block
from xformers_lab.attention._engine.algebra import Pattern, settled
from xformers_lab.attention._engine.order import NATURAL, Tiles, columns_of
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# Default sizes of a run, and of each side of a tile.
RUN, SIDE = 128, 8


@dataclasses.dataclass(frozen=True)
class Line(Pattern):
    """Keys of the query's run of `block` positions, and up to `memory` positions in front of it and behind it."""

    block: int
    memory: int

    def __call__(self, q, k):
        start = q // self.block * self.block
        return (k >= start - self.memory) & (k < start + self.block + self.memory)

    def state(self, q, k):
        return _around((q.low, q.high), (k.low, k.high), self.block, self.memory)

    def spans(self, low, high):
        end = self.block + self.memory
        return [(low // self.block * self.block - self.memory, high // self.block * self.block + end - 1)]


@dataclasses.dataclass(frozen=True)
class Plane(Pattern):
    """Positions row by row on a plane of `columns`, cut into tiles of height x width: keys of the query's tile, and
    those up to `above` rows and `aside` columns around it."""

    columns: int
    height: int
    width: int
    above: int
    aside: int

    def __call__(self, q, k):
        top, left = q // self.columns // self.height * self.height, q % self.columns // self.width * self.width
        row, column = k // self.columns, k % self.columns
        rows = (row >= top - self.above) & (row < top + self.height + self.above)
        return rows & (column >= left - self.aside) & (column < left + self.width + self.aside)

    @property
    def order(self):
        return Tiles(self.columns, self.height, self.width) if self.width < self.columns else NATURAL

    def state(self, q, k):
        asked, held = ((run.low // self.columns, run.high // self.columns) for run in (q, k))
        rows = _around(asked, held, self.height, self.above)
        asked, held = (columns_of(run, self.columns) for run in (q, k))
        return np.minimum(rows, _around(asked, held, self.width, self.aside))

    def spans(self, low, high):
        tile = self.height * self.columns
        above, below = low // tile * self.height - self.above, (high // tile + 1) * self.height + self.above
        return [(above * self.columns, below * self.columns - 1)]


def _around(asked, held, size: int, memory: int):
    """The state of keys held (first, last) in the blocks of `size` of what is asked (first, last), and their
    memory."""
    first, last = asked[0] // size * size, asked[1] // size * size
    end = size + memory
    possible = (held[1] >= first - memory) & (held[0] < last + end)
    return settled(possible, (held[0] >= last - memory) & (held[1] < first + end))


class ImageLocal(Patterned):
    """Local attention of the Image Transformer (Parmar et al., 2018, arXiv 1802.05751, section 3.2).

    Positions fall into query blocks: runs of a line (form=1d), or tiles of a plane that is laid out row by row
    (form=2d). out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys of t's block and of the memory around it,
    which is the same for all queries of the block: `memory` positions in front of a run, or rows above a tile and
    columns on both its sides.

    Deviations from the paper: pixels of a 2d image are generated row by row, where the paper goes block by block; a
    causal query sees what of its block and memory comes before it in that order. Not causal, memory lies behind and
    below too.

    Options:
        form: 1d: runs of the sequence; 2d: tiles of a plane
        shape: rows x columns of the plane, whose product is the length; none: the image's, or nearly a square (2d)
        block: positions of a run, or rows x columns of a tile; none: 128 or 8x8, at most a quarter of the line or plane
        memory: positions around a run, or rows x columns around a tile; none: as many as in a block
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T M H)",
        memory="O(S H)",
        decoding="a ring back to the first of those keys",
        time_note="with M keys in a block and its memory",
    )

    def __init__(
        self,
        size: Size,
        *,
        form: Literal["1d", "2d"] = "1d",
        shape: tuple[int, ...] | None = None,
        block: tuple[int, ...] | None = None,
        memory: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        axes = 1 if form == "1d" else 2
        shape = _shape(size, axes, shape)
        if block is None:
            block = tuple(min((RUN, SIDE)[axes - 1], -(-length // 4)) for length in shape)
        memory = block if memory is None else memory
        for name, sizes, least in (("block", block, 1), ("memory", memory, 0)):
            if len(sizes) != axes or min(sizes) < least:
                example = "8x8" if axes == 2 else "128"
                wanted = f"{name} of form={form} wants sizes of at least {least} like {example}"
                raise Refused(f"{wanted}, got {_times(sizes)}")
        pattern = Line(*block, *memory) if axes == 1 else Plane(shape[1], *block, *memory)
        super().__init__(size, pattern, rngs=rngs)
        self.shape, self.tile, self.memory = shape, block, memory

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        return (block := run_block(math.prod(self.tile))), block

    @staticmethod
    def limit(length: int):
        return {"block": (length,)}

    def slots(self, length: int) -> int:
        reach = [tile + memory - 1 for tile, memory in zip(self.tile, self.memory, strict=True)]
        return min(length, 1 + reach[-1] + (reach[0] * self.shape[1] if len(reach) == 2 else 0))


def _shape(size: Size, axes: int, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    length = size.length
    if axes == 1:
        if shape is not None:
            raise Refused(f"shape={_times(shape)} is that of a plane: use form=2d")
        return (length,)
    if shape is None or size.ahead:
        return size.on_plane()
    if len(shape) != 2 or min(shape) < 1 or math.prod(shape) != length:
        rows = next(rows for rows in range(math.isqrt(length), 0, -1) if length % rows == 0)
        raise Refused(
            f"shape={_times(shape)} does not fit a length of {length}: rows x columns must be {length}, for example "
            f"{rows}x{length // rows}"
        )
    return shape


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
