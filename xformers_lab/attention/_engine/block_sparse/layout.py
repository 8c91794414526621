"""From a pattern to the blocks it touches: computed on the host, once per shape, never a T x S array.

Only pairs of blocks that the pattern's spans name are looked at; those that are live are lists, a row of blocks after
the other, so memory and time are those of the live blocks.
"""

import dataclasses
import functools

import numpy as np

from xformers_lab.attention._engine.algebra import DEAD, MIXED, WHOLE, Pattern
from xformers_lab.attention._engine.order import PAD, Order, runs
from xformers_lab.nn.plan import FUSED

# Predicates of mixed blocks are evaluated to drop those that are dead after all, up to this many entries.
EVALUATED = 1 << 26
# Pairs of blocks looked at together.
AT_ONCE = 1 << 18


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What decides how rows of blocks are run, and never what they compute.

    Args:
        groups: a row is padded to a multiple of this share of the widest, so that a layout compiles to so many loops
        padded: rows are run together, their ends padded, where that computes at most this much more than what is live
        narrow: rows of at most so many scores are too small to be run one at a time
        wider: rows this much wider than the median are run by themselves
        few, pieces: rows that are worth running together, and pieces that rows may come in
        together: queries that see the same keys and are run as one row
        unmasked: keys that all rows of a group see whole are apart from the others, if they are so many
        fused, filled: rows are filled up to so many queries, all together, where they are at most this share more
    """

    groups: int = 8
    padded: float = 1.25
    narrow: int = 1 << 17
    wider: float = 1.5
    few: int = 4
    pieces: int = 4
    together: int = 256
    unmasked: int = 1024
    fused: int = FUSED
    filled: float = 0.05


SIZES = Sizes()


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Query blocks that are run alike, each against equally many key blocks.

    rows (R,): the query blocks. columns (R, M): key blocks of each row. run: they are M neighbours starting at
    columns[:, 0]. whole: no predicate is needed; unmasked: nor is it at so many of a run's first blocks, which are then
    products of their own. live (R, M): which blocks count; None: all do, or the predicate tells.

    Batched groups are computed many rows at once, the others row by row. offsets: the rows are neighbours, and row r's
    first blocks are r + offset for each of these; the last `shared` ones are the same in every row. together: so many
    rows after each other see the same blocks and are run as one.
    """

    rows: np.ndarray
    columns: np.ndarray
    run: bool = False
    whole: bool = False
    live: np.ndarray | None = None
    batched: bool = False
    offsets: tuple[int, ...] = ()
    shared: int = 0
    together: int = 1
    unmasked: int = 0

    @property
    def width(self) -> int:
        """Key blocks that each row is computed against."""
        return self.columns.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One pattern in one order of positions.

    queries (blocks of queries, flat) and keys (likewise) hold positions in the natural order, PAD where a block
    is padded. natural_queries and natural_keys: apart from `lead` blocks of padded keys in front, they are 0, 1, 2, ...
    (for queries, S - T and on), so nothing is gathered. Columns of groups count the leading blocks.
    """

    pattern: Pattern
    queries: np.ndarray
    keys: np.ndarray
    natural_queries: bool
    natural_keys: bool
    lead: int
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Live:
    """Blocks that are not dead, a row after the other and each row's in order: three arrays of equal length."""

    rows: np.ndarray
    columns: np.ndarray
    state: np.ndarray

    def where(self, chosen) -> "Live":
        return Live(self.rows[chosen], self.columns[chosen], self.state[chosen])

    def of_rows(self, rows: np.ndarray) -> "Live":
        """Those of some rows."""
        return self.where(np.isin(self.rows, rows))


@dataclasses.dataclass(frozen=True, eq=False)
class Ordered:
    """Positions in the order of one pattern, in whole blocks with PAD where one is padded, and its live blocks.

    natural_queries and natural_keys: they are S - T, ... and 0, 1, 2, ..., so nothing is gathered.
    """

    pattern: Pattern
    queries: np.ndarray
    keys: np.ndarray
    natural_queries: bool
    natural_keys: bool
    live: Live


