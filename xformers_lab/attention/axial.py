import functools
import math
import operator

from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.pattern import Pattern, Residue, block_local
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Axial(Patterned):
    """Axial attention over a grid (Ho et al., 2019, arXiv 1912.12180).

    Positions are laid out row by row on a grid of any number of axes; a query sees the keys that differ from it in one
    coordinate alone, on a plane those of its row and its column:
    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over s // columns = t // columns or (s - t) mod columns = 0.

    Deviations from the paper: it runs one layer for each axis in turn, `axial:axis=row+axial:axis=column` here; the
    default is one softmax over all of them, so that a single layer stands beside the other mechanisms. Causally a query
    sees what of its row and column lies in the past; the paper's model shifts between layers so that all of it is seen.

    Options:
        shape: sizes of the axes, rows x columns, say, with the length as product; none: the image's, or nearly a square
        axis: which coordinate may differ: row (the last), column (the one before), a number from 0, or both (any)
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T (rows + columns) H)",
        memory="O(S H)",
        decoding="the keys and values as far back as an axis reaches",
        time_note=", O(T^1.5 H) on a square and O(T^(1 + 1/n) H) on a cube of n axes",
    )

    def __init__(
        self,
        size: Size,
        *,
        shape: tuple[int, ...] | None = None,
        axis: str = "both",
        rngs: nnx.Rngs,
    ):
        if shape is None or size.ahead:
            shape = size.on_plane()
        elif len(shape) < 2 or min(shape) < 1 or math.prod(shape) != size.length:
            grid = "x".join(map(str, shape))
            raise Refused(f"shape={grid} does not fit a length of {size.length}: {_nearest_grid(size.length)}")
        axes = _axes(axis, len(shape))
        super().__init__(size, functools.reduce(operator.or_, (_along(shape, one) for one in axes)), rngs=rngs)
        self.shape, self.axis, self.axes = shape, axis, axes

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        """Blocks of the axis with which least is computed; in its own order, an axis fills whole blocks."""
        sizes = [self.shape[axis] for axis in self.axes]
        padded = lambda block: sum((-(-size // block) * block) ** 2 / size for size in sizes)
        return (block := min({max(8, min(size, 512)) for size in sizes}, key=lambda b: (padded(b), -b))), block

    @staticmethod
    def limit(length: int):
        return {"shape": (1, length)}

    def slots(self, length: int) -> int:
        return min(length, 1 + max((self.shape[axis] - 1) * math.prod(self.shape[axis + 1 :]) for axis in self.axes))


def _axes(axis: str, count: int) -> tuple[int, ...]:
    words = {"both": range(count), "row": [count - 1], "column": [count - 2]}
    words |= {str(number): [number] for number in range(count)}
    if axis not in words:
        raise Refused(f'axis must be both, row, column or a number below {count}, got "{axis}"')
    return tuple(words[axis])


def _along(shape: tuple[int, ...], axis: int) -> Pattern:
    """Positions that agree in every coordinate but one."""
    step = math.prod(shape[axis + 1 :])
    run = block_local(step * shape[axis])
    if step == 1:
        return run
    return Residue(step) if axis == 0 else run & Residue(step)


def _nearest_grid(length: int) -> str:
    rows = next(rows for rows in range(math.isqrt(length), 0, -1) if length % rows == 0)
    return f"rows x columns must be {length}, for example {rows}x{length // rows}"
