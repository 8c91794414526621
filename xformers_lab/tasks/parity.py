"""Parity: is the number of ones odd?"""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select


class Parity(Task):
    """Parity check (Delétang et al., 2023, arXiv 2207.02098, appendix A: a regular language; hard for attention: Hahn,
    2020, arXiv 1906.06755).

    seq_len random bits; the class is their sum modulo 2. Every bit counts, and no bit alone says anything. Splits share
    no string.

    Metric: accuracy. Chance: 1 / 2.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    vocab = outputs = 2
    chance = 0.5

    def __init__(self, setting: Setting):
        super().__init__(setting)
        check_room(setting.seq_len * math.log(2), "use a longer seq_len")

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        draw = lambda n: (rng.integers(0, 2, (n, self.setting.seq_len), dtype=np.int32),)
        (bits,) = select(split, self.setting.batch, draw)
        return Batch(bits, bits.sum(1, dtype=np.int32) % 2, np.ones(len(bits), np.float32))

    def describe(self) -> dict:
        return {"source": "generated"}
