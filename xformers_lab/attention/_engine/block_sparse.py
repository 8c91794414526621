"""One engine for every position-based pattern: softmax attention that touches only live blocks.

A row is one block of queries against its live key blocks: two matrix products and a softmax over the whole row. The
backward recomputes the row from the saved log-sum-exp. Rows are run in one of two ways:

* looped over, one at a time (on accelerators, many): 2-D products, which XLA:CPU runs best where a row is wide. dK and
  dV are accumulated transposed, (H, S), because p.T @ do runs three times slower there than do.T @ p.
* batched, where rows are narrow and a loop over them would cost more than it computes. Key blocks at the same distance
  from every row are shifted views of the keys, those that all rows share take one wide product, others are gathered.

Patterns whose parts need different orders of positions
(a band and a residue, say) are run part by part and merged exactly by their log-sum-exps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.layout import Group, Part, layout
from xformers_lab.attention._engine.order import PAD

MASKED = -1e30
# The running maximum never falls below this, so a row that sees no key gets weights exp(MASKED - EMPTY) = 0.
EMPTY = MASKED / 2
# Scores computed at once, where rows are batched: on a CPU a loop over fewer costs more than the caches save; or what
# fills an accelerator. The backward holds more than one array of them.
CPU_SCORES = 1 << 21
ACCELERATOR_SCORES = 1 << 24


def block_sparse(q, k, v, *, pattern: Pattern, real=None, bias=None, blocks: tuple[int, int]):
    """Softmax attention over the keys that `pattern` allows and `real` marks; zeros where there is none.

    q (T, H), k and v (S, H), real (S,) bool or None; query t stands at position S - T + t. bias is a pytree that is
    called with (T', 1) and (1, S') position arrays and gives scores to add, differentiable in its leaves. blocks is
    (queries, keys) per block. Returns (T, H) in v's type; scores and sums are float32.
    """
    return _attend(q, k, v, real, bias, pattern, blocks)


def dense(q, k, v, *, pattern: Pattern, real=None, bias=None):
    """The same by definition: one (T, S) matrix of scores."""
    T, S = q.shape[0], k.shape[0]
    at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
    seen = pattern(at, keys) if real is None else pattern(at, keys) & real[None]
    return softmax(scores(q, k, bias), seen, v)


def scores(q, k, bias=None):
    """(T, S) scaled dot products in float32, with the bias of query position S - T + t and key position s."""
    T, S = q.shape[0], k.shape[0]
    s = jnp.dot(q * q.shape[-1] ** -0.5, k.T, preferred_element_type=jnp.float32)
    return s if bias is None else s + bias(jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None])


def softmax(s, seen, v):
    """softmax(s) @ v over the seen keys; a row that sees none gives zeros."""
    s = jnp.where(seen, s, MASKED)
    p = jnp.exp(s - lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), EMPTY)))
    p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    return jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, real, bias, pattern, blocks):
    return _forward(q, k, v, real, bias, pattern, blocks)[0]


def _forward(q, k, v, real, bias, pattern, blocks):
    T, S, H = q.shape[0], k.shape[0], v.shape[1]
    scaled = (q * q.shape[-1] ** -0.5).astype(q.dtype)
    total, lse = None, None
    for part in layout(pattern, T, S, *blocks):
        view = _View(part, scaled, k, v, real, bias, T, S, blocks)
        out = jnp.zeros((len(part.queries) // blocks[0], blocks[0], H), jnp.float32)
        stat = jnp.full(out.shape[:2], EMPTY, jnp.float32)
        for group in part.groups:
            o, l = _batched_rows(view, group) if group.batched else _looped_rows(view, group)
            out, stat = _placed(out, group.rows, o), _placed(stat, group.rows, l)
        out, stat = view.unblock_queries(out), view.unblock_queries(stat)
        if total is None or lse is None:
            total, lse = out, stat
        else:
            both = jnp.logaddexp(lse, stat)
            total = total * jnp.exp(lse - both)[:, None] + out * jnp.exp(stat - both)[:, None]
            lse = both
    assert total is not None and lse is not None
    total = total.astype(v.dtype)
    return total, (q, k, v, real, bias, total, lse)


def _backward(pattern, blocks, residuals, grad):
    q, k, v, real, bias, out, lse = residuals
    T, S = q.shape[0], k.shape[0]
    scale = q.shape[-1] ** -0.5
    scaled = (q * scale).astype(q.dtype)
    delta = (out.astype(jnp.float32) * grad).sum(-1)
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dbias = jax.tree.map(jnp.zeros_like, bias)
    for part in layout(pattern, T, S, *blocks):
        view = _View(part, scaled, k, v, real, bias, T, S, blocks)
        incoming = tuple(view.block_queries(x) for x in (grad, delta, lse))
        totals = _Totals(view, dbias)
        dq_part = jnp.zeros((len(part.queries) // blocks[0], blocks[0], q.shape[1]), jnp.float32)
        for group in part.groups:
            backward = _batched_rows_backward if group.batched else _looped_rows_backward
            dq_part = _placed(dq_part, group.rows, backward(view, group, incoming, totals))
        dq += view.unblock_queries(dq_part)
        dk += view.unblock_keys(totals.keys())
        dv += view.unblock_keys(totals.values())
        dbias = totals.bias
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dbias


_attend.defvjp(_forward, _backward)


def _placed(into, rows: np.ndarray, x):
    """x (R, ...) in the place of these rows."""
    if len(rows) == into.shape[0]:
        return x
    if neighbours(rows):
        return lax.dynamic_update_slice_in_dim(into, x, int(rows[0]), 0)
    return into.at[rows].set(x)


def neighbours(rows: np.ndarray) -> bool:
    return bool((np.diff(rows) == 1).all())


class _Totals:
    """Gradients of one part's keys, values and bias while its groups add to them.

    Looped rows add to (H, S) arrays, batched ones to (blocks, H, block) arrays; each exists once something adds to it.
    """

    def __init__(self, view: "_View", bias):
        self.view, self.bias = view, bias
        self.transposed = self.blocked = None

    def start_transposed(self):
        width = self.view.k.shape[0]
        if self.transposed is None:
            shapes = ((self.view.k.shape[1], width), (self.view.v.shape[1], width))
            self.transposed = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        return self.transposed

    def start_blocked(self):
        if self.blocked is None:
            self.blocked = tuple(
                jnp.zeros((x.shape[0] // self.view.block_k, x.shape[1], self.view.block_k), jnp.float32)
                for x in (self.view.k, self.view.v)
            )
        return self.blocked

    def _sum(self, which: int):
        """(S, H); zeros where a part has no live block at all."""
        found = None if self.transposed is None and self.blocked else self.start_transposed()[which].T
        if self.blocked is None:
            return found
        blocked = self.blocked[which].swapaxes(1, 2).reshape(-1, self.blocked[which].shape[1])
        return blocked if found is None else found + blocked

    def keys(self):
        return self._sum(0)

    def values(self):
        return self._sum(1)


def rows_at_once(group: Group, blocks: tuple[int, int]) -> int:
    """How many rows of a group are computed together, so that all chunks are alike."""
    if jax.default_backend() != "cpu":
        scores = ACCELERATOR_SCORES
    elif group.batched:
        scores = CPU_SCORES
    else:
        return 1
    most = int(np.clip(scores // (group.width * blocks[0] * blocks[1]), 1, len(group.rows)))
    return -(-len(group.rows) // -(-len(group.rows) // most))


def largest_array(pattern: Pattern, T: int, S: int, H: int, blocks: tuple[int, int]) -> int:
    """Elements of the largest array of one head: its keys, or the scores or keys of rows computed together."""
    parts = layout(pattern, T, S, *blocks)
    groups = [group for part in parts for group in part.groups]
    # Batched rows hold the scores of their own keys and of shared ones apart.
    width = lambda group: max(group.own.shape[1], len(group.shared)) if group.batched else group.width
    rows = [rows_at_once(group, blocks) * width(group) * blocks[1] * max(blocks[0], H) for group in groups]
    return max(max(len(part.keys) for part in parts) * H, *rows)


def _scan_chunks(step, carry, rows: int, at_once: int):
    """scan over chunks of rows, the last one shorter; step gives (carry, one output per row)."""
    whole = rows // at_once * at_once
    carry, out = lax.scan(step, carry, np.arange(whole).reshape(-1, at_once))
    out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    if whole < rows:
        carry, rest = step(carry, np.arange(whole, rows))
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
    return carry, out


# ---- rows in a loop ------------------------------------------------------------------------------------------------


def _looped_rows(view: "_View", group: Group):
    """The rows of a group: outputs (R, block, H) and log-sum-exps (R, block)."""

    def row(index):
        s, cols = view.scores(group, index)
        m = jnp.maximum(s.max(-1, keepdims=True), EMPTY)
        p = jnp.exp(s - m)
        l = jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
        o = jnp.dot(p.astype(view.v.dtype), view.values(cols), preferred_element_type=jnp.float32)
        return o / l, (m + jnp.log(l))[:, 0]

    at_once = rows_at_once(group, view.blocks)
    return lax.map(row, np.arange(len(group.rows)), batch_size=at_once if at_once > 1 else None)


def _looped_rows_backward(view: "_View", group: Group, incoming, totals: _Totals):
    """dq (R, block, H) of a group; what it gives to keys, values and bias is added to the totals."""
    grads, deltas, lses = incoming

    def row(index):
        i = view.row(group, index)
        s, cols = view.scores(group, index)
        qi, g, keys, values = view.q[i], grads[i], view.keys(cols), view.values(cols)
        p = jnp.exp(s - lses[i][:, None])
        dp = jnp.dot(g, values.T, preferred_element_type=jnp.float32)
        ds = p * (dp - deltas[i][:, None])
        dbias = view.pull_bias(view.positions(i, cols), ds)
        p, ds = p.astype(values.dtype), ds.astype(keys.dtype)
        dkT = jnp.dot(qi.T, ds, preferred_element_type=jnp.float32)
        dvT = jnp.dot(g.T, p, preferred_element_type=jnp.float32)
        return jnp.dot(ds, keys, preferred_element_type=jnp.float32), dkT, dvT, dbias, cols

    def add(into, x, cols):
        if isinstance(cols, tuple):  # a run: one window of columns
            start, size = cols
            if size == into.shape[1]:
                return into + x
            window = lax.dynamic_slice_in_dim(into, start, size, 1) + x
            return lax.dynamic_update_slice_in_dim(into, window, start, 1)
        H, block = into.shape[0], view.block_k
        return into.reshape(H, -1, block).at[:, cols].add(x.reshape(H, -1, block)).reshape(into.shape)

    def one(carry, index):
        dk, dv, db = carry
        dq, dkT, dvT, dbias, cols = row(index)
        return (add(dk, dkT, cols), add(dv, dvT, cols), jax.tree.map(jnp.add, db, dbias)), dq

    def many(carry, rows):
        dk, dv, db = carry
        dq, dkT, dvT, dbias = jax.vmap(lambda index: row(index)[:4])(rows)
        columns = jnp.asarray(group.own)[rows]
        scatter = lambda into, x: _scatter(into, x, columns, view.block_k)
        return (scatter(dk, dkT), scatter(dv, dvT), jax.tree.map(lambda a, b: a + b.sum(0), db, dbias)), dq

    carry, at_once = (*totals.start_transposed(), totals.bias), rows_at_once(group, view.blocks)
    if at_once == 1:
        carry, dq = lax.scan(one, carry, np.arange(len(group.rows)))
    else:
        carry, dq = _scan_chunks(many, carry, len(group.rows), at_once)
    totals.transposed, totals.bias = carry[:2], carry[2]
    return dq


def _scatter(into, x, columns, block):
    """Add (R, H, M * block) at key blocks columns (R, M) of (H, S)."""
    H = into.shape[0]
    x = x.reshape(x.shape[0], H, -1, block).transpose(1, 0, 2, 3).reshape(H, -1, block)
    return into.reshape(H, -1, block).at[:, columns.reshape(-1)].add(x).reshape(into.shape)


# ---- rows in a batch -----------------------------------------------------------------------------------------------


def _batched_rows(view: "_View", group: Group):
    """The rows of a group: outputs (R, block, H) and log-sum-exps (R, block)."""
    queries = view.q, _across(view.q)

    def chunk(carry, rows):
        pieces, q = view.pieces(group, rows), view.of_rows(queries, group, rows)
        scores = [piece.scores(q) for piece in pieces]
        m = jnp.maximum(_joined(jnp.maximum, [s.max(-1, keepdims=True) for s in scores]), EMPTY)
        weights = [jnp.exp(s - m) for s in scores]
        l = jnp.maximum(_joined(jnp.add, [p.sum(-1, keepdims=True) for p in weights]), 1e-30)
        o = _joined(jnp.add, [piece.weighed(p, view.v) for piece, p in zip(pieces, weights, strict=True)])
        return carry, (o / l, (m + jnp.log(l))[..., 0])

    return _scan_chunks(chunk, None, len(group.rows), rows_at_once(group, view.blocks))[1]


def _batched_rows_backward(view: "_View", group: Group, incoming, totals: _Totals):
    """dq (R, block, H) of a group; what it gives to keys, values and bias is added to the totals."""
    grads, deltas, lses = incoming
    queries, grads = (view.q, _across(view.q)), (grads, _across(grads))

    def chunk(carry, rows):
        dk, dv, db = carry
        pieces, given = view.pieces(group, rows), (queries, grads, deltas, lses)
        q, g, delta, lse = view.of_rows(given, group, rows)
        dq = []
        for piece in pieces:
            p = jnp.exp(piece.scores(q) - lse[..., None])
            ds = p * (piece.dots(g, piece.values) - delta[..., None])
            db = jax.tree.map(jnp.add, db, view.pull_bias(piece.positions, ds))
            dk, dv = piece.added(dk, q[0], ds), piece.added(dv, g[0], p)
            dq.append(piece.weighed(ds, view.k))
        return (dk, dv, db), _joined(jnp.add, dq)

    carry = (*totals.start_blocked(), totals.bias)
    carry, dq = _scan_chunks(chunk, carry, len(group.rows), rows_at_once(group, view.blocks))
    totals.blocked, totals.bias = carry[:2], carry[2]
    return dq


def _across(x):
    """(N, block, H) -> (N, H, block), really in that order.

    XLA:CPU runs batches of small products more than twice as fast where both sides are contracted on their middle axis,
    and would undo a transposition that it sees.
    """
    return lax.optimization_barrier(jnp.swapaxes(x, 1, 2))


def _joined(function, arrays):
    return functools.reduce(function, arrays)


class _Piece:
    """Key blocks of some rows that are computed together: keys and values, positions, and what masks their scores."""

    def __init__(self, view: "_View", positions, mask, whole: bool):
        self.view, self.whole = view, whole
        # Kept as they are, so that no index is computed again for every score.
        self.positions, self.mask = lax.optimization_barrier((positions, mask))
        self.keys, self.values = self.taken(view.keys_across), self.taken(view.values_across)

    def scores(self, q):
        """Masked scores (R, block, n)."""
        s = self.dots(q, self.keys)
        if self.view.bias is not None:
            s = s + self.view.bias(*self.positions)
        if not self.whole:
            s = jnp.where(self.view.part.pattern(*self.positions), s, MASKED)
        s = s if self.mask is None else jnp.where(self.mask, s, MASKED)
        return lax.optimization_barrier(s)

    def taken(self, blocks):
        """From (blocks, H, block) what the piece has of keys."""
        raise NotImplementedError

    def dots(self, x, keys):
        """Queries, (R, block, H) and (R, H, block), times keys -> (R, block, n)."""
        raise NotImplementedError

    def weighed(self, p, x):
        """(R, block, n) times the piece's rows of x (S, H), keys or values -> (R, block, H)."""
        raise NotImplementedError

    def added(self, into, x, p):
        """into (blocks, H, block), with x^T p of x (R, block, H) and p (R, block, n) added at the piece's keys."""
        raise NotImplementedError


