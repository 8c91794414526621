"""Random draws that are a pure function of (seed, split, step), and splits that share no example by construction.

An example belongs to a split by a hash of what it says, never by when or where it was drawn: candidates are drawn and
those of other splits thrown away. So no example is ever in two splits, whatever the seed, the batch size or the step.
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np

from xformers_lab.tasks import SPLITS, Split

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
# A split of a tenth of 1000 examples is empty with probability 0.9^1000, about 1e-46.
_LEAST_EXAMPLES = 1000


def generator(seed: int, split: Split, step: int, purpose: int = 0) -> np.random.Generator:
    """The random numbers of one purpose in a batch: the same in every process, unrelated between all of these."""
    words = (seed, SPLITS.index(split), step, *([purpose] if purpose else []))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def of_rows(rows: np.ndarray) -> np.ndarray:
    """The split, as an index into SPLITS, of each row of token ids (n, T) -> (n,); zeros at the end do not count."""
    return _cut(_mixed(rows.astype(np.uint64) @ _mixed(np.arange(1, rows.shape[1] + 1, dtype=np.uint64))))


def of_bytes(content: bytes) -> Split:
    """The split of a document, or of a file by its name."""
    hashed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return SPLITS[int(_cut(np.array([hashed], np.uint64))[0])]


def select(
    split: Split, count: int, draw: Callable[[int], tuple[np.ndarray, ...]], accepted: float = 1.0
) -> tuple[np.ndarray, ...]:
    """`count` examples of `split`: `draw(n)` gives arrays over about n * accepted candidates, rows of ids first."""
    size = math.ceil(1.1 * count / (SHARES[split] * accepted)) + 16
    parts, number = [], 0
    while number < count:
        arrays = draw(size)
        mine = of_rows(arrays[0]) == SPLITS.index(split)
        parts.append([array[mine] for array in arrays])
        number += int(mine.sum())
    return tuple(np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True))


def check_room(log_examples: float, mend: str, what: str = "examples") -> None:
    """Raises ValueError where there are so few different examples, or of `what` there are, of whose number this is the
    logarithm, that a split may be empty."""
    if log_examples < math.log(_LEAST_EXAMPLES) - 1e-9:
        raise ValueError(
            f"only {math.exp(log_examples):.0f} different {what} exist, too few to split into train, validation and "
            f"test (at least {_LEAST_EXAMPLES}): {mend}"
        )


def _cut(hashes: np.ndarray) -> np.ndarray:
    """Hashes to indices into SPLITS, by the shares."""
    edges = np.cumsum([SHARES[split] for split in SPLITS[:-1]])
    return np.searchsorted(edges, (hashes >> np.uint64(11)).astype(np.float64) / 2**53, side="right")


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood, 2014): each bit of the result depends on each bit of a number."""
    numbers = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0xD1B54A32D192ED03)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
