"""Sparse attention with a pattern that the user writes."""

import ast
import operator

from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine import pattern as shapes
from xformers_lab.attention._engine.pattern import Pattern
from xformers_lab.attention._engine.random_blocks import Random
from xformers_lab.errors import Refused, nearest
from xformers_lab.nn.size import Size

# What may stand in a pattern: its words and, of each, the fewest and the most whole numbers it takes.
WORDS = {
    "all": (shapes.All, 0, 0),
    "band": (shapes.Band, 1, 1),
    "blocks": (shapes.BlockLocal, 1, 1),
    "dilated": (shapes.Dilated, 2, 2),
    "fixed": (shapes.Fixed, 2, 2),
    "first": (shapes.Global, 1, 1),
    "grid": (shapes.Local2D, 3, 3),
    "near": (shapes.Blocks, 3, 3),
    "random": (None, 2, 3),
    "strided": (shapes.Residue, 1, 1),
    "tree": (shapes.Tree, 2, 2),
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