def ordered(pattern: Pattern, T: int, S: int, block_q: int, block_k: int, order: Order | None = None) -> Ordered:
    """The live blocks of a pattern for T queries at the end of S positions, in its own order, which parts of any
    pattern have, or in the natural one."""
    order = pattern.order if order is None else order
    queries, keys = order.queries(S - T, S, block_q), order.keys(S, block_k)
    live = _live(pattern, order, queries.reshape(-1, block_q), keys.reshape(-1, block_k), S)
    natural_queries = np.array_equal(queries[:T], np.arange(S - T, S))
    natural_keys = np.array_equal(keys[:S], np.arange(S)) and len(keys) - S < block_k
    return Ordered(pattern, queries, keys, natural_queries, natural_keys, live)


@functools.lru_cache(maxsize=256)
def layout(pattern: Pattern, T: int, S: int, block_q: int, block_k: int, sizes: Sizes = SIZES) -> tuple[Part, ...]:
    """The live blocks of `pattern` for T queries at the end of S positions, in blocks of block_q x block_k."""
    parts = [_part(part, T, S, (block_q, block_k), sizes) for part in pattern.parts()]
    return tuple(part for part in parts if part.groups) or tuple(parts[:1])


def live_pairs(pattern: Pattern, T: int, S: int, block_q: int, block_k: int, sizes: Sizes = SIZES) -> int:
    """Query-key pairs that the engine computes: live blocks, with the padding of rows, times the size of a block."""
    parts = layout(pattern, T, S, block_q, block_k, sizes)
    blocks = sum(len(group.rows) * group.width for part in parts for group in part.groups)
    return blocks * block_q * block_k


def _part(pattern: Pattern, T: int, S: int, block: tuple[int, int], sizes: Sizes) -> Part:
    found = ordered(pattern, T, S, *block)
    counts = len(found.queries) // block[0], len(found.keys) // block[1]
    groups, lead, tail = _groups(found.live, counts, block, sizes)
    keys = np.pad(found.keys, (lead * block[1], tail * block[1]), constant_values=PAD)
    return Part(pattern, found.queries, keys, found.natural_queries, found.natural_keys, lead, groups)


# ---- which blocks are live -----------------------------------------------------------------------------------------


def _live(pattern: Pattern, order: Order, q: np.ndarray, k: np.ndarray, S: int) -> Live:
    q_runs, k_runs = runs(order, q.reshape(-1), q.shape[1]), runs(order, k.reshape(-1), k.shape[1])
    rows = np.nonzero(q_runs.high != PAD)[0]
    spans = []
    for first, last in pattern.spans(q_runs.low[rows], q_runs.high[rows]):
        first, last = np.maximum(first, 0), np.minimum(last, S - 1)
        empty = first > last
        begin, end = order.find(q_runs[rows], np.where(empty, 0, first), np.where(empty, 0, last), S, k.shape[1])
        spans.append((begin, np.where(empty, begin - 1, np.minimum(end, len(k) - 1))))
    counts = np.sum([np.maximum(end - begin + 1, 0) for begin, end in spans], 0)
    parts, cuts = [], np.searchsorted(np.cumsum(counts), np.arange(AT_ONCE, counts.sum(), AT_ONCE))
    for some in np.split(np.arange(len(rows)), np.unique(cuts)):
        i, j = _expanded(rows[some], [(begin[some], end[some]) for begin, end in spans], len(k))
        real = k_runs.high[j] != PAD
        i, j = i[real], j[real]
        state = pattern.state(q_runs[i], k_runs[j])
        parts.append(Live(i, j, state).where(state != DEAD))
    rows, columns, state = (np.concatenate([getattr(part, name) for part in parts]) for name in Live.__annotations__)
    padded = (k == PAD).any(1)[columns]
    return _evaluated(pattern, q, k, Live(rows, columns, np.where(padded & (state == WHOLE), MIXED, state)))