class _Own(_Piece):
    """Every row's own key blocks, (R, H, n): at the group's offsets, and others."""

    def __init__(self, view: "_View", group: Group, rows):
        self.offsets, self.rows, self.first = group.offsets, rows, int(group.rows[0]) + rows[0]
        self.others = jnp.asarray(group.own[:, len(group.offsets) :])[rows]
        columns = jnp.asarray(group.own)[rows]
        mask = view.known_of(columns) if not group.whole or view.real is not None else None
        if group.own_live is not None:
            live = jnp.repeat(jnp.asarray(group.own_live)[rows], view.block_k, axis=1)
            mask = live if mask is None else mask & live
        queries, keys = view.query_positions(group, rows), view.key_positions(columns)
        mask = None if mask is None else (mask & (view.zero == 0))[:, None]
        super().__init__(view, (queries, keys[:, None]), mask, group.whole)

    def taken(self, blocks):
        return self._joined(blocks, 2)

    def _joined(self, blocks, axis: int):
        found = [lax.dynamic_slice_in_dim(blocks, self.first + offset, len(self.rows)) for offset in self.offsets]
        others = [blocks[self.others[:, place]] for place in range(self.others.shape[1])]
        return jnp.concatenate([*found, *others], axis)

    def dots(self, x, keys):
        return jnp.einsum("rhq,rhk->rqk", x[1], keys, preferred_element_type=jnp.float32)

    def weighed(self, p, x):
        rows = self._joined(self.view.blocked(x), 1)
        return jnp.einsum("rqk,rkh->rqh", p.astype(x.dtype), rows, preferred_element_type=jnp.float32)

    def added(self, into, x, p):
        R, H, block, O = len(self.rows), into.shape[1], into.shape[2], len(self.offsets)
        found = jnp.einsum("rqh,rqk->rhk", x, p.astype(x.dtype), preferred_element_type=jnp.float32)
        for place, offset in enumerate(self.offsets):
            more = found[..., place * block : (place + 1) * block]
            more = more + lax.dynamic_slice_in_dim(into, self.first + offset, R)
            into = lax.dynamic_update_slice_in_dim(into, more, self.first + offset, 0)
        if self.others.shape[1]:
            into = into.at[self.others].add(found[..., O * block :].reshape(R, H, -1, block).swapaxes(1, 2))
        return into


