"""How many rows of blocks are computed together, and the loop over them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.block_sparse.layout import Group, layout
from xformers_lab.nn.plan import Plan
from xformers_lab.nn.platform import platform

# Scores computed at once, where rows are batched: on a CPU a loop over fewer costs more than the caches save; or what
# fills an accelerator.
CPU_SCORES = 1 << 21
ACCELERATOR_SCORES = 1 << 24


def rows_at_once(group: Group, blocks: tuple[int, int]) -> int:
    """How many rows of a group are computed at once, so that all chunks are alike."""
    if platform() != "cpu":
        scores = ACCELERATOR_SCORES
    elif group.batched:
        scores = CPU_SCORES
    else:
        return 1
    rows = len(group.rows) // group.together
    most = int(np.clip(scores // (group.width * group.together * blocks[0] * blocks[1]), 1, rows))
    return -(-rows // -(-rows // most))


def heads_at_once(plan: Plan, pattern: Pattern, T: int, S: int, blocks: tuple[int, int]) -> int:
    """How many heads run together where a plan has a loop over them: those that fill it with rows of one kind."""
    groups = [group for part in layout(pattern, T, S, *blocks) for group in part.groups]
    if all(group.batched for group in groups):
        return plan.heads_of_narrow_rows(T)
    if any(group.batched for group in groups):
        return 1
    return plan.heads_of_wide_rows(max(group.together * group.width for group in groups) * blocks[0] * blocks[1])


def largest_array(pattern: Pattern, T: int, S: int, H: int, blocks: tuple[int, int]) -> int:
    """Elements of the largest array of one head: its keys, or the scores or keys of rows computed together."""
    parts = layout(pattern, T, S, *blocks)
    groups = [group for part in parts for group in part.groups]
    row = lambda group: group.width * blocks[1] * max(group.together * blocks[0], H)
    rows = [rows_at_once(group, blocks) * row(group) for group in groups]
    return max(max(len(part.keys) for part in parts) * H, *rows)


def scan_chunks(step, carry, rows: int, at_once: int):
    """scan over chunks of rows, the last one shorter; step gives (carry, one output per row)."""
    whole = rows // at_once * at_once
    carry, out = lax.scan(step, carry, np.arange(whole).reshape(-1, at_once))
    out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    if whole < rows:
        carry, rest = step(carry, np.arange(whole, rows))
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
    return carry, out
