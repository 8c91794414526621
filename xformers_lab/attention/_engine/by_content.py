"""Softmax attention of gathered queries to gathered keys: what mechanisms share that choose keys by content.

Which keys a query sees is known when the program runs, not when it is compiled. Shapes are fixed all the same: queries
that chose the same block of keys are sorted into groups of a fixed size, of which there are at most so many. Each group
is one small dense attention, all groups are batched, and what a query got from several blocks is merged exactly by its
log-sum-exps.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.block_sparse import batch
from xformers_lab.attention._engine.block_sparse.chunks import ACCELERATOR_SCORES, CPU_SCORES
from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.nn.platform import platform

# Queries whose choice is made at once.
ROWS = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """P pairs of a query and its block, in n groups of C pairs of the same block.

    pair (n, C): which pair fills a place, P where none does. block (n,): the block of a group. place (P,): where in
    the n C places a pair went, n C where it chose no block.
    """

    pair: jax.Array
    block: jax.Array
    place: jax.Array

    def sent(self, x, choices: int = 1, fill: float = 0):
        """(T, ...) of queries with `choices` pairs each -> (n, C, ...), `fill` in empty places."""
        return x.at[self.pair // choices].get(mode="fill", fill_value=fill)

    def returned(self, x, choices: int = 1, fill: float = 0):
        """(n, C, ...) -> (T, choices, ...), `fill` for pairs without a block."""
        x = x.reshape(-1, *x.shape[2:]).at[self.place].get(mode="fill", fill_value=fill)
        return x.reshape(-1, choices, *x.shape[1:])


def count(pairs: int, blocks: int, size: int) -> int:
    """How many groups of `size` hold `pairs`, however they are spread over the blocks."""
    return (pairs + blocks * (size - 1)) // size


def grouped(chosen, blocks: int, size: int) -> Groups:
    """chosen (P,): the block of each pair, `blocks` for none."""
    P, n = len(chosen), count(len(chosen), blocks, size)
    order = order_by(chosen, blocks + 1)
    members = jnp.zeros(blocks, jnp.int32).at[chosen].add(1, mode="drop")
    start = jnp.cumsum(members) - members
    groups = -(-members // size)
    last = jnp.cumsum(groups)
    group = jnp.arange(n)
    block = jnp.minimum(jnp.searchsorted(last, group, side="right"), blocks - 1)
    rank = (group - (last - groups)[block])[:, None] * size + jnp.arange(size)
    member = order.at[start[block][:, None] + rank].get(mode="clip")
    pair = jnp.where(rank < members[block][:, None], member, P)
    place = jnp.full(P, n * size).at[pair.reshape(-1)].set(jnp.arange(n * size), mode="drop")
    return Groups(pair, block, place)


def order_by(number, count: int):
    """Positions by ascending number (P,), which is below `count`; those of the same number in order."""
    P = len(number)
    if P * count < 1 << 31:  # XLA:CPU sorts one array of numbers several times faster than numbers with their positions
        return jnp.sort(number.astype(jnp.int32) * P + jnp.arange(P, dtype=jnp.int32)) % P
    return jnp.argsort(number, stable=True)


def batched(q, k, v, added, of_block):
    """Softmax attention of n blocks of queries, each to its own keys.

    q (n, C, H), scaled, k and v (n, M, H), and of_block, a pytree with leading axes n. added(of_block) gives for m of
    the blocks what is added to their scores (m, C, M): MASKED where nothing is seen.
    -> (n, C, H) and log-sum-exps (n, C) in float32, zeros and EMPTY for a query that sees nothing.
    """

    @jax.checkpoint
    def some(q, k, v, of_block):
        return batch.attend(q, k, v, added(of_block))

    n, scores = len(q), q.shape[1] * k.shape[1]
    rounds = -(-n // max(1, (CPU_SCORES if platform() == "cpu" else ACCELERATOR_SCORES) // scores))
    if rounds == 1:
        return some(q, k, v, of_block)
    parts = jax.tree.map(lambda x: in_blocks(x, -(-n // rounds)), (q, k, v, of_block))
    out = lax.map(lambda part: some(*part), parts)
    return jax.tree.map(lambda x: joined(x, n), out)


def scores_at_once(n: int, C: int, M: int) -> int:
    """How many scores of n blocks `batched` holds on a CPU."""
    return min(n, max(1, CPU_SCORES // (C * M))) * C * M


def merged(out, lse, axis: int):
    """Softmax attention to the union of disjoint sets of keys, from that to each: out (..., H) and lse (...)."""
    weight = jnp.exp(lse - lax.stop_gradient(lse.max(axis, keepdims=True)))
    weight = weight / weight.sum(axis, keepdims=True)
    return (weight[..., None] * out).sum(axis)
