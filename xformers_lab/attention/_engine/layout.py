"""From a pattern to the blocks it touches: computed on the host, once per shape, never a T x S array."""

import dataclasses
import functools

import numpy as np

from xformers_lab.attention._engine.pattern import DEAD, MIXED, WHOLE, Pattern

# A row is padded to a multiple of an eighth of the widest row, so that a layout compiles to at most eight loops.
GROUPS = 8
# Marks padding in a list of positions; queries before the first key have negative positions, so -1 would not do.
PAD = -(1 << 30)
# A band is run as one diagonal of equal rows, its ends padded, where that computes at most this much more.
PADDED_BAND = 1.25
# Predicates of mixed blocks are evaluated to drop those that are dead after all, up to this many entries.
EVALUATED = 1 << 26


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Query blocks that touch equally many key blocks.

    rows (R,): the query blocks. columns (R, M): their key blocks. run: columns are M neighbours starting at
    columns[:, 0]. whole: every pair in every block is live, no predicate is needed.
    """

    rows: np.ndarray
    columns: np.ndarray
    run: bool
    whole: bool

    @property
    def diagonal(self) -> bool:
        """Neighbouring rows, each one's run a block further than the last one's: a band, or blocks of their own."""
        ahead = self.run and len(self.rows) > 1
        return ahead and bool((np.diff(self.rows) == 1).all() and (np.diff(self.columns[:, 0]) == 1).all())


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One pattern in one order of positions.

    queries (blocks of queries, flat) and keys (likewise) hold positions in the natural order, PAD where a block
    is padded; natural: apart from `lead` blocks of padded keys in front, they are 0, 1, 2, ... (for queries, S - T and
    on), so nothing is gathered. Columns of groups count the leading blocks.
    """

    pattern: Pattern
    queries: np.ndarray
    keys: np.ndarray
    natural: bool
    lead: int
    groups: tuple[Group, ...]


@functools.lru_cache(maxsize=256)
def layout(pattern: Pattern, T: int, S: int, block_q: int, block_k: int) -> tuple[Part, ...]:
    """The live blocks of `pattern` for T queries at the end of S positions, in blocks of block_q x block_k."""
    return tuple(_part(part, T, S, block_q, block_k) for part in pattern.parts())


def live_pairs(pattern: Pattern, T: int, S: int, block_q: int, block_k: int) -> int:
    """Query-key pairs that the engine computes: live blocks, with the padding of rows, times the size of a block."""
    parts = layout(pattern, T, S, block_q, block_k)
    blocks = sum(group.columns.size for part in parts for group in part.groups)
    return blocks * block_q * block_k


def _part(pattern: Pattern, T: int, S: int, block_q: int, block_k: int) -> Part:
    natural = pattern.stride == 1
    keys, key_class = _ordered(0, S, pattern.stride, block_k)
    queries, query_class = _ordered(S - T, S, pattern.stride, block_q)
    q, k = queries.reshape(-1, block_q), keys.reshape(-1, block_k)
    bounds = [*_bounds(q), *_bounds(k)]
    state = pattern.extent(bounds[0][:, None], bounds[1][:, None], bounds[2][None], bounds[3][None])
    if not natural:
        # A rectangle in natural order says nothing about one residue: only equal residues can be live.
        state = np.where(query_class[:, None] == key_class[None], MIXED, DEAD).astype(np.int8)
    padded_k = (k == PAD).any(1)
    state = np.where(padded_k[None] & (state == WHOLE), MIXED, state)
    _evaluate(pattern, q, k, state)
    # Rows of padded queries alone touch nothing; a padded query inside a block is computed and thrown away.
    lead, tail, band = _band(state) if natural else (0, 0, None)
    keys = np.pad(keys, (lead * block_k, tail * block_k), constant_values=PAD)
    return Part(pattern, queries, keys, natural, lead, (band,) if band is not None else _groups(state))