def _expanded(rows: np.ndarray, spans: list, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Every (row, column) of some spans of columns, once, in order."""
    i, j = [], []
    for begin, end in spans:
        count = np.maximum(end - begin + 1, 0)
        i.append(np.repeat(rows, count))
        j.append(np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - begin, count))
    if len(spans) == 1:
        return i[0], j[0]
    code = np.unique(np.concatenate(i).astype(np.int64) * columns + np.concatenate(j))
    return code // columns, code % columns


def _evaluated(pattern: Pattern, q: np.ndarray, k: np.ndarray, live: Live) -> Live:
    """Mixed blocks settled by their predicate."""
    mixed, each = np.nonzero(live.state == MIXED)[0], q.shape[1] * k.shape[1]
    if len(mixed) * each > EVALUATED:
        return live
    state, step = live.state.copy(), max(1, AT_ONCE // each)
    for at in range(0, len(mixed), step):
        some = mixed[at : at + step]
        qi, kj = q[live.rows[some]][:, :, None], k[live.columns[some]][:, None, :]
        seen, asked = pattern(qi, kj) & (kj != PAD), qi != PAD
        # A padded query inside a block is computed and thrown away.
        state[some[~(seen & asked).any((1, 2))]] = DEAD
        state[some[(seen | ~asked).all((1, 2))]] = WHOLE
    return Live(live.rows, live.columns, state).where(state != DEAD)


# ---- how they are run ----------------------------------------------------------------------------------------------


def _groups(live: Live, blocks: tuple[int, int], block: tuple[int, int], sizes: Sizes):
    """Groups of rows, and the blocks of padding that their offsets need before and after the keys.

    A row is in one group, or in two of which the later counts. blocks: how many there are, of queries and of keys, of
    `block` positions each.
    """
    if len(live.rows) == 0:
        return (), 0, 0
    counts = np.bincount(live.rows)
    rows = np.nonzero(counts)[0]
    wide = counts[rows] > sizes.wider * np.median(counts[rows])
    alike, batched, rest = rows[~wide], [], [rows[wide]]
    pieces = np.split(alike, np.nonzero(np.diff(alike) != 1)[0] + 1)
    for piece in pieces:
        group = None
        if len(pieces) <= sizes.pieces:
            filled = _filled(piece, blocks[0], -(-sizes.fused // block[0]), sizes.filled)
            group = _batched(live.of_rows(piece), piece, filled, block[0] * block[1], sizes)
        if group is None:
            rest.append(piece)
        else:
            batched.append(group)
    ends = [row + offset for group in batched for offset in group.offsets for row in group.rows[[0, -1]]]
    lead, tail = max(0, -min(ends, default=0)), max(0, max(ends, default=0) - blocks[1] + 1)
    looped = _looped(live.of_rows(np.concatenate(rest)), blocks[1], block, sizes)
    return tuple(_moved(group, lead) for group in (*batched, *looped)), lead, tail


def _moved(group: Group, lead: int) -> Group:
    """Key blocks counted from `lead` blocks further ahead."""
    offsets = tuple(offset + lead for offset in group.offsets)
    return dataclasses.replace(group, columns=group.columns + lead, offsets=offsets)


def _filled(rows: np.ndarray, count: int, wanted: int, share: float) -> np.ndarray:
    """Neighbouring rows and, where at most this share is missing for `wanted`, rows beside them that see nothing."""
    missing = wanted - len(rows)
    if missing <= 0 or missing > share * len(rows) or wanted > count:
        return rows
    first = max(0, min(int(rows[0]) - missing // 2, count - wanted))
    return np.arange(first, first + wanted)


def _batched(live: Live, rows: np.ndarray, filled: np.ndarray, each: int, sizes: Sizes) -> Group | None:
    """One group of neighbouring rows, where hardly more is computed than is live: what most of them see at the same
    distance, what most of them see at the same place, and for each row what is left."""
    R, total = len(rows), len(live.rows)
    if R < 2:
        return None
    apart = live.columns - live.rows
    low, high = int(apart.min()), int(apart.max())
    if (high - low + 1) * R <= sizes.padded * total:
        return _assigned(live, filled, np.arange(low, high + 1), np.zeros(0, np.int64), 0)
    if sizes.few > R or each * total > sizes.narrow * R:
        return None
    shared = np.nonzero(2 * np.bincount(live.columns) >= R)[0]
    left = live.where(~np.isin(live.columns, shared))
    distances, counts = np.unique(left.columns - left.rows, return_counts=True)
    offsets = distances[2 * counts >= R]
    left = left.where(~np.isin(left.columns - left.rows, offsets))
    further = int(np.bincount(left.rows).max(initial=0))
    if R * (len(shared) + len(offsets) + further) > sizes.padded * total:
        return None
    return _assigned(live, filled, offsets, shared, further)


def _assigned(live: Live, rows: np.ndarray, offsets: np.ndarray, shared: np.ndarray, further: int) -> Group:
    """A batched group of neighbouring rows: blocks at these offsets, shared ones, and up to `further` others."""
    row, R, O = live.rows - rows[0], len(rows), len(offsets)
    is_shared = np.isin(live.columns, shared)
    at_offset = ~is_shared & np.isin(live.columns - live.rows, offsets)
    other = ~is_shared & ~at_offset
    at_distance, others = rows[:, None] + offsets, np.zeros((R, further), np.int64)
    columns = np.concatenate([at_distance, others, np.broadcast_to(shared, (R, len(shared)))], 1)
    place = np.empty(len(row), np.int64)
    place[at_offset] = np.searchsorted(offsets, (live.columns - live.rows)[at_offset])
    place[other] = O + _places(row[other])
    place[is_shared] = O + further + np.searchsorted(shared, live.columns[is_shared])
    counts = np.zeros(columns.shape, bool)
    columns[row[other], place[other]] = live.columns[other]
    counts[row, place] = True
    whole = bool((live.state == WHOLE).all())
    # A predicate masks what is dead, but not what counts elsewhere in its row.
    masked = not whole and not further and not len(shared) and bool(counts.any(1).all())
    return Group(
        rows.astype(np.int32),
        columns.astype(np.int32),
        whole=whole,
        live=None if masked or counts.all() else counts,
        batched=True,
        offsets=tuple(offsets.tolist()),
        shared=len(shared),
    )


def _places(rows: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each stretch of equal numbers."""
    starts = np.nonzero(np.diff(rows, prepend=-1))[0]
    return np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))