class _Shared(_Piece):
    """Key blocks that all rows share, (H, n)."""

    def __init__(self, view: "_View", group: Group, rows):
        self.columns = group.shared
        mask = view.known_of(group.shared) if not group.shared_whole or view.real is not None else None
        if group.shared_live is not None:
            live = jnp.repeat(jnp.asarray(group.shared_live)[rows], view.block_k, axis=1)[:, None]
            mask = live if mask is None else mask & live
        queries, keys = view.query_positions(group, rows), view.key_positions(group.shared)
        mask = None if mask is None else mask & (view.zero == 0)
        super().__init__(view, (queries, keys[None, None]), mask, group.shared_whole)

    def taken(self, blocks):
        return blocks[self.columns].swapaxes(0, 1).reshape(blocks.shape[1], -1)

    def dots(self, x, keys):
        return self._product(x[0], keys)

    def weighed(self, p, x):
        rows = self.view.blocked(x)[self.columns].reshape(-1, x.shape[1])
        return self._product(p.astype(x.dtype), rows)

    def _product(self, x, keys):
        flat = jnp.dot(x.reshape(-1, x.shape[2]), keys, preferred_element_type=jnp.float32)
        return flat.reshape(*x.shape[:2], -1)

    def added(self, into, x, p):
        x, p = (y.reshape(-1, y.shape[2]) for y in (x, p.astype(x.dtype)))
        found = jnp.dot(x.T, p, preferred_element_type=jnp.float32).reshape(into.shape[1], -1, into.shape[2])
        return into.at[self.columns].add(found.swapaxes(0, 1))


