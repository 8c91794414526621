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
    random up to 128; here it is fixed by seq_len, so that accuracy belongs to a length. Splits share no string.

    Options:
        symbols: how many different symbols the string is made of

    Metric: accuracy on the second string. Chance: 1 / symbols.
    """

    begin = (0,)

    def __init__(self, setting: Setting, *, symbols: int = 10):
        super().__init__(setting)
        if setting.seq_len < 3:
            raise ValueError(f"seq_len={setting.seq_len} holds no copy: use seq_len=3 or more")
        if symbols < 2:
            raise ValueError(f"symbols={symbols} leaves nothing to guess: use symbols=2 or more")
        self.half = (setting.seq_len - 1) // 2
        check_room(self.half * math.log(symbols), "use a longer seq_len or more symbols")
        self.symbols, self.source_length = symbols, self.half + 1
        self.vocab = self.outputs = symbols + 1
        self.chance = 1 / symbols

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        count, length, half = self.setting.batch, self.setting.seq_len, self.half
        (string,) = select(split, count, lambda n: (rng.integers(1, self.symbols + 1, (n, half)),))
        whole = np.zeros((count, length + 1), np.int32)
        whole[:, 1 : half + 1] = string
        whole[:, half + 2 : 2 * half + 2] = self.answer(string)
        weights = np.zeros((count, length), np.float32)
        weights[:, half + 1 : 2 * half + 1] = 1
        return Batch(whole[:, :-1], whole[:, 1:], weights)

    def answer(self, string: np.ndarray) -> np.ndarray:
        """What is asked for, (n, h) symbols for strings (n, h)."""
        return string

    def describe(self) -> dict:
        return {"source": "generated", "symbols": self.symbols, "string_length": self.half}