def _looped(live: Live, columns: int, block: tuple[int, int], sizes: Sizes) -> list[Group]:
    """Groups of rows of (nearly) equally many blocks; where those are narrow, they are gathered and batched."""
    if len(live.rows) == 0:
        return []
    rows, starts, counts = np.unique(live.rows, return_index=True, return_counts=True)
    quantum = -(-int(counts.max()) // sizes.groups)
    width = np.minimum(-(-counts // quantum) * quantum, columns)
    groups = []
    for size in np.unique(width).tolist():
        chosen = width == size
        some = live.of_rows(rows[chosen])
        first, last = live.columns[starts[chosen]], live.columns[(starts + counts - 1)[chosen]]
        run = bool((last - first < size).all())
        R, row = int(chosen.sum()), np.repeat(np.arange(chosen.sum()), counts[chosen])
        state = np.full((R, size), DEAD, np.int8)
        if run:
            held = np.minimum(first, columns - size)[:, None] + np.arange(size)
            place = some.columns - held[row, 0]
        else:
            held, place = np.zeros((R, size), np.int64), _places(row)
            held[row, place] = some.columns
        state[row, place] = some.state
        whole = ((state == WHOLE) | ((state == DEAD) & (not run))).all(1)
        for flag in (True, False):
            if (same := whole == flag).any():
                dead = not run and bool((state[same] == DEAD).any())
                batched = int(same.sum()) >= sizes.few and size * block[0] * block[1] <= sizes.narrow
                groups.append(
                    Group(
                        rows[chosen][same].astype(np.int32),
                        held[same].astype(np.int32),
                        run=run,
                        whole=flag,
                        live=state[same] != DEAD if dead else None,
                        batched=batched,
                        unmasked=_unmasked(state[same], block[1], sizes) if run and not flag and not batched else 0,
                        together=1 if batched or dead else _together(held[same], sizes.together // block[0]),
                    )
                )
    return groups


def _unmasked(state: np.ndarray, block: int, sizes: Sizes) -> int:
    """How many blocks (R, M) are wholly live in all rows, from the first on; 0 where two products in the place of one
    would cost more than a predicate does."""
    count = int(np.argmin((state == WHOLE).all(0)))
    return count if count * block >= sizes.unmasked and 2 * count >= state.shape[1] else 0


def _together(columns: np.ndarray, most: int) -> int:
    """How many rows at a time, `most` if possible, see the same blocks."""
    R = len(columns)
    if not (columns == columns[0]).all():
        return 1
    return max(n for n in range(1, max(1, min(R, most)) + 1) if R % n == 0)
