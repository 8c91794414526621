"""Addition: the sum of two numbers, digit by digit."""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select

PLUS, EQUALS, BLANK = 10, 11, 12
SIGNS = "0123456789+= "


class Addition(Task):
    """Addition of two numbers (Lee et al., 2023, arXiv 2307.03381: "plain" and "reverse").

    `a + b = c` with numbers of n digits, zeros in front, and a sum of n + 1; n is what fits, (seq_len - 2) // 3. The
    model predicts the next token and is asked on the sum alone. Splits share no pair of numbers.

    Options:
        reverse: write the sum from its last digit, so that carries are known when they are wanted

    Metric: accuracy on the digits of the sum. Chance: 1 / 10.
    """

    vocab = outputs = len(SIGNS)
    chance = 0.1

    def __init__(self, setting: Setting, *, reverse: bool = False):
        super().__init__(setting)
        self.reverse, self.digits = reverse, (setting.seq_len - 2) // 3
        if self.digits < 1:
            raise ValueError(f"seq_len={setting.seq_len} holds no sum: use seq_len=8 or more")
        check_room(2 * self.digits * math.log(10), "use seq_len=8 or more")
        self.source_length = 2 * self.digits + 1

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        count, n = self.setting.batch, self.digits
        (numbers,) = select(split, count, lambda count: (rng.integers(0, 10, (count, 2 * n), dtype=np.int32),))
        a, b = numbers[:, :n], numbers[:, n:]
        total = _sum(a, b)
        whole = np.full((count, self.setting.seq_len + 1), BLANK, np.int32)
        whole[:, :n], whole[:, n], whole[:, n + 1 : 2 * n + 1], whole[:, 2 * n + 1] = a, PLUS, b, EQUALS
        whole[:, 2 * n + 2 : 3 * n + 3] = total[:, ::-1] if self.reverse else total
        weights = np.zeros((count, self.setting.seq_len), np.float32)
        weights[:, 2 * n + 1 : 3 * n + 2] = 1
        return Batch(whole[:, :-1], whole[:, 1:], weights)

    def encode(self, text: str) -> list[int]:
        """A sum as it is written: "12+34="."""
        if wrong := [sign for sign in text if sign not in SIGNS]:
            raise ValueError(f'"{wrong[0]}" is no digit, no + and no =: a prompt is like 12+34=')
        return [SIGNS.index(sign) for sign in text.replace(" ", "")]

    def decode(self, tokens: list[int]) -> str:
        return "".join(SIGNS[token] for token in tokens).strip()

    def describe(self) -> dict:
        return {"source": "generated", "digits": self.digits, "reverse": self.reverse}


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(count, n) digits each, the most significant first -> (count, n + 1)."""
    total = np.zeros((len(a), a.shape[1] + 1), np.int32)
    total[:, 1:] = a + b
    for place in range(a.shape[1], 0, -1):
        total[:, place - 1] += total[:, place] // 10
        total[:, place] %= 10
    return total
