"""Induction: what came after this token the last time?"""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select


class Induction(Task):
    """Induction heads (Olsson et al., 2022, arXiv 2209.11895; the task of Fu et al., 2022, arXiv 2212.14052, and of Gu
    and Dao, 2023, arXiv 2312.00752, section 4.1).

    Random symbols, among them once a special token, which comes again at the end: the answer is the symbol that
    followed it. Its place is uniform over all that fit. Token 0 is the special one. Splits share no sequence.

    Options:
        symbols: how many different symbols there are

    Metric: accuracy at the last position. Chance: 1 / symbols.
    """

    def __init__(self, setting: Setting, *, symbols: int = 15):
        super().__init__(setting)
        if symbols < 2:
            raise ValueError(f"symbols={symbols} leaves nothing to guess: use symbols=2 or more")
        if setting.seq_len < 3:
            raise ValueError(f"seq_len={setting.seq_len} holds no token twice: use seq_len=3 or more")
        self.places = setting.seq_len - 2
        check_room(
            math.log(self.places) + (setting.seq_len - 2) * math.log(symbols), "use a longer seq_len or more symbols"
        )
        self.symbols = symbols
        self.vocab = self.outputs = 1 + symbols
        self.chance = 1 / symbols

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        count, length = self.setting.batch, self.setting.seq_len

        def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
            rows = rng.integers(1, self.vocab, (n, length), dtype=np.int32)
            each, place = np.arange(n), rng.integers(0, self.places, n)
            rows[each, place] = rows[:, -1] = 0
            return rows, rows[each, place + 1]

        inputs, answers = select(split, count, draw)
        targets, weights = np.zeros((count, length), np.int32), np.zeros((count, length), np.float32)
        targets[:, -1], weights[:, -1] = answers, 1
        return Batch(inputs, targets, weights)

    def describe(self) -> dict:
        return {"source": "generated", "symbols": self.symbols, "places": self.places}
