"""One engine for every position-based pattern: softmax attention that touches only live blocks.

A row is one block of queries against its live key blocks: two matrix products and a softmax over the whole row. The
backward recomputes the row from the saved log-sum-exp. Rows are run in one of two ways:

* looped over, one at a time (on accelerators, many): 2-D products, which XLA:CPU runs best where a row is wide. dK and
  dV are accumulated transposed, (H, S), because p.T @ do runs three times slower there than do.T @ p.
* batched, where each row's keys are a block further than the last one's (bands, runs, residues): rows are narrow, and a
  loop over them would cost more than it computes; their keys are shifted views of one slab, so nothing is gathered.

Patterns whose parts need different orders of positions
(a band and a residue, say) are run part by part and merged exactly by their log-sum-exps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.layout import PAD, Group, Part, layout
from xformers_lab.attention._engine.pattern import Pattern

MASKED = -1e30
# The running maximum never falls below this, so a row that sees no key gets weights exp(MASKED - EMPTY) = 0.
EMPTY = MASKED / 2
# Scores computed at once, where rows are batched: what the caches of a CPU hold, or what fills an accelerator.
CPU_SCORES = 1 << 20
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
            o, l = _batched_rows(view, group) if group.diagonal else _looped_rows(view, group)
            if len(group.rows) == len(out):
                out, stat = o, l
            else:
                out, stat = out.at[group.rows].set(o), stat.at[group.rows].set(l)
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
        grads, deltas, lses = (view.block_queries(x) for x in (grad, delta, lse))
        totals = _Totals(view, dbias)
        dq_part = jnp.zeros((len(part.queries) // blocks[0], blocks[0], q.shape[1]), jnp.float32)
        for group in part.groups:
            backward = _batched_rows_backward if group.diagonal else _looped_rows_backward
            dq_rows, totals = backward(view, group, (grads, deltas, lses), totals)
            dq_part = dq_rows if len(group.rows) == len(dq_part) else dq_part.at[group.rows].set(dq_rows)
        dq += view.unblock_queries(dq_part)
        dk += view.unblock_keys(totals.keys())
        dv += view.unblock_keys(totals.values())
        dbias = totals.bias
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dbias


_attend.defvjp(_forward, _backward)


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


# ---- rows in a loop ----------------------------------------------------------------------------------------------


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
    """dq (R, block, H) of a group, and the totals with what it adds to them."""
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
        columns = jnp.asarray(group.columns)[rows]
        scatter = lambda into, x: _scatter(into, x, columns, view.block_k)
        return (scatter(dk, dkT), scatter(dv, dvT), jax.tree.map(lambda a, b: a + b.sum(0), db, dbias)), dq

    carry, at_once = (*totals.start_transposed(), totals.bias), rows_at_once(group, view.blocks)
    if at_once == 1:
        carry, dq = lax.scan(one, carry, np.arange(len(group.rows)))
    else:
        carry, dq = _scan_chunks(many, carry, len(group.rows), at_once)
    dk, dv, totals.bias = carry
    totals.transposed = dk, dv
    return dq, totals


def _scan_chunks(step, carry, rows: int, at_once: int):
    """scan over chunks of rows, the last one shorter; step gives (carry, one output per row)."""
    whole = rows // at_once * at_once
    carry, out = lax.scan(step, carry, np.arange(whole).reshape(-1, at_once))
    out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    if whole < rows:
        carry, rest = step(carry, np.arange(whole, rows))
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
    return carry, out


def _scatter(into, x, columns, block):
    """Add (R, H, M * block) at key blocks columns (R, M) of (H, S)."""
    H = into.shape[0]
    x = x.reshape(x.shape[0], H, -1, block).transpose(1, 0, 2, 3).reshape(H, -1, block)
    return into.reshape(H, -1, block).at[:, columns.reshape(-1)].add(x).reshape(into.shape)


def rows_at_once(group: Group, blocks: tuple[int, int]) -> int:
    """How many rows of a group are computed together."""
    if jax.default_backend() != "cpu":
        scores = ACCELERATOR_SCORES
    elif group.diagonal:
        scores = CPU_SCORES
    else:
        return 1
    return int(np.clip(scores // (group.columns.shape[1] * blocks[0] * blocks[1]), 1, len(group.rows)))


def largest_array(pattern: Pattern, T: int, S: int, H: int, blocks: tuple[int, int]) -> int:
    """Elements of the largest array of one head: its keys, or the scores or keys of rows computed together."""
    parts = layout(pattern, T, S, *blocks)
    groups = [group for part in parts for group in part.groups]
    rows = [rows_at_once(group, blocks) * group.columns.shape[1] * blocks[1] * max(blocks[0], H) for group in groups]
    return max(max(len(part.keys) for part in parts) * H, *rows)


# ---- rows in a batch: row r of the group sees the blocks first + r, first + r + 1, ... -----------------------------


def _batched_rows(view: "_View", group: Group):
    """The rows of a diagonal group: outputs (R, block, H) and log-sum-exps (R, block)."""

    def chunk(carry, rows):
        s, _, values = view.slab_scores(group, rows)
        m = jnp.maximum(s.max(-1, keepdims=True), EMPTY)
        p = jnp.exp(s - m)
        l = jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
        o = jnp.einsum("rqk,rkh->rqh", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return carry, (o / l, (m + jnp.log(l))[..., 0])

    return _scan_chunks(chunk, None, len(group.rows), rows_at_once(group, view.blocks))[1]


def _batched_rows_backward(view: "_View", group: Group, incoming, totals: _Totals):
    """dq (R, block, H) of a diagonal group, and the totals with what it adds to them."""
    exact = {"preferred_element_type": jnp.float32}
    M = group.columns.shape[1]

    def chunk(carry, rows):
        dk, dv, db = carry
        s, keys, values = view.slab_scores(group, rows)
        at = group.rows[0] + rows[0]
        q, g, delta, lse = (lax.dynamic_slice_in_dim(x, at, len(rows)) for x in (view.q, *incoming))
        p = jnp.exp(s - lse[..., None])
        ds = p * (jnp.einsum("rqh,rkh->rqk", g, values, **exact) - delta[..., None])
        db = jax.tree.map(jnp.add, db, view.pull_bias(view.slab_positions(group, rows), ds))
        p, ds = p.astype(values.dtype), ds.astype(keys.dtype)
        first = group.columns[0, 0] + rows[0]
        dk = _add_slab(dk, jnp.einsum("rhq,rqk->rhk", q.swapaxes(1, 2), ds, **exact), first, M)
        dv = _add_slab(dv, jnp.einsum("rhq,rqk->rhk", g.swapaxes(1, 2), p, **exact), first, M)
        return (dk, dv, db), jnp.einsum("rqk,rkh->rqh", ds, keys, **exact)

    carry = (*totals.start_blocked(), totals.bias)
    (dk, dv, totals.bias), dq = _scan_chunks(chunk, carry, len(group.rows), rows_at_once(group, view.blocks))
    totals.blocked = dk, dv
    return dq, totals


def _slab(blocks, first, R: int, M: int):
    """(R, M * block, ...): row r holds blocks first + r to first + r + M - 1 of (N, block, ...)."""
    slab = lax.dynamic_slice_in_dim(blocks, first, R + M - 1)
    return jnp.concatenate([slab[j : j + R] for j in range(M)], 1)


def _add_slab(into, x, first, M: int):
    """The transpose of `_slab`: add (R, H, M * block) where its rows came from in (blocks, H, block)."""
    R, block = x.shape[0], into.shape[2]
    slab = lax.dynamic_slice_in_dim(into, first, R + M - 1)
    for j in range(M):
        slab = slab.at[j : j + R].add(x[:, :, j * block : (j + 1) * block])
    return lax.dynamic_update_slice_in_dim(into, slab, first, 0)


class _View:
    """One part's arrays in blocks, in the part's order of positions."""

    def __init__(self, part: Part, q, k, v, real, bias, T, S, blocks):
        self.part, self.real, self.bias, self.T, self.S = part, real, bias, T, S
        self.blocks, (self.block_q, self.block_k) = blocks, blocks
        self.shift, self.lead = S - T, part.lead * self.block_k
        self.q = self.block_queries(q)
        # Positions and padding hang on the data through this zero: else differentiation sees that masks do not, and
        # stores every one of them for the backward, a T x S array in all.
        self.zero = lax.optimization_barrier((jnp.zeros((), jnp.int32), q[:1, :1]))[0]
        self.k, self.v = (self._in_order(x, part.keys, 0) for x in (k, v))
        padded = len(part.keys) != S or not part.natural
        if real is None and padded:
            real = jnp.ones(S, bool)
        self.real = None if real is None else self._in_order(real, part.keys, 0) & (self.zero == 0)
        self.query_at = None if part.natural else jnp.asarray(part.queries).reshape(-1, self.block_q)
        self.key_at = None if part.natural else jnp.asarray(part.keys)

    def _in_order(self, x, positions: np.ndarray, shift: int):
        """x by positions - shift; zeros (False) where a position is padding."""
        if self.part.natural:
            lead = self.lead if positions is self.part.keys else 0
            return jnp.pad(x, [(lead, len(positions) - x.shape[0] - lead)] + [(0, 0)] * (x.ndim - 1))
        index = np.where(positions == PAD, x.shape[0], positions - shift)
        return jnp.take(x, index, axis=0, mode="fill", fill_value=0)

    def block_queries(self, x):
        return self._in_order(x, self.part.queries, self.shift).reshape(-1, self.block_q, *x.shape[1:])

    def unblock_queries(self, x):
        return self._to_natural(x.reshape(-1, *x.shape[2:]), self.part.queries, self.shift, self.T)

    def unblock_keys(self, x):
        return self._to_natural(x, self.part.keys, 0, self.S)

    def _to_natural(self, x, positions: np.ndarray, shift: int, length: int):
        if self.part.natural:
            lead = self.lead if positions is self.part.keys else 0
            return x[lead : lead + length]
        back = np.empty(length, np.int32)
        back[positions[positions != PAD] - shift] = np.nonzero(positions != PAD)[0]
        return x[back]

    def row(self, group: Group, index):
        return jnp.asarray(group.rows)[index]

    def columns(self, group: Group, index):
        """Where a row's keys are: (start, size) of a run, or (M,) block numbers."""
        if not group.run:
            return jnp.asarray(group.columns)[index]
        size = group.columns.shape[1] * self.block_k
        same = (group.columns[:, 0] == group.columns[0, 0]).all()
        start = int(group.columns[0, 0]) if same else jnp.asarray(group.columns[:, 0])[index]
        return start * self.block_k, size

    def _at(self, x, cols):
        if isinstance(cols, tuple):
            start, size = cols
            return x if size == x.shape[0] else lax.dynamic_slice_in_dim(x, start, size, 0)
        return x.reshape(-1, self.block_k, *x.shape[1:])[cols].reshape(-1, *x.shape[1:])

    def keys(self, cols):
        return self._at(self.k, cols)

    def values(self, cols):
        return self._at(self.v, cols)

    def positions(self, i, cols):
        """Natural positions of the queries (block, 1) and keys (1, M * block) of a row."""
        if self.query_at is None or self.key_at is None:
            q = self.shift + i * self.block_q + jnp.arange(self.block_q)
            if isinstance(cols, tuple):
                k = cols[0] + jnp.arange(cols[1]) - self.lead
            else:
                k = (cols[:, None] * self.block_k + jnp.arange(self.block_k)).reshape(-1) - self.lead
        else:
            q, k = self.query_at[i], self._at(self.key_at, cols)
        return q[:, None] + self.zero, k[None]

    def scores(self, group: Group, index):
        """Masked scores (block, M * block) of a row, and its columns."""
        i, cols = self.row(group, index), self.columns(group, index)
        s = jnp.dot(self.q[i], self.keys(cols).T, preferred_element_type=jnp.float32)
        if self.bias is not None:
            s = s + self.bias(*self.positions(i, cols))
        if not group.whole:
            s = jnp.where(self.part.pattern(*self.positions(i, cols)), s, MASKED)
        if self.real is not None:
            s = jnp.where(self._at(self.real, cols)[None], s, MASKED)
        return s, cols

    def slab_positions(self, group: Group, rows):
        """Natural positions of the queries (R, block, 1) and keys (R, 1, M * block) of neighbouring rows of a group."""
        R, M = len(rows), group.columns.shape[1]
        at, first = group.rows[0] + rows[0], group.columns[0, 0] + rows[0]
        if self.query_at is None or self.key_at is None:
            q = self.shift + (at + jnp.arange(R))[:, None] * self.block_q + jnp.arange(self.block_q)
            k = (first + jnp.arange(R))[:, None] * self.block_k + jnp.arange(M * self.block_k) - self.lead
        else:
            q = lax.dynamic_slice_in_dim(self.query_at, at, R)
            k = _slab(self.key_at.reshape(-1, self.block_k), first, R, M)
        return q[:, :, None] + self.zero, k[:, None]

    def slab_scores(self, group: Group, rows):
        """Masked scores (R, block, M * block) of neighbouring rows of a group, and their keys and values."""
        R, M = len(rows), group.columns.shape[1]
        at, first = group.rows[0] + rows[0], group.columns[0, 0] + rows[0]
        blocks = lambda x: x.reshape(-1, self.block_k, *x.shape[1:])
        keys, values = (_slab(blocks(x), first, R, M) for x in (self.k, self.v))
        q = lax.dynamic_slice_in_dim(self.q, at, R)
        s = jnp.einsum("rqh,rkh->rqk", q, keys, preferred_element_type=jnp.float32)
        positions = self.slab_positions(group, rows)
        if self.bias is not None:
            s = s + self.bias(*positions)
        if not group.whole:
            s = jnp.where(self.part.pattern(*positions), s, MASKED)
        if self.real is not None:
            s = jnp.where(_slab(blocks(self.real), first, R, M)[:, None], s, MASKED)
        return s, keys, values

    def pull_bias(self, positions, ds):
        """The gradient of the bias's leaves from the gradient of scores at these positions."""
        if self.bias is None:
            return None
        return jax.vjp(lambda bias: bias(*positions) + jnp.zeros_like(ds), self.bias)[1](ds)[0]