def _ordered(start: int, stop: int, stride: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions start..stop-1 by residue, each padded to whole blocks with PAD; and the residue of every block."""
    lists = [np.arange(start + (r - start) % stride, stop, stride) for r in range(stride)]
    size = -(-max(map(len, lists)) // block) * block
    padded = [np.pad(found, (0, size - len(found)), constant_values=PAD) for found in lists]
    return np.concatenate(padded).astype(np.int32), np.repeat(np.arange(stride), size // block)


def _bounds(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high = blocks.max(1)
    return np.where(blocks == PAD, high[:, None], blocks).min(1).astype(np.int64), high.astype(np.int64)


def _evaluate(pattern: Pattern, q: np.ndarray, k: np.ndarray, state: np.ndarray) -> None:
    """Settle mixed blocks by their predicate, in place."""
    rows, columns = np.nonzero(state == MIXED)
    each = q.shape[1] * k.shape[1]
    if len(rows) * each > EVALUATED:
        return
    step = max(1, (1 << 22) // each)
    for at in range(0, len(rows), step):
        i, j = rows[at : at + step], columns[at : at + step]
        qi, kj = q[i][:, :, None], k[j][:, None, :]
        seen = pattern(qi, kj) & (kj != PAD)
        asked = qi != PAD
        dead = ~(seen & asked).any((1, 2))
        whole = (seen | ~asked).all((1, 2))
        state[i[dead], j[dead]] = DEAD
        state[i[whole & ~dead], j[whole & ~dead]] = WHOLE


def _band(state: np.ndarray) -> tuple[int, int, Group | None]:
    """One diagonal group for a band of blocks, and the blocks of padding it needs before and after the keys."""
    rows, columns = np.nonzero(state != DEAD)
    if len(rows) == 0 or len(np.unique(rows)) < max(2, len(state)):
        return 0, 0, None
    low, high = int((columns - rows).min()), int((columns - rows).max())
    size = high - low + 1
    if size * len(state) > PADDED_BAND * len(rows):
        return 0, 0, None
    lead, tail = max(0, -low), max(0, len(state) - 1 + high - (state.shape[1] - 1))
    first = np.arange(len(state)) + low + lead
    group = Group(
        np.arange(len(state), dtype=np.int32), (first[:, None] + np.arange(size)).astype(np.int32), True, False
    )
    return lead, tail, group


def _groups(state: np.ndarray) -> tuple[Group, ...]:
    count = (state != DEAD).sum(1)
    widest = max(int(count.max()), 1)
    quantum = -(-widest // GROUPS)
    width = np.minimum(-(-np.maximum(count, 1) // quantum) * quantum, state.shape[1])
    groups = []
    for size in np.unique(width[count > 0]):
        rows = np.nonzero((width == size) & (count > 0))[0]
        first = np.array([np.nonzero(state[r])[0][0] for r in rows])
        last = np.array([np.nonzero(state[r])[0][-1] for r in rows])
        run = bool((last - first < size).all())
        if run:
            start = np.minimum(first, state.shape[1] - size)
            columns = start[:, None] + np.arange(size)[None]
        else:
            # Short rows repeat key blocks that are dead for them: the predicate masks those, so nothing counts twice.
            columns = np.stack([_padded(state[r], size) for r in rows])
        whole = (state[rows[:, None], columns] == WHOLE).all(1)
        for flag in (True, False):
            if (whole == flag).any():
                groups.append(
                    Group(rows[whole == flag].astype(np.int32), columns[whole == flag].astype(np.int32), run, flag)
                )
    return tuple(groups)


def _padded(row: np.ndarray, size: int) -> np.ndarray:
    """The live key blocks of a row, filled up to `size` with dead ones."""
    live, dead = np.nonzero(row != DEAD)[0], np.nonzero(row == DEAD)[0]
    return np.sort(np.concatenate([live, dead[: size - len(live)]]))