class _View:
    """One part's arrays in blocks, in the part's order of positions."""

    def __init__(self, part: Part, q, k, v, real, bias, T, S, blocks):
        self.part, self.bias, self.T, self.S = part, bias, T, S
        self.blocks, (self.block_q, self.block_k) = blocks, blocks
        self.shift, self.lead = S - T, part.lead * self.block_k
        self.q = self.block_queries(q)
        # Positions and padding hang on the data through this zero: else differentiation sees that masks do not, and
        # stores every one of them for the backward, a T x S array in all.
        self.zero = lax.optimization_barrier((jnp.zeros((), jnp.int32), q[:1, :1]))[0]
        self.k, self.v = self._keys_in_order(k), self._keys_in_order(v)
        if any(group.batched for group in part.groups):
            self.keys_across, self.values_across = _across(self.blocked(self.k)), _across(self.blocked(self.v))
        # Which keys there are: known also says where a block is padded, which is asked where one is not wholly live.
        self.real = None if real is None else self._keys_in_order(real) & (self.zero == 0)
        there = part.keys != PAD
        self.known = self.real if self.real is not None or there.all() else jnp.asarray(there) & (self.zero == 0)
        self.query_at = None if part.natural_queries else jnp.asarray(part.queries).reshape(-1, self.block_q)
        self.key_at = None if part.natural_keys else jnp.asarray(part.keys).reshape(-1, self.block_k)

    def _keys_in_order(self, x):
        """x by key positions; zeros (False) where a position is padding."""
        if self.part.natural_keys:
            return jnp.pad(x, [(self.lead, len(self.part.keys) - x.shape[0] - self.lead)] + [(0, 0)] * (x.ndim - 1))
        return _taken(x, self.part.keys)

    def block_queries(self, x):
        if self.part.natural_queries:
            x = jnp.pad(x, [(0, len(self.part.queries) - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        else:
            x = _taken(x, np.where(self.part.queries == PAD, PAD, self.part.queries - self.shift))
        return x.reshape(-1, self.block_q, *x.shape[1:])

    def unblock_queries(self, x):
        x = x.reshape(-1, *x.shape[2:])
        return x[: self.T] if self.part.natural_queries else x[_places(self.part.queries, self.shift, self.T)]

    def unblock_keys(self, x):
        if self.part.natural_keys:
            return x[self.lead : self.lead + self.S]
        return _taken(x, _places(self.part.keys, 0, self.S))

    def blocked(self, x):
        return x.reshape(-1, self.block_k, *x.shape[1:])

    # Rows in a loop.

    def row(self, group: Group, index):
        return jnp.asarray(group.rows)[index]

    def columns(self, group: Group, index):
        """Where a row's keys are: (start, size) of a run, or (M,) block numbers."""
        if not group.run:
            return jnp.asarray(group.own)[index]
        size = group.own.shape[1] * self.block_k
        same = (group.own[:, 0] == group.own[0, 0]).all()
        start = int(group.own[0, 0]) if same else jnp.asarray(group.own[:, 0])[index]
        return start * self.block_k, size

    def _at(self, x, cols):
        if isinstance(cols, tuple):
            start, size = cols
            return x if size == x.shape[0] else lax.dynamic_slice_in_dim(x, start, size, 0)
        return self.blocked(x)[cols].reshape(-1, *x.shape[1:])

    def keys(self, cols):
        return self._at(self.k, cols)

    def values(self, cols):
        return self._at(self.v, cols)

    def positions(self, i, cols):
        """Natural positions of the queries (block, 1) and keys (1, M * block) of a row."""
        own = self.query_at
        q = self.shift + i * self.block_q + jnp.arange(self.block_q) if own is None else own[i]
        if not isinstance(cols, tuple):
            k = self.key_positions(cols)
        elif self.key_at is None:
            k = cols[0] + jnp.arange(cols[1]) - self.lead
        else:
            k = self._at(self.key_at.reshape(-1), cols)
        return q[:, None] + self.zero, k[None]

    def scores(self, group: Group, index):
        """Masked scores (block, M * block) of a row, and its columns."""
        i, cols = self.row(group, index), self.columns(group, index)
        s = jnp.dot(self.q[i], self.keys(cols).T, preferred_element_type=jnp.float32)
        if self.bias is not None:
            s = s + self.bias(*self.positions(i, cols))
        if not group.whole:
            s = jnp.where(self.part.pattern(*self.positions(i, cols)), s, MASKED)
        known = self.real if group.whole else self.known
        if known is not None:
            s = jnp.where(self._at(known, cols)[None], s, MASKED)
        if group.own_live is not None:
            live = jnp.repeat(jnp.asarray(group.own_live)[index], self.block_k) & (self.zero == 0)
            s = jnp.where(live[None], s, MASKED)
        return s, cols

    # Rows in a batch; rows are R neighbouring numbers within a group.

    def pieces(self, group: Group, rows) -> list["_Piece"]:
        own: list[_Piece] = [_Own(self, group, rows)] if group.own.shape[1] else []
        return [*own, _Shared(self, group, rows)] if len(group.shared) else own

    def of_rows(self, tree, group: Group, rows):
        """(query blocks, ...) -> (R, ...)."""
        if neighbours(group.rows):
            first = int(group.rows[0]) + rows[0]
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, len(rows)), tree)
        chosen = jnp.asarray(group.rows)[rows]
        return jax.tree.map(lambda x: x[chosen], tree)

    def query_positions(self, group: Group, rows):
        """(R, block, 1)."""
        if self.query_at is not None:
            return self.of_rows(self.query_at, group, rows)[..., None] + self.zero
        first = self.shift + jnp.asarray(group.rows)[rows] * self.block_q
        return (first[:, None] + jnp.arange(self.block_q))[..., None] + self.zero

    def key_positions(self, columns):
        """(..., M) key blocks -> (..., M * block)."""
        if self.key_at is not None:
            at = self.key_at[columns]
        else:
            at = columns[..., None] * self.block_k + jnp.arange(self.block_k) - self.lead
        return at.reshape(*columns.shape[:-1], -1)

    def known_of(self, columns):
        """Which keys of key blocks (..., M) there are, (..., M * block); None: all."""
        if self.known is None:
            return None
        return self.blocked(self.known)[columns].reshape(*columns.shape[:-1], -1)

    def pull_bias(self, positions, ds):
        """The gradient of the bias's leaves from the gradient of scores at these positions."""
        if self.bias is None:
            return None
        return jax.vjp(lambda bias: bias(*positions) + jnp.zeros_like(ds), self.bias)[1](ds)[0]


def _taken(x, index: np.ndarray):
    """x[index], zeros (False) where the index is negative."""
    return jnp.take(x, np.where(index < 0, x.shape[0], index), axis=0, mode="fill", fill_value=0)


def _places(positions: np.ndarray, shift: int, length: int) -> np.ndarray:
    """Where in a list of positions those from `shift` on are; PAD where one is missing."""
    there = np.nonzero(positions != PAD)[0]
    back = np.full(length, PAD, np.int32)
    back[positions[there] - shift] = there
    return back
