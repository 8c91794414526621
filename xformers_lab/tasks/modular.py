"""Modular: the value of an expression of digits, modulo their number."""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select

BLANK = 0
OPERATORS = "+-*"


class Modular(Task):
    """Modular arithmetic without brackets (Delétang et al., 2023, arXiv 2207.02098, appendix A: "simple", a regular
    language).

    Digits below `modulus` with + - * between them, `3 + 1 * 4 - 2`; the class is the value modulo `modulus`, products
    before sums. Token 0 is blank, then the digits, then the operators. At an even seq_len the last position is padding.
    Splits share no expression.

    Options:
        modulus: how many digits there are

    Metric: accuracy. Chance: 1 / modulus.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")

    def __init__(self, setting: Setting, *, modulus: int = 5):
        super().__init__(setting)
        if modulus < 2:
            raise ValueError(f"modulus={modulus} leaves nothing to guess: use modulus=2 or more")
        self.modulus, self.digits = modulus, (setting.seq_len + 1) // 2
        self.vocab, self.outputs = 1 + modulus + len(OPERATORS), modulus
        self.chance = 1 / modulus
        room = self.digits * math.log(modulus) + (self.digits - 1) * math.log(len(OPERATORS))
        check_room(room, "use a longer seq_len or a larger modulus")

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        length, first = self.setting.seq_len, 1 + self.modulus

        def draw(n: int) -> tuple[np.ndarray]:
            rows = np.full((n, length), BLANK, np.int32)
            rows[:, : 2 * self.digits : 2] = rng.integers(1, first, (n, self.digits))
            rows[:, 1 : 2 * self.digits - 1 : 2] = rng.integers(first, self.vocab, (n, self.digits - 1))
            return (rows,)

        (inputs,) = select(split, self.setting.batch, draw)
        valid = inputs != BLANK
        return Batch(
            inputs,
            self._value(inputs),
            np.ones(len(inputs), np.float32),
            None if valid.all() else valid,
        )

    def _value(self, rows: np.ndarray) -> np.ndarray:
        """The value of each expression."""
        digits, operators = rows[:, : 2 * self.digits : 2] - 1, rows[:, 1 : 2 * self.digits - 1 : 2] - 1 - self.modulus
        total, term = np.zeros(len(rows), np.int32), digits[:, 0]
        for operator, digit in zip(operators.T, digits[:, 1:].T, strict=True):
            times = operator == OPERATORS.index("*")
            total = np.where(times, total, total + term) % self.modulus
            signed = np.where(operator == OPERATORS.index("-"), -digit, digit)
            term = np.where(times, term * digit, signed) % self.modulus
        return (total + term) % self.modulus

    def encode(self, text: str) -> list[int]:
        """An expression as it is written, spaces or not: "3+1*4-2"."""
        signs = [*map(str, range(self.modulus)), *OPERATORS]
        words = text.split() if self.modulus > 10 else [sign for sign in text if not sign.isspace()]
        if wrong := [word for word in words if word not in signs]:
            raise ValueError(f'"{wrong[0]}" is no digit below {self.modulus} and none of {" ".join(OPERATORS)}')
        return [1 + signs.index(word) for word in words]

    def decode(self, tokens: list[int]) -> str:
        signs = ["", *map(str, range(self.modulus)), *OPERATORS]
        return " ".join(signs[token] for token in tokens).strip()

    def describe(self) -> dict:
        return {"source": "generated", "modulus": self.modulus, "digits": self.digits}
