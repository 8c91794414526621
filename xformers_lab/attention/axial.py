import math
from typing import Literal

from flax import nnx

from xformers_lab.attention import Cost
from xformers_lab.attention._engine.pattern import BlockLocal, Residue
from xformers_lab.attention._patterned import Patterned
from xformers_lab.size import Size


class Axial(Patterned):
    """Axial attention over a grid (Ho et al., 2019, arXiv 1912.12180).

    Positions are laid out row by row on a grid of `columns` columns; a query sees the keys of its row and its column:
    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over s // columns = t // columns or (s - t) mod columns = 0.
    Kind: sparse by position
    Time O(T (rows + columns) H), O(T^1.5 H) on a square; memory O(S H); decoding keeps every key and value.
    Exact on its pattern. The paper runs a row layer and a column layer in turn: `axial:axis=row+axial:axis=column`; the
    default is one softmax over both, so that a single layer stands beside the other mechanisms.

    Options:
        shape: rows x columns of the grid, whose product is the length; none: the most square grid that holds it
        axis: which keys a query sees: its row, its column, or both
    """

    def __init__(
        self,
        size: Size,
        *,
        shape: tuple[int, ...] | None = None,
        axis: Literal["both", "row", "column"] = "both",
        rngs: nnx.Rngs,
    ):
        if shape is None:
            columns = math.ceil(math.sqrt(size.length))
            shape = (math.ceil(size.length / columns), columns)
        elif len(shape) != 2 or min(shape) < 1 or math.prod(shape) != size.length:
            grid = "x".join(map(str, shape))
            raise ValueError(f"shape={grid} does not fit a length of {size.length}: {_nearest_grid(size.length)}")
        row, column = BlockLocal(shape[1]), Residue(shape[1])
        super().__init__(size, {"both": row | column, "row": row, "column": column}[axis], rngs=rngs)
        self.shape, self.axis = shape, axis

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        """Blocks of one row of the grid; a column of as many rows as columns is then one block too."""
        return (block := max(8, min(self.shape[1], 512))), block

    @staticmethod
    def limit(length: int):
        return {"shape": (1, length)}

    def cost(self, T: int, S: int) -> Cost:
        H, columns = self.size.head, self.shape[1]
        row, column = (self.axis != "column") * columns, (self.axis != "row") * S / columns
        return Cost(flops=4 * T * (row + column) * H, memory=self.largest(T, S), state=2 * S * H)


def _nearest_grid(length: int) -> str:
    rows = next(rows for rows in range(math.isqrt(length), 0, -1) if length % rows == 0)
    return f"rows x columns must be {length}, for example {rows}x{length // rows}"
