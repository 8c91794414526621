"""Copy: repeat a string of random symbols."""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select


class Copy(Task):
    """Copy task of the Linear Transformer (Katharopoulos, Vyas, Pappas and Fleuret, 2020, arXiv 2006.16236).

    A separator, a string of random symbols, the separator again, and the same string again: `| s1 ... sh | s1 ... sh`.
    The model predicts the next token and is asked on the second string alone. The string is as long as fits, h =
    (seq_len - 1) // 2; at an odd seq_len the last symbol is predicted but never read. The paper draws the length at
    random up to 128. With `shortest` the training split does so, uniformly from there to h, before strings of other
    splits are thrown away; what follows the second string is padding. What is scored is as long as fits in any case, so
    that accuracy belongs to a length, and runs with and without it are scored on the same strings. Splits share no
    string.

    Options:
        symbols: how many different symbols the string is made of
        shortest: length of the shortest strings of the training split; none: all are as long as fits

    Metric: accuracy on the second string. Chance: 1 / symbols.
    """

    begin = (0,)

    def __init__(self, setting: Setting, *, symbols: int = 10, shortest: int | None = None):
        super().__init__(setting)
        if setting.seq_len < 3:
            raise ValueError(f"seq_len={setting.seq_len} holds no copy: use seq_len=3 or more")
        if symbols < 2:
            raise ValueError(f"symbols={symbols} leaves nothing to guess: use symbols=2 or more")
        self.half = (setting.seq_len - 1) // 2
        check_room(self.half * math.log(symbols), "use a longer seq_len or more symbols")
        if shortest is not None:
            few = f"strings of length {shortest}"
            check_room(shortest * math.log(symbols), "use a greater shortest or more symbols", few)
            if shortest > self.half:
                longest = f"strings of seq_len={setting.seq_len} have at most {self.half} symbols"
                raise ValueError(f"shortest={shortest}, and {longest}: use that or less, or a longer seq_len")
        self.symbols, self.shortest = symbols, shortest
        # Where lengths are mixed, an answer may begin wherever another string still goes on.
        self.source_length = self.half + 1 if shortest is None else 0
        self.vocab = self.outputs = symbols + 1
        self.chance = 1 / symbols

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        count, length = self.setting.batch, self.setting.seq_len
        shortest = self.shortest if split == "train" else None

        def draw(n: int) -> tuple[np.ndarray]:
            strings = rng.integers(1, self.symbols + 1, (n, self.half))
            if shortest is None:
                return (strings,)
            sizes = rng.integers(shortest, self.half + 1, (n, 1))
            return (np.where(np.arange(self.half) < sizes, strings, 0),)

        (strings,) = select(split, count, draw)
        sizes, at = (strings > 0).sum(1), np.arange(length)
        whole, weights = np.zeros((count, length + 1), np.int32), np.zeros((count, length), np.float32)
        whole[:, 1 : self.half + 1] = strings
        for size in np.unique(sizes):
            rows = sizes == size
            whole[rows, size + 2 : 2 * size + 2] = self.answer(strings[rows, :size])
            weights[rows, size + 1 : 2 * size + 1] = 1
        valid = None if shortest is None else at < 2 * sizes[:, None] + 2
        return Batch(whole[:, :-1], whole[:, 1:], weights, valid)

    def answer(self, string: np.ndarray) -> np.ndarray:
        """What is asked for, (n, h) symbols for strings (n, h)."""
        return string

    def describe(self) -> dict:
        mixed = {} if self.shortest is None else {"shortest_trained": self.shortest}
        return {"source": "generated", "symbols": self.symbols, "string_length": self.half, **mixed}
