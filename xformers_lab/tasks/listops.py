"""Listops: evaluate nested operations on lists of digits."""

import dataclasses
import itertools
import math
import re

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task, _presets
from xformers_lab.tasks._splits import check_room, generator, select

# Token ids: 0 is padding, then the digits, the operators with their opening bracket, the closing bracket.
TOKENS = ("", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
_OPERATORS = 4
_FIRST_OPERATOR, _CLOSE = TOKENS.index("[MIN"), TOKENS.index("]")
# An argument is an operation this often, else a digit (VALUE_P in the published generator).
_OPERATION = 0.25
_LEAST_ACCEPTED = 1e-4
# How likely each length is takes work in proportion to these sizes.
_MOST = 10_000_000
# How many expressions `describe` looks at.
_SAMPLE = 1000
# How many tokens a round of drawing may hold at most, to bound its memory.
_ROUND = 2**21


class Listops(Task):
    """ListOps (Nangia and Bowman, 2018, arXiv 1804.06028), as in Long Range Arena (Tay et al., 2020, arXiv 2011.04006).

    `[MAX 4 [MIN 2 9 ] 0 ]` is 4: MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10) of 2 to max_args
    arguments, each an operation with probability 1/4 down to max_depth, else a digit. Trees are drawn from this grammar
    until they have min_length to max_length tokens, so the data follow the published distribution given their length.
    Every token counts, brackets included, and none is dropped or cut off: the release of Long Range Arena fed models
    without brackets, and its lengths did not count them. Shorter expressions are padded at the end. Splits share no
    expression.

    Options:
        min_length: the least number of tokens (none: a quarter of the most, the published ratio 500 to 2000)
        max_length: the largest number of tokens (none: seq_len)
        max_depth: how deep operations nest
        max_args: how many arguments an operation takes at most
        preset: lra: 500 to 2,000 tokens, 10 levels, 10 arguments, at seq_len=2000 or more

    Metric: accuracy. Chance: 0.1, a uniform guess; always naming the most frequent value scores more (see `describe`).
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    vocab = len(TOKENS)
    outputs = 10
    chance = 0.1

    def __init__(
        self,
        setting: Setting,
        *,
        min_length: int | None = None,
        max_length: int | None = None,
        max_depth: int = 10,
        max_args: int = 10,
        preset: _presets.Preset | None = None,
    ):
        super().__init__(setting)
        if preset is not None:
            given = {
                "min_length": (min_length, 500),
                "max_length": (max_length, 2000),
                "max_depth": (max_depth, 10),
                "max_args": (max_args, 10),
            }
            sizes = _presets.published(preset, given)
            min_length, max_length = sizes["min_length"], sizes["max_length"]
            _presets.check_length(preset, setting.seq_len, sizes["max_length"])
        if max_depth < 2:
            raise ValueError(f"max_depth={max_depth} has no operation: use max_depth=2 or more")
        if max_args < 2:
            raise ValueError(f"max_args={max_args} leaves nothing to compute: use max_args=2 or more")
        if setting.seq_len < 5:
            raise ValueError(f"seq_len={setting.seq_len} holds too few expressions to split: use seq_len=5 or more")
        self.longest = setting.seq_len if max_length is None else max_length
        if not 5 <= self.longest <= setting.seq_len:
            raise ValueError(
                f"max_length={max_length} does not fit: use 5 to {setting.seq_len} at seq_len={setting.seq_len}"
            )
        if self.longest * max_depth * max_args > _MOST:
            raise ValueError(
                f"seq_len={self.longest} with max_depth={max_depth} and max_args={max_args}: nobody waits for "
                f"expressions of such sizes; their product is at most {_MOST:,}"
            )
        self.shortest = max(4, self.longest // 4) if min_length is None else min_length
        if not 1 <= self.shortest <= self.longest:
            most = "seq_len" if max_length is None else "max_length"
            raise ValueError(f"min_length={min_length} does not fit: use 1 to {self.longest} at {most}={self.longest}")
        self.max_depth, self.max_args = max_depth, max_args
        likely = length_probabilities(self.longest, max_depth, max_args)
        self.accepted = float(likely[self.shortest :].sum())
        if self.accepted < _LEAST_ACCEPTED:
            raise ValueError(
                f"expressions of {self.shortest} to {self.longest} tokens are too rare to draw "
                f"(1 in {1 / self.accepted if self.accepted > 0 else math.inf:.3g}) with max_depth={max_depth} and "
                f"max_args={max_args}: use a smaller min_length, or a larger max_depth or max_args"
            )
        longest = int(np.flatnonzero(likely > 1e-12)[-1])
        # At most two tokens in three are brackets, and each of the others is one of ten digits.
        digits = math.ceil((longest + 2) / 3)
        check_room(math.log(_OPERATORS) + digits * math.log(10), "use a larger max_args or seq_len")

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)

        def draw(wanted: int) -> tuple[np.ndarray, np.ndarray]:
            trees = max(1, min(wanted, _ROUND // self.longest))
            return expressions(rng, trees, self.shortest, self.longest, self.max_depth, self.max_args)

        inputs, values = select(split, self.setting.batch, draw, self.accepted)
        inputs = np.pad(inputs, ((0, 0), (0, self.setting.seq_len - self.longest)))
        return Batch(inputs, values, np.ones(len(values), np.float32), inputs > 0)

    def encode(self, text: str) -> list[int]:
        """An expression as it is written: "[MAX 4 [MIN 2 9 ] 0 ]"."""
        try:
            return encode(text)
        except ValueError:
            raise ValueError(f'"{text[:80]}" holds a word that is none of {" ".join(TOKENS[1:])}') from None

    def decode(self, tokens: list[int]) -> str:
        return decode(np.array(tokens, np.int32))

    def describe(self) -> dict:
        """`majority` is the share of the most frequent value in a sample of the training split."""
        steps = range(math.ceil(_SAMPLE / self.setting.batch))
        values = np.concatenate([self.batch("train", step).targets for step in steps])
        return {
            "source": "generated",
            "length": f"{self.shortest}..{self.longest}",
            "accepted": round(self.accepted, 4),
            "majority": round(float(np.bincount(values).max() / len(values)), 3),
        }


def evaluate(expression: str) -> int:
    """The value of an expression such as `[MAX 4 [MIN 2 9 ] 0 ]`; raises ValueError where it is malformed.

    Understands all operators of the published data: MIN, MAX, MED, SM, and FIRST, LAST, PM (the product modulo 10).
    The round parentheses with which those data mark a binary tree carry no meaning and are skipped.
    """
    stack: list[tuple[str, list[int]]] = [("", [])]
    for token in expression.replace("(", " ").replace(")", " ").split():
        if token.isdigit():
            stack[-1][1].append(int(token))
        elif token == "]":
            operator, values = stack.pop()
            if not stack or not values:
                raise ValueError(f'"]" closes nothing in "{expression[:80]}"')
            stack[-1][1].append(_MEANING[operator](values))
        elif token[0] == "[" and token[1:] in _MEANING:
            stack.append((token[1:], []))
        else:
            raise ValueError(f'unknown token "{token}" in "{expression[:80]}"')
    if len(stack) != 1 or len(stack[0][1]) != 1:
        raise ValueError(f'not one complete expression: "{expression[:80]}"')
    return stack[0][1][0]


def encode(expression: str) -> list[int]:
    """The token ids of an expression; brackets included. Raises ValueError on an unknown token."""
    return [TOKENS.index(token) for token in re.findall(r"[^\s()]+", expression)]


def decode(ids: np.ndarray) -> str:
    """The expression of a row of token ids, padding left out."""
    return " ".join(TOKENS[number] for number in ids if number)


def length_probabilities(longest: int, max_depth: int, max_args: int) -> np.ndarray:
    """p[n], n = 0..longest: how likely an operation at the root has n tokens.

    From the leaves up: the length of an operation is 2 plus a sum of its arguments' lengths, whose distribution is a
    product in the Fourier domain, long enough that nothing wraps around.
    """
    argument = np.zeros(longest + 1)
    argument[1] = 1.0
    size = max_args * longest + 1
    operation = argument
    for _ in range(max_depth - 1):
        one = np.fft.rfft(argument, size)
        power, total = one, np.zeros_like(one)
        for _ in range(2, max_args + 1):
            power = power * one
            total += power
        operation = np.zeros(longest + 1)
        operation[2:] = np.fft.irfft(total / (max_args - 1), size)[: longest - 1].clip(0)
        argument = _OPERATION * operation
        argument[1] += 1 - _OPERATION
    return operation


def expressions(
    rng: np.random.Generator, count: int, shortest: int, longest: int, max_depth: int, max_args: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` trees and keep those of fitting length: token ids (n, longest) padded with 0, and values (n,)."""
    levels = _grow(rng, count, shortest, longest, max_depth, max_args)
    for level, below in reversed(list(itertools.pairwise(levels))):
        _gather(level, below)
    tokens = np.zeros((len(levels[0].tree), longest), np.int32)
    start = np.zeros(len(tokens), np.int64)
    for level in levels:
        operation = level.arity > 0
        tokens[level.tree, start] = np.where(operation, _FIRST_OPERATOR + level.operator, 1 + level.value)
        tokens[level.tree[operation], (start + level.size - 1)[operation]] = _CLOSE
        start = np.repeat(start[operation] + 1, level.arity[operation]) + level.before
    return tokens, levels[0].value.astype(np.int32)


_MEANING = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(np.median(values)),
    "SM": lambda values: sum(values) % 10,
    "PM": lambda values: math.prod(values) % 10,
    "FIRST": lambda values: values[0],
    "LAST": lambda values: values[-1],
}


