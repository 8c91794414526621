"""Many small feed-forward networks, each run on the tokens that were sent to it: nothing is computed for the others.

Tokens are put in order of their expert, every expert's share filled up to whole blocks, so that a block is one product
with one expert's matrix. The work grows with the tokens sent, plus at most one block per expert.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 64


def run_experts(x, expert, weight, up, down, activation):
    """x (n, D); expert (n, k) int32, weight (n, k); up (E, D, F), down (E, F, D) -> sum_k weight down_e act(up_e x).

    An expert number of E sends the token nowhere.
    """
    (n, k), E = expert.shape, up.shape[0]
    block = min(BLOCK, max(8, n * k // E))
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(E, jnp.int32).at[flat].add(1, mode="drop")
    ends = jnp.cumsum(-(-counts // block))  # in blocks
    M = n * k // block + E
    # Where each assignment stands: its expert's first block, and its rank among the expert's tokens.
    rank = jnp.arange(n * k) - (jnp.cumsum(counts) - counts)[flat[order]]
    slot = (ends - (-(-counts // block)))[flat[order]] * block + rank
    slot = jnp.where(flat[order] < E, slot, M * block)
    token = jnp.full(M * block, n, jnp.int32).at[slot].set((order // k).astype(jnp.int32), mode="drop")
    share = jnp.zeros(M * block, weight.dtype).at[slot].set(weight.reshape(-1)[order], mode="drop")
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(M), side="right"), E - 1)
    rows = jnp.take(x, token, axis=0, mode="fill", fill_value=0).reshape(M, block, -1)
    hidden = activation(grouped(rows, up, owner))
    out = grouped(hidden.astype(x.dtype), down, owner).reshape(M * block, -1) * share[:, None].astype(jnp.float32)
    return jnp.zeros((n, out.shape[1]), jnp.float32).at[token].add(out, mode="drop").astype(x.dtype)


@jax.custom_vjp
def grouped(rows, weights, owner):
    """rows (M, block, D), weights (E, D, F), owner (M,) -> (M, block, F), rows[m] weights[owner[m]] in float32."""
    product = lambda pair: jnp.dot(pair[0], weights[pair[1]], preferred_element_type=jnp.float32)
    return lax.map(product, (rows, owner))


def _forward(rows, weights, owner):
    return grouped(rows, weights, owner), (rows, weights, owner)


def _backward(saved, grad):
    rows, weights, owner = saved

    def one(total, block):
        row, g, at = block
        # Only one expert's gradient is touched, in place.
        added = lax.dynamic_index_in_dim(total, at, keepdims=False) + jnp.dot(
            row.T, g.astype(row.dtype), preferred_element_type=jnp.float32
        )
        total = lax.dynamic_update_index_in_dim(total, added, at, 0)
        return total, jnp.dot(g.astype(row.dtype), weights[at].T, preferred_element_type=jnp.float32)

    total, drows = lax.scan(one, jnp.zeros(weights.shape, jnp.float32), (rows, grad, owner))
    return drows.astype(rows.dtype), total.astype(weights.dtype), None


grouped.defvjp(_forward, _backward)
