"""Which blocks each program of a kernel computes: lists from the layout, made on the host once per shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.attention._engine.algebra import MIXED, WHOLE, Pattern
from xformers_lab.attention._engine.block_sparse.layout import Ordered, ordered
from xformers_lab.attention._engine.order import PAD
from xformers_lab.errors import Refused

# A program computes at most so many blocks, or this many times as many as most do: one that saw all keys alone would
# still run when all others are done.
SHORT, LONGER = 32, 4
# Bytes, at most, of the different masks of blocks whose predicate has a table, and of all of them in bits.
MASKS = 1 << 28


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """What the programs of a kernel compute, those with the most blocks first.

    table (P, 5): the row of blocks, the slot of the output, the first of its entries, the first mixed one, and the one
    behind its last. columns (n,): the block that each entry looks at. masks (n,): the number of its mask, where there
    are masks. A row's first slot, of `count`, is its own number, and further ones, up to `slots`, hold what is to be
    added: pieces (R, M) are the slots of rows (R,) that several programs compute, filled up with the number of slots.
    """

    table: np.ndarray
    columns: np.ndarray
    masks: np.ndarray | None
    count: int
    slots: int
    rows: np.ndarray
    pieces: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """One part of a pattern in its order: programs by blocks of queries or, where turned, by blocks of keys; masks
    (M, block_q, block_k), where its predicate cannot be computed in a kernel. alone: nothing is added to what the
    kernel makes of its rows."""

    ordered: Ordered
    programs: Programs
    masks: np.ndarray | None
    alone: bool


@functools.lru_cache(maxsize=256)
def work(pattern: Pattern, T: int, S: int, block_q: int, block_k: int, turned: bool = False) -> tuple[Work, ...]:
    """The parts of a pattern that have a live block, for T queries at the end of S positions."""
    parts = [ordered(part, T, S, block_q, block_k) for part in pattern.parts()]
    parts = [part for part in parts if len(part.live.rows)] or parts[:1]
    return tuple(_work(part, block_q, block_k, turned, len(parts) == 1) for part in parts)


def has_table(pattern: Pattern) -> bool:
    """Whether a predicate looks something up, in place of computing it from positions alone."""
    at = jax.ShapeDtypeStruct((16, 1), jnp.int32), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    traced = jax.make_jaxpr(lambda q, k: pattern(q, k))(*at)
    return any(np.size(const) > 1 for const in traced.consts) or _gathers(traced.jaxpr)


def _gathers(jaxpr) -> bool:
    inner = [each for equation in jaxpr.eqns for each in jax.tree.leaves(list(equation.params.values()))]
    inner = [getattr(each, "jaxpr", each) for each in inner]
    own = any(equation.primitive.name == "gather" for equation in jaxpr.eqns)
    return own or any(_gathers(each) for each in inner if hasattr(each, "eqns"))


def _work(part: Ordered, block_q: int, block_k: int, turned: bool, single: bool) -> Work:
    live, numbers, masks = part.live, None, None
    if has_table(part.pattern):
        numbers, masks = _masks(part, block_q, block_k)
    rows, columns = (live.columns, live.rows) if turned else (live.rows, live.columns)
    count = len(part.keys) // block_k if turned else len(part.queries) // block_q
    order = np.lexsort((columns, live.state != WHOLE, rows))
    whole = np.bincount(rows, live.state == WHOLE, count).astype(np.int64)
    ends = np.cumsum(np.bincount(rows, minlength=count))
    numbers = None if numbers is None else numbers[order].astype(np.int32)
    programs = _programs(ends, whole, columns[order].astype(np.int32), numbers)
    return Work(part, programs, masks, single and not len(programs.rows))


def _programs(ends: np.ndarray, whole: np.ndarray, columns: np.ndarray, masks: np.ndarray | None) -> Programs:
    """Of rows whose entries end before `ends`, the first `whole` of which need no predicate."""
    counts = np.diff(ends, prepend=0)
    starts, usual = ends - counts, np.median(counts[counts > 0]) if counts.any() else 1
    most = int(max(SHORT, LONGER * usual))
    of_row = np.maximum(1, -(-counts // most))
    row = np.repeat(np.arange(len(counts)), of_row)
    piece = np.arange(len(row)) - np.repeat(np.cumsum(of_row) - of_row, of_row)
    share = -(-counts // of_row)[row]
    first = np.minimum(starts[row] + piece * share, ends[row])
    last = np.minimum(first + share, ends[row])
    mixed = np.clip((starts + whole)[row], first, last)
    slot = np.where(piece == 0, row, len(counts) - 1 + np.cumsum(piece > 0))
    table = np.stack([row, slot, first, mixed, last], 1).astype(np.int32)
    rows = np.nonzero(of_row > 1)[0]
    pieces = np.full((len(rows), int(of_row.max())), len(row), np.int32)
    for at, each in enumerate(rows):
        pieces[at, : of_row[each]] = slot[row == each]
    heavy = np.argsort(first - last, kind="stable")
    if not len(columns):  # an array of nothing has no block
        columns = np.zeros(1, np.int32)
    return Programs(table[heavy], columns, masks, len(counts), len(row), rows.astype(np.int32), pieces)


def _masks(part: Ordered, block_q: int, block_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each live block the number of its mask, 0 where it has none, and the masks that differ."""
    q, k = part.queries.reshape(-1, block_q), part.keys.reshape(-1, block_k)
    mixed = np.nonzero(part.live.state == MIXED)[0]
    if len(mixed) * block_q * block_k // 8 > MASKS:
        raise Refused(f"its pattern looks something up in {len(mixed):,} blocks that would need a mask each")
    packed = np.zeros((len(mixed), block_q * block_k // 8), np.uint8)
    for at in range(0, len(mixed), 256):
        some = mixed[at : at + 256]
        qi, kj = q[part.live.rows[some]][:, :, None], k[part.live.columns[some]][:, None, :]
        seen = np.broadcast_to(part.pattern(qi, kj) & (kj != PAD), (len(some), block_q, block_k))
        packed[at : at + len(some)] = np.packbits(seen.reshape(len(some), -1), axis=1)
    different, which = np.unique(packed, axis=0, return_inverse=True)
    if len(different) * block_q * block_k > MASKS:
        raise Refused(f"its pattern looks something up, which would need {len(different):,} different masks of blocks")
    numbers = np.zeros(len(part.live.rows), np.int32)
    numbers[mixed] = which.reshape(-1)
    masks = np.unpackbits(different, axis=1).reshape(-1, block_q, block_k).astype(np.int8)
    return numbers, masks if len(masks) else np.ones((1, block_q, block_k), np.int8)
