"""Sparse attention with a pattern that the user writes."""

import ast
import dataclasses
import functools
import operator

import numpy as np
from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine import pattern as shapes
from xformers_lab.attention._engine.algebra import Either, Pattern
from xformers_lab.attention._engine.order import NATURAL, Tiles, columns_of
from xformers_lab.attention._engine.pattern import Band, Measured, apart
from xformers_lab.attention._engine.random_blocks import OfRuns
from xformers_lab.attention.fixed import Summary
from xformers_lab.errors import Refused, nearest
from xformers_lab.nn.size import Size


@dataclasses.dataclass(frozen=True)
class Apart(Either):
    """Two patterns without a pair in common: their parts are disjoint as they are."""

    def parts(self):
        return [*self.a.parts(), *self.b.parts()]


@dataclasses.dataclass(frozen=True)
class Local2D(Measured):
    """On a grid of `columns`, row by row: keys at most `height` rows and `width` columns away."""

    columns: int
    height: int
    width: int

    @property
    def order(self):
        """Tiles of 8 x 8 where so many fewer keys come with the blocks that are live, as on a wide grid."""
        tiles = 64 * (1 + 2 * -(-self.height // 8)) * (1 + 2 * -(-self.width // 8))
        rows = 2 * self.height + max(1, -(-64 // self.columns))
        natural = rows * min(self.columns, 64 * (1 + 2 * -(-self.width // 64)))
        return Tiles(self.columns, 8, 8) if tiles < natural and self.columns >= 8 else NATURAL

    def __call__(self, q, k):
        rows, columns = q // self.columns - k // self.columns, q % self.columns - k % self.columns
        return (abs(rows) <= self.height) & (abs(columns) <= self.width)

    def state(self, q, k):
        q_rows, k_rows = ((at.low // self.columns, at.high // self.columns) for at in (q, k))
        rows = apart(q_rows, k_rows, self.height, self.height)
        return np.minimum(rows, apart(columns_of(q, self.columns), columns_of(k, self.columns), self.width, self.width))

    def spans(self, low, high):
        away = self.height * self.columns + min(self.width, self.columns)
        return [(low - away, high + away)]


@dataclasses.dataclass(frozen=True)
class Random(OfRuns):
    """The runs are cut into `count` shares of (nearly) equal size and one is drawn from each, so that the draws differ.

    A draw is a hash of indices: there is no table, however long a sequence is.
    """

    size: int
    count: int
    blocks: int
    seed: int = 0

    def linked(self, run, other):
        return (other == self._draw(run, other * self.count // self.blocks)) & (other >= 0) & (other < self.blocks)

    def _draw(self, run, share):
        first, stop = -(-share * self.blocks // self.count), -(-(share + 1) * self.blocks // self.count)
        return first + _hashed(run, share, self.seed, stop - first)

    def drawn(self, run):
        return self._draw(run[..., None], np.arange(self.count))


def _fixed(stride: int, summary: int) -> Pattern:
    """Keys in the query's own run of `stride` positions, and the last `summary` positions of every run."""
    return shapes.block_local(stride) | Summary(stride, stride - summary, stride)


def _tree(width: int, levels: int) -> Pattern:
    """Keys at most `width` away, and beyond that the last position of every span of 2, 4, 8, ... positions.

    Spans double where the distance does, `levels` times: the view a query of BP-Transformer has, one position for a
    span.
    """
    rings: list[Pattern] = [Band(width)]
    for level in range(1, min(levels, shapes.FARTHEST.bit_length()) + 1):
        ring = Band(width * 2**level) & ~Band(width * 2 ** (level - 1))
        rings.append(ring & Summary(2**level, 2**level - 1, 2**level))
    return functools.reduce(Apart, rings)


def _hashed(a, b, seed: int, below):
    """A number from 0 to below - 1 (0 where below < 1) for every pair of integers: the same with numpy and with jax."""
    word = lambda x: x.astype(np.uint32)
    with np.errstate(over="ignore"):  # numpy warns where numbers without axes wrap around
        mixed = word(a) * np.uint32(0x9E3779B1) ^ word(b) * np.uint32(0x85EBCA6B) ^ np.uint32(seed * 0xC2B2AE35 % 2**32)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = (mixed ^ mixed >> np.uint32(shift)) * np.uint32(factor)
        mixed = mixed ^ mixed >> np.uint32(16)
    return (mixed % word(below.clip(1))).astype(below.dtype)


# What may stand in a pattern: its words and, of each, the fewest and the most whole numbers it takes.
WORDS = {
    "all": (shapes.All, 0, 0),
    "band": (shapes.Band, 1, 1),
    "blocks": (shapes.block_local, 1, 1),
    "dilated": (shapes.dilated_band, 2, 2),
    "fixed": (_fixed, 2, 2),
    "first": (shapes.Global, 1, 1),
    "grid": (Local2D, 3, 3),
    "near": (shapes.Blocks, 3, 3),
    "random": (None, 2, 3),
    "strided": (shapes.Residue, 1, 1),
    "tree": (_tree, 2, 2),
}
# Of these words only so many of the numbers, the first ones, must be at least 1: the others are distances.
FIRST = {"band": 0, "grid": 1, "near": 1}
OPERATORS = {ast.BitOr: operator.or_, ast.BitAnd: operator.and_}


class Sparse(Patterned):
    """Sparse attention over a pattern of one's own, written on the command line (the algebra of patterns of this
    laboratory; softmax attention: Vaswani et al., 2017, arXiv 1706.03762).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys that the pattern shows to query t.

    A pattern joins words by | (or), & (and) and ~ (not), with brackets. Quote it, for a shell knows these signs too:
    "sparse:pattern=band(64)|first(2)|random(16,2)". Numbers are positions unless said otherwise:
    all; band(W): at most W away; blocks(N): in the same run of N; near(N,B,A): in the query's run of N, the B before or
    the A after it; dilated(W,D): W steps of D away at most; strided(N): a multiple of N away; fixed(N,C): in the same
    run of N, or among the last C of any run; first(N): the first N see all and are seen by all; random(N,C,SEED): C
    random runs of N keys for each run of N queries; grid(COLUMNS,H,W): at most H rows and W columns away on a grid of
    COLUMNS; tree(W,L): at most W away, and one position for each span that doubles with the distance, L times.

    Options:
        pattern: which keys a query sees
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(time="O(live pairs H)", memory="O(S H)", decoding="every key and value")

    def __init__(self, size: Size, *, pattern: str = "band(64)|first(1)", rngs: nnx.Rngs):
        super().__init__(size, parsed(pattern, size.length), rngs=rngs)

    @staticmethod
    def limit(length: int):
        return {"pattern": "all"}


def parsed(text: str, length: int) -> Pattern:
    """The pattern of a text for sequences of `length`; raises Refused where it cannot be read."""
    if not text.isascii() or len(text) > 1000:
        raise Refused(f"pattern={text[:40]}...: words, numbers, brackets and | & ~ only, at most 1,000 of them")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _pattern(tree, text, length)
    except (SyntaxError, RecursionError) as error:
        raise Refused(
            f'pattern={text} cannot be read ({type(error).__name__}): join words by | & ~, as in "band(64)|first(1)"'
        ) from None


def _pattern(node: ast.expr, text: str, length: int) -> Pattern:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_pattern(node.left, text, length), _pattern(node.right, text, length))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_pattern(node.operand, text, length)
    if isinstance(node, ast.Name):
        return _word(node.id, [], length)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _word(node.func.id, [_number(each, text) for each in node.args], length)
    raise Refused(f'pattern={text}: "{ast.unparse(node)}" is no word of a pattern; there are {", ".join(WORDS)}')


def _number(node: ast.expr, text: str) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 1 << 31:
        return node.value
    raise Refused(f'pattern={text}: "{ast.unparse(node)}" is no whole number')


def _word(word: str, numbers: list[int], length: int) -> Pattern:
    if word not in WORDS:
        raise Refused(f'pattern: no word "{word}": {nearest(word, WORDS, "there are")}')
    build, fewest, most = WORDS[word]
    if not fewest <= len(numbers) <= most:
        wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise Refused(f"pattern: {word} takes {wanted} numbers, got {len(numbers)}")
    if build is None:
        size, count, seed = (*numbers, 0)[:3]
        _at_least_one(word, size, count)
        runs = -(-length // size)
        return Random(size, min(count, runs), runs, seed)
    _at_least_one(word, *numbers[: FIRST.get(word, len(numbers))])
    if word == "fixed" and numbers[1] > numbers[0]:
        raise Refused(f"pattern: fixed({numbers[0]},{numbers[1]}): a run has no more positions than that")
    return build(*numbers)


def _at_least_one(word: str, *numbers: int) -> None:
    if min(numbers, default=1) < 1:
        raise Refused(f"pattern: {word} takes numbers of at least 1, got {min(numbers)}")
