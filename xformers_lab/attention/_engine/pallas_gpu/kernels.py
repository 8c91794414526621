"""The three kernels: outputs by blocks of queries, gradients of queries by the same, of keys and values by blocks of
keys. Each program reads its row of a table and loops over its entries, first those that need no predicate."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from xformers_lab.attention._engine.pallas_gpu.blocks import Work
from xformers_lab.attention._engine.pallas_gpu.tile import LOG2E, Marks, Rule, product, rows_of, scores, seen
from xformers_lab.attention._engine.pallas_gpu.tuning import Tuning
from xformers_lab.attention._engine.softmax import EMPTY


def forward(q, k, v, marks: Marks, work: Work, rule: Rule, tuning: Tuning, interpret: bool):
    """Outputs (B, slots block_q, N, V), float32 where others are to be added, and their log-sum-exps (B, N, slots
    block_q). q (B, T, N, H), k (B, S, K, H) and v (B, S, K, V), in whole blocks."""
    (B, _, N, _), rows = q.shape, work.programs.slots * rule.block_q
    outputs = (B, rows, N, v.shape[-1], _type(v, work)), (B, N, rows, jnp.float32)
    return _run(_forward, "attention_forward", (1, 1), q, k, v, (), marks, work, rule, tuning, interpret, outputs)


def by_rows(q, k, v, of_rows, marks: Marks, work: Work, rule: Rule, tuning: Tuning, interpret: bool):
    """Gradients of queries (B, slots block_q, N, H). of_rows: those of outputs (B, T, N, V), log-sum-exps
    and the products of outputs with their gradients (B, N, T)."""
    B, _, N, H = q.shape
    outputs = ((B, work.programs.slots * rule.block_q, N, H, _type(q, work)),)
    name = "attention_backward_queries"
    return _run(_by_rows, name, (2, 1), q, k, v, of_rows, marks, work, rule, tuning, interpret, outputs)[0]


def by_columns(q, k, v, of_rows, marks: Marks, work: Work, rule: Rule, tuning: Tuning, interpret: bool):
    """Gradients of keys (B, slots block_k, K, H) and of values (B, slots block_k, K, V), over all heads that share
    them."""
    (B, _, K, _), rows = k.shape, work.programs.slots * rule.block_k
    outputs = tuple((B, rows, K, x.shape[-1], _type(x, work)) for x in (k, v))
    name = "attention_backward_keys"
    return _run(_by_columns, name, (2, 2), q, k, v, of_rows, marks, work, rule, tuning, interpret, outputs, True)


# ---- the kernels ---------------------------------------------------------------------------------------------------


def _forward(table, columns, marks, q, k, v, out, lse, *, rule: Rule):
    row, slot, first, middle, last = (table[pl.program_id(0), field] for field in range(5))
    q = rows_of(q, row, rule.block_q)

    def step(entry, carry, mixed):
        total, m, l = carry
        column = columns[entry]
        mask = seen(rule, marks, entry, row, column, mixed)
        s, _ = scores(rule, q, rows_of(k, column, rule.block_k), mask)
        higher = jnp.maximum(m, s.max(1))
        p, fade = jnp.exp2(s - higher[:, None]), jnp.exp2(m - higher)
        values = rows_of(v, column, rule.block_k)
        total = total * fade[:, None] + product(p.astype(values.dtype), values, 1, 0)
        return total, higher, l * fade + p.sum(1)

    zeros = jnp.zeros(rule.block_q, jnp.float32)
    nothing = jnp.zeros((rule.block_q, v.shape[1]), jnp.float32), zeros + EMPTY, zeros
    total, m, l = _over(step, nothing, first, middle, last)
    l = jnp.maximum(l, 0.5)  # a row that sees a key has a sum of at least 1
    at = pl.ds(slot * rule.block_q, rule.block_q)
    out[at] = (total / l[:, None]).astype(out.dtype)
    lse[at] = m * (1 / LOG2E) + jnp.log(l)


def _by_rows(table, columns, marks, q, k, v, grad, lse, delta, dq, *, rule: Rule):
    row, slot, first, middle, last = (table[pl.program_id(0), field] for field in range(5))
    q, grad, lse, delta = (rows_of(x, row, rule.block_q) for x in (q, grad, lse, delta))

    def step(entry, total, mixed):
        column = columns[entry]
        keys, values = rows_of(k, column, rule.block_k), rows_of(v, column, rule.block_k)
        mask = seen(rule, marks, entry, row, column, mixed)
        _, ds = _weighed(rule, q, keys, values, grad, lse, delta, mask)
        return total + product(ds.astype(keys.dtype), keys, 1, 0)

    total = _over(step, jnp.zeros(q.shape, jnp.float32), first, middle, last)
    dq[pl.ds(slot * rule.block_q, rule.block_q)] = (total * rule.scale).astype(dq.dtype)


def _by_columns(table, rows, marks, q, k, v, grad, lse, delta, dk, dv, *, rule: Rule):
    column, slot, first, middle, last = (table[pl.program_id(0), field] for field in range(5))
    keys, values = (rows_of(x, column, rule.block_k) for x in (k, v))
    shared = q.shape[1]  # query heads, whose turns come one after the other at each block

    def step(turn, totals, mixed):
        of_keys, of_values = totals
        entry, head = (turn, 0) if shared == 1 else (lax.div(turn, shared), lax.rem(turn, shared))
        row = rows[entry]
        at = pl.ds(row * rule.block_q, rule.block_q)
        queries, g = q[at, head], grad[at, head]
        mask = seen(rule, marks, entry, row, column, mixed)
        p, ds = _weighed(rule, queries, keys, values, g, lse[head, at], delta[head, at], mask)
        of_values = of_values + product(p.astype(g.dtype), g, 0, 0)
        return of_keys + product(ds.astype(queries.dtype), queries, 0, 0), of_values

    nothing = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    of_keys, of_values = _over(step, nothing, first * shared, middle * shared, last * shared)
    at = pl.ds(slot * rule.block_k, rule.block_k)
    dk[at], dv[at] = (of_keys * rule.scale).astype(dk.dtype), of_values.astype(dv.dtype)


def _over(step, carry, first, middle, last):
    """step(entry, carry, mixed) on the entries that need no predicate, and then on those that do."""
    carry = lax.fori_loop(first, middle, functools.partial(step, mixed=False), carry)
    return lax.fori_loop(middle, last, functools.partial(step, mixed=True), carry)


def _weighed(rule: Rule, q, k, v, grad, lse, delta, mask):
    """The weights of a tile, and the gradient of its products of queries and keys but for the scale."""
    s, slope = scores(rule, q, k, mask)
    p = jnp.exp2(s - lse[:, None] * LOG2E)
    ds = p * (product(grad, v, 1, 1) - delta[:, None])
    return p, ds if slope is None else ds * slope


# ---- how they are run ----------------------------------------------------------------------------------------------


def _run(
    kernel, name, products, q, k, v, of_rows, marks: Marks, work: Work, rule, tuning, interpret, outputs, turned=False
):
    """A kernel for each program of each head of each sample: each query head or, where turned, each head of keys with
    all that share it. products: how many of a tile's are as long as a key, and as a value."""
    (B, _, N, _), K = q.shape, k.shape[2]
    shared = N // K
    of_queries = (lambda shape: _of_head(shape, shared)) if turned else _of_head
    of_keys = _of_head if turned or shared == 1 else (lambda shape: _of_head(shape, shared=shared))
    marked = Marks(
        *(None if x is None else _whole(x) for x in marks[:2]),
        *(None if x is None else pl.BlockSpec((None, x.shape[1]), lambda i, head, b: (b, 0)) for x in marks[2:4]),
        *(None if x is None else _whole(x) for x in marks[4:]),
    )
    table, columns = jnp.asarray(work.programs.table), jnp.asarray(work.programs.columns)
    scores = B * N * len(work.ordered.live.rows) * rule.block_q * rule.block_k
    shapes = [jax.ShapeDtypeStruct(tuple(shape), dtype) for *shape, dtype in outputs]
    cost = pl.CostEstimate(
        flops=2 * scores * (products[0] * k.shape[-1] + products[1] * v.shape[-1]),
        transcendentals=scores,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, *of_rows, *shapes)),
    )
    of_outputs = of_keys if turned else of_queries
    return pl.pallas_call(
        functools.partial(kernel, rule=rule),
        grid=(len(table), K if turned else N, B),
        in_specs=[
            *(_whole(table), _whole(columns), marked),
            *(of_queries(q.shape), of_keys(k.shape), of_keys(v.shape)),
            *(of_queries(x.shape) for x in of_rows),
        ],
        out_specs=[of_outputs(shape) for *shape, _ in outputs],
        out_shape=shapes,
        cost_estimate=cost,
        compiler_params=triton.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        interpret=interpret,
        name=name,
    )(table, columns, marks, q, k, v, *of_rows)


def _type(x, work: Work):
    return x.dtype if work.alone else jnp.float32


def _whole(x):
    return pl.BlockSpec(x.shape, lambda i, head, b: (0,) * x.ndim)


def _of_head(shape, count: int | None = None, *, shared: int = 1):
    """All that an array (B, rows, heads, H) or (B, heads, rows) holds of one head, or of `count` heads; or of the one
    that `shared` heads of the grid share."""
    axis = 2 if len(shape) == 4 else 1
    block = (None, *shape[1:axis], count, *shape[axis + 1 :])

    def place(i, head, b):
        number = head if shared == 1 else lax.div(head, shared)
        return (b, *(number if at == axis else 0 for at in range(1, len(shape))))

    return pl.BlockSpec(block, place)
