"""Selective copy: repeat the symbols that stand here and there among blanks."""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select

BLANK, RECALL, SYMBOLS = 0, 1, 2


class SelectiveCopy(Task):
    """Selective copying (Jing et al., 2019, arXiv 1706.02761; as in Gu and Dao, 2023, arXiv 2312.00752, section 4.1).

    Symbols stand at random places among blanks; then `count` times the token that asks for the next of them, in order:
    `. 5 . . 3 . 7 . ? ? ?` is answered by 5 3 7. What is to be kept is told by what a token is, not by where it
    stands. Token 0 is the blank, 1 asks, symbols come after. Splits share no sequence.

    Options:
        symbols: how many different symbols there are
        count: how many of them a sequence holds

    Metric: accuracy at the questions. Chance: 1 / symbols.
    """

    def __init__(self, setting: Setting, *, symbols: int = 14, count: int = 8):
        super().__init__(setting)
        if symbols < 2:
            raise ValueError(f"symbols={symbols} leaves nothing to guess: use symbols=2 or more")
        if not 1 <= count <= setting.seq_len // 2:
            raise ValueError(
                f"count={count} does not fit seq_len={setting.seq_len}, half of which asks: use 1 to "
                f"{setting.seq_len // 2}"
            )
        self.symbols, self.count, self.source_length = symbols, count, setting.seq_len - count
        check_room(count * math.log(symbols) + math.log(math.comb(self.source_length, count)), "use a longer seq_len")
        self.vocab = self.outputs = SYMBOLS + symbols
        self.chance = 1 / symbols

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)

        def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
            kept = rng.integers(SYMBOLS, self.vocab, (n, self.count), dtype=np.int32)
            places = np.sort(np.argsort(rng.random((n, self.source_length)), 1)[:, : self.count], 1)
            rows = np.full((n, self.setting.seq_len), BLANK, np.int32)
            rows[:, self.source_length :] = RECALL
            np.put_along_axis(rows, places, kept, 1)
            return rows, kept

        inputs, kept = select(split, self.setting.batch, draw)
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
        targets[:, self.source_length :], weights[:, self.source_length :] = kept, 1
        return Batch(inputs, targets, weights)

    def describe(self) -> dict:
        return {"source": "generated", "symbols": self.symbols, "count": self.count}
