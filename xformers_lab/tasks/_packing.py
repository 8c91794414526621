"""Rows of a fixed length that hold whole documents one after another."""

import functools

import numpy as np


class Rows:
    """Documents in rows of `length` places, each place of which is one token that predicts the next.

    count: how many rows there are; padding: the share of places that hold nothing; targets: where in the text, all
    documents one after another, the predicted tokens are.
    """

    def __init__(self, starts: np.ndarray, sizes: np.ndarray, row: np.ndarray, length: int):
        """Pieces of the text: where each starts, how many places it takes, and the number of its row."""
        order = np.argsort(row, kind="stable")
        self.starts, self.sizes, self.length = starts[order], sizes[order], length
        self.count = int(row.max(initial=-1)) + 1
        self.first = np.searchsorted(row[order], np.arange(self.count + 1))
        self.padding = round(1 - float(sizes.sum()) / max(self.count * length, 1), 4)

    @functools.cached_property
    def targets(self) -> np.ndarray:
        places = [np.arange(start + 1, start + 1 + size) for start, size in zip(self.starts, self.sizes, strict=True)]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *places]))

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of these numbers (n,) -> where in the text each place's token is, -1 at padding, and the number of its
        document in the row, from 0 on, padding as one document more: (n, length) each."""
        places = np.full((len(numbers), self.length), -1, np.int64)
        documents = np.zeros(places.shape, np.int32)
        for at, number in enumerate(numbers):
            pieces = slice(self.first[number], self.first[number + 1])
            end = 0
            for document, (start, size) in enumerate(zip(self.starts[pieces], self.sizes[pieces], strict=True)):
                places[at, end : end + size] = np.arange(start, start + size)
                documents[at, end : end + size] = document
                end += int(size)
            documents[at, end:] = pieces.stop - pieces.start
        return places, documents


def pack(lengths: np.ndarray, length: int) -> Rows:
    """Rows of documents of so many tokens (n,), which stand one after another in a text.

    A document of n tokens takes n - 1 places; of more than `length` it is cut into pieces of that many and a rest. The
    longest piece goes first, each into the row with the least room that is enough (best fit decreasing).
    """
    starts = np.cumsum(lengths) - lengths
    places = np.maximum(lengths - 1, 0)
    pieces = -(-places // length)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + number * length
    sizes = np.minimum(np.repeat(places, pieces) - number * length, length)
    row = np.empty(len(sizes), np.int64)
    rooms: dict[int, list[int]] = {}  # rows by the places that they have left
    known, count = 0, 0  # bit r of `known`: whether a row with r places left is there
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        enough = known >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            chosen = rooms[room].pop()
            known ^= 0 if rooms[room] else 1 << room
        else:
            room, chosen, count = length, count, count + 1
        row[piece] = chosen
        if room > size:
            rooms.setdefault(room - size, []).append(chosen)
            known |= 1 << (room - size)
    return Rows(starts, sizes, row, length)
