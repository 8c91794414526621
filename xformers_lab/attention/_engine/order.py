"""Orders of positions: a pattern that is scattered in the natural one may be local, block by block, in another."""

import dataclasses

import numpy as np

# Marks padding in a list of positions; queries before the first key have negative positions, so -1 would not do.
PAD = -(1 << 30)


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """Blocks of positions in some order, arrays of one shape: their bounds, and the columns of a grid they lie in."""

    order: "Order"
    low: np.ndarray
    high: np.ndarray
    left: np.ndarray | None = None
    right: np.ndarray | None = None

    def __getitem__(self, index) -> "Runs":
        sides = () if self.left is None or self.right is None else (self.left[index], self.right[index])
        return Runs(self.order, self.low[index], self.high[index], *sides)


@dataclasses.dataclass(frozen=True)
class Order:
    """The natural order, blocks of neighbours; subclasses are others."""

    def queries(self, start: int, stop: int, block: int) -> np.ndarray:
        """Positions start..stop-1 in this order, in whole blocks, padded with PAD."""
        return _padded([np.arange(start, stop)], block)

    def keys(self, stop: int, block: int) -> np.ndarray:
        """Likewise for keys 0..stop-1, where those that no query sees may be missing."""
        return self.queries(0, stop, block)

    def find(self, q: Runs, first, last, stop: int, block: int):
        """The first and the last block of `keys(stop, block)` that may hold keys first..last of the queries q.

        0 <= first, last < stop; everything is an array of one shape.
        """
        return first // block, last // block


NATURAL = Order()


@dataclasses.dataclass(frozen=True)
class Remainders(Order):
    """By remainder modulo `step`: for patterns that couple positions of equal remainder alone."""

    step: int

    def queries(self, start, stop, block):
        # Of a step longer than the sequence, the remainders that occur.
        remainders = range(self.step) if self.step <= stop - start else range(start, stop)
        return _padded([np.arange(start + (r - start) % self.step, stop, self.step) for r in remainders], block)

    def find(self, q, first, last, stop, block):
        remainder = q.low % self.step
        longest = -(-stop // self.step)
        of_one = max(1, -(-longest // block))
        begin, end = -(-(first - remainder) // self.step), (last - remainder) // self.step
        low, high = np.maximum(begin, 0) // block, np.where(begin <= end, end // block, -1)
        return remainder * of_one + low, remainder * of_one + high


@dataclasses.dataclass(frozen=True)
class Tiles(Order):
    """On a grid of `columns`, row by row: tile after tile of `height` rows and `width` columns."""

    columns: int
    height: int
    width: int

    def queries(self, start, stop, block):
        # Of a grid wider than the sequence, the columns that occur.
        across = -(-(self.columns if start < 0 else min(self.columns, stop)) // self.width)
        first, last = start // self.columns // self.height, (stop - 1) // self.columns // self.height
        down, along = np.arange(first, last + 1), np.arange(across)
        rows = (down * self.height)[:, None, None, None] + np.arange(self.height)[:, None]
        columns = (along * self.width)[:, None, None] + np.arange(self.width)
        at = rows * self.columns + columns
        at = np.where((columns < self.columns) & (at >= start) & (at < stop), at, PAD)
        return _padded([at.reshape(-1)], block)

    def find(self, q, first, last, stop, block):
        row = -(-self.columns // self.width) * self.height * self.width
        begin, end = (at // self.columns // self.height for at in (first, last))
        return begin * row // block, ((end + 1) * row - 1) // block


def runs(order: Order, positions: np.ndarray, block: int) -> Runs:
    """The blocks of a list of positions; a block of padding alone has bounds PAD."""
    blocks = positions.reshape(-1, block).astype(np.int64)
    high = blocks.max(1)
    blocks = np.where(blocks == PAD, high[:, None], blocks)
    sides = ()
    if isinstance(order, Tiles):
        columns = blocks % order.columns
        sides = columns.min(1), columns.max(1)
    return Runs(order, blocks.min(1), high, *sides)


def columns_of(run: Runs, columns: int):
    """The first and the last column of a grid of `columns` that blocks of positions touch."""
    inside = isinstance(run.order, Tiles) and run.order.columns == columns
    if inside and run.left is not None and run.right is not None:
        return run.left, run.right
    one_row = run.low // columns == run.high // columns
    return np.where(one_row, run.low % columns, 0), np.where(one_row, run.high % columns, columns - 1)


def _padded(lists: list[np.ndarray], block: int) -> np.ndarray:
    """Lists one after the other, each padded to the blocks of the longest."""
    size = max(1, -(-max(map(len, lists)) // block)) * block
    rows = [np.pad(positions, (0, size - len(positions)), constant_values=PAD) for positions in lists]
    return np.concatenate(rows).astype(np.int32)
