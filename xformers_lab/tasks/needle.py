"""Needle: one rare token among noise, asked for at the end."""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select


class Needle(Task):
    """One rare token among noise, asked for at the end: how far back can a mechanism look? (task of this lab).

    Noise tokens, one needle among them, and a question as the last token; the answer is which needle it was. Its
    distance from the question is uniform over all that fit, so the accuracy of a mechanism that sees w tokens back is
    about w / seq_len. Token 0 is the question, 1..symbols are the needles, the noise comes after. Splits share no
    sequence. The question is marked.

    Options:
        symbols: how many different needles there are
        noise: how many different noise tokens there are
        distance: the least distance from the needle to the question, in tokens

    Metric: accuracy at the last position. Chance: 1 / symbols.
    """

    kinds = ("decoder", "encoder")
    marks = 1

    def __init__(self, setting: Setting, *, symbols: int = 16, noise: int = 64, distance: int = 1):
        super().__init__(setting)
        if symbols < 2:
            raise ValueError(f"symbols={symbols} leaves nothing to guess: use symbols=2 or more")
        if noise < 1:
            raise ValueError(f"noise={noise} leaves nothing to hide in: use noise=1 or more")
        if not 1 <= distance < setting.seq_len:
            raise ValueError(
                f"distance={distance} does not fit: use 1 to {setting.seq_len - 1} at seq_len={setting.seq_len}"
            )
        self.places = setting.seq_len - distance
        logs = math.log(symbols) + math.log(self.places) + (setting.seq_len - 2) * math.log(noise)
        check_room(logs, "use a longer seq_len, more symbols or more noise")
        self.symbols, self.noise = symbols, noise
        self.vocab, self.outputs = 1 + symbols + noise, 1 + symbols
        self.chance = 1 / symbols

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        count, length = self.setting.batch, self.setting.seq_len

        def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
            rows = rng.integers(self.symbols + 1, self.vocab, (n, length), dtype=np.int32)
            needles = rng.integers(1, self.symbols + 1, n, dtype=np.int32)
            rows[np.arange(n), rng.integers(0, self.places, n)] = needles
            rows[:, -1] = 0
            return rows, needles

        inputs, needles = select(split, count, draw)
        targets, weights = np.zeros((count, length), np.int32), np.zeros((count, length), np.float32)
        targets[:, -1], weights[:, -1] = needles, 1
        marked = np.broadcast_to(np.arange(length) == length - 1, inputs.shape)
        return Batch(inputs, targets, weights, marked=marked)

    def describe(self) -> dict:
        return {
            "source": "generated",
            "needles": self.symbols,
            "noise_tokens": self.noise,
            "needle_positions": self.places,
        }