@dataclasses.dataclass
class _Level:
    """The nodes of one depth of many trees, in order; the arguments of its operations are the next level, in order.

    All arrays are (n,): the tree a node is in, its operator, its number of arguments (0: a digit), its value and its
    size in tokens (those of an operation are known once its arguments' are). `before` is over the arguments of the
    level's operations: how many tokens of earlier arguments stand between the operator and them.
    """

    tree: np.ndarray
    operator: np.ndarray
    arity: np.ndarray
    value: np.ndarray
    size: np.ndarray
    before: np.ndarray | int = 0


def _grow(
    rng: np.random.Generator, count: int, shortest: int, longest: int, max_depth: int, max_args: int
) -> list[_Level]:
    """Draw `count` trees level by level and keep those of `shortest` to `longest` tokens, numbered anew."""
    levels, tree, tokens = [], np.arange(count), np.zeros(count, np.int64)
    for depth in range(1, max_depth + 1):
        nodes = len(tree)
        operation = rng.random(nodes) <= _OPERATION if 1 < depth < max_depth else np.full(nodes, depth == 1)
        arity = np.where(operation, rng.integers(2, max_args + 1, nodes), 0)
        operator, value = rng.integers(0, _OPERATORS, nodes), rng.integers(0, 10, nodes)
        levels.append(_Level(tree, operator, arity, value, np.ones(nodes, np.int64)))
        tokens += np.bincount(tree, 1 + operation, count).astype(np.int64)
        # A tree that is already too long grows no further: its lengths are settled, so this biases nothing.
        grows = tokens + np.bincount(tree, arity, count) <= longest
        tokens[~grows] = longest + 1
        tree = np.repeat(tree, arity)
        tree = tree[grows[tree]]
    fits = (tokens >= shortest) & (tokens <= longest)
    number = np.cumsum(fits) - 1
    for level in levels:
        mine = fits[level.tree]
        level.tree = number[level.tree[mine]]
        level.operator, level.arity = level.operator[mine], level.arity[mine]
        level.value, level.size = level.value[mine], level.size[mine]
    return levels


def _gather(level: _Level, below: _Level) -> None:
    """Work out value and size of a level's operations from their arguments, the level below."""
    operation = level.arity > 0
    if not operation.any():
        return
    arity = level.arity[operation]
    first = np.cumsum(arity) - arity
    owner = np.repeat(np.arange(len(arity)), arity)
    ordered = below.value[np.lexsort((below.value, owner))]
    results = np.stack(
        [
            ordered[first],
            ordered[first + arity - 1],
            (ordered[first + (arity - 1) // 2] + ordered[first + arity // 2]) // 2,
            np.add.reduceat(below.value, first) % 10,
        ]
    )
    level.value[operation] = results[level.operator[operation], np.arange(len(arity))]
    level.size[operation] = 2 + np.add.reduceat(below.size, first)
    sizes_before = np.cumsum(below.size) - below.size
    level.before = sizes_before - sizes_before[first][owner]
