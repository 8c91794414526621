"""Mqar: recall the values of several keys."""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select


class Mqar(Task):
    """Multi-query associative recall (Zoology, Arora, Eyuboglu et al., 2023, arXiv 2312.04927).

    Keys and values first, `k1 v1 k2 v2 ...`, then filler in which each key comes back once: at that position the answer
    is its value, so inputs[t] is the key and targets[t] the value. Keys are drawn from 1..vocab/2 - 1 and values from
    vocab/2..vocab - 1, both without replacement. The i-th free place (every second position) is asked with probability
    proportional to power * i^(power - 1), without replacement: most questions come soon, some late. As in the authors'
    generator, except that vocab may be smaller than seq_len and seq_len may be odd. Splits share no list of pairs.

    What is learned is found at once, after some hundred steps near chance. With ffn=none, batch=64 and lr=3e-3 full
    attention with learned positions recalls all of pairs=4 in steps=600, all of pairs=8 in steps=1000.

    Options:
        pairs: how many keys, each with its value, a sequence holds
        vocab: how many tokens there are: the filler, keys, values
        power: the smaller, the sooner most keys come back
        random_non_queries: fill with random tokens instead of token 0

    Metric: accuracy at the questions. Chance: 1 / pairs, a guess among the values of the sequence.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        pairs: int = 8,
        vocab: int = 256,
        power: float = 0.01,
        random_non_queries: bool = False,
    ):
        super().__init__(setting)
        if pairs < 1:
            raise ValueError(f"pairs={pairs} asks nothing: use pairs=1 or more")
        if 4 * pairs > setting.seq_len:
            raise ValueError(
                f"pairs={pairs} needs seq_len={4 * pairs} or more (pairs and questions take 4 tokens each), "
                f"got seq_len={setting.seq_len}: use pairs={setting.seq_len // 4} or fewer"
            )
        if vocab // 2 - 1 < pairs:
            raise ValueError(
                f"vocab={vocab} has {max(vocab // 2 - 1, 0)} keys for pairs={pairs}: use vocab={2 * pairs + 2} or more"
            )
        if power <= 0:
            raise ValueError(f"power={power} is no power law over places: use a number above 0")
        check_room(_ways(vocab // 2 - 1, pairs) + _ways(vocab - vocab // 2, pairs), "use a larger vocab")
        self.source_length = 2 * pairs
        self.pairs, self.power, self.random_non_queries = pairs, power, random_non_queries
        self.vocab = self.outputs = vocab
        self.chance = 1 / pairs
        self.places = (setting.seq_len - 2 * pairs) // 2
        self.log_odds = (power - 1) * np.log(np.arange(1, self.places + 1))

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        count, half, context = self.setting.batch, self.vocab // 2, 2 * self.pairs

        def draw(n: int) -> tuple[np.ndarray]:
            pairs = np.empty((n, context), np.int32)
            pairs[:, 0::2] = 1 + _first(rng.random((n, half - 1), np.float32), self.pairs)
            pairs[:, 1::2] = half + _first(rng.random((n, self.vocab - half), np.float32), self.pairs)
            return (pairs,)

        (pairs,) = select(split, count, draw)
        # The races of exponential clocks with rates p: who comes first, second, ... is a draw without replacement.
        clocks = np.log(rng.standard_exponential((count, self.places))) - self.log_odds
        places = context + 2 * _first(clocks, self.pairs)
        inputs = np.zeros((count, self.setting.seq_len), np.int32)
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
        inputs[:, :context] = pairs
        np.put_along_axis(inputs, places, pairs[:, 0::2], 1)
        np.put_along_axis(targets, places, pairs[:, 1::2], 1)
        np.put_along_axis(weights, places, np.float32(1), 1)
        if self.random_non_queries:
            inputs = np.where(inputs == 0, rng.integers(0, self.vocab, inputs.shape, dtype=np.int32), inputs)
        return Batch(inputs, targets, weights)

    def describe(self) -> dict:
        return {
            "source": "generated",
            "pairs": self.pairs,
            "power": self.power,
            "random_non_queries": self.random_non_queries,
        }


def _first(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` smallest scores of each row, smallest first: (n, m) -> (n, count)."""
    if count < scores.shape[1]:
        least = np.argpartition(scores, count - 1, axis=1)[:, :count]
    else:
        least = np.broadcast_to(np.arange(count), scores.shape)
    return np.take_along_axis(least, np.argsort(np.take_along_axis(scores, least, 1), axis=1), 1)


def _ways(things: int, drawn: int) -> float:
    """The logarithm of the number of ordered draws without replacement."""
    return math.lgamma(things + 1) - math.lgamma(things - drawn + 1)
