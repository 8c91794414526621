"""How heads and batch are mapped: the lab's decision, in one place, never a mechanism's."""

import jax
import jax.numpy as jnp
from jax import lax

# On CPU a loop over heads keeps every product two-dimensional and its scores in cache; below this many scores per head
# the loop's own cost is larger than what it saves.
LOOP_FROM = 256 * 256


def over_heads(one, q, k, v, carry, of_sample, of_head):
    """Run `one(q, k, v, carry, of_sample, of_head)` on every head of every sample.

    q (B, T, N, H); k, v (B, S, K, H), each shared by N / K query heads; carry has leading axes (B, N), of_sample (B),
    of_head (N). -> (B, T, N, H), or that and the carry where `one` returns a pair.
    """
    if jax.default_backend() == "cpu" and q.shape[1] * k.shape[1] >= LOOP_FROM:
        return _loop(one, q, k, v, carry, of_sample, of_head)
    return _batch(one, q, k, v, carry, of_sample, of_head)


def _grouped(q, carry, of_head, K):
    """Query heads as (K groups, N / K heads)."""
    B, T, N, H = q.shape
    split = lambda tree, axis: jax.tree.map(lambda x: x.reshape(*x.shape[:axis], K, N // K, *x.shape[axis + 1 :]), tree)
    return q.reshape(B, T, K, N // K, H), split(carry, 1), split(of_head, 0)


def _batch(one, q, k, v, carry, of_sample, of_head):
    B, _, N, _ = q.shape
    q, carry, of_head = _grouped(q, carry, of_head, k.shape[2])
    heads = jax.vmap(one, in_axes=(1, None, None, 0, None, 0))
    groups = jax.vmap(heads, in_axes=(1, 1, 1, 0, None, 0))
    out = jax.vmap(groups, in_axes=(0, 0, 0, 0, 0, None))(q, k, v, carry, of_sample, of_head)
    out, carry = jax.tree.map(lambda x: x.reshape(B, N, *x.shape[3:]), out)
    return jnp.swapaxes(out, 1, 2), carry


def _loop(one, q, k, v, carry, of_sample, of_head):
    B, _, N, _ = q.shape
    K = k.shape[2]
    q, carry, of_head = _grouped(q, carry, of_head, K)
    flat = lambda x: x.reshape(B * K, *x.shape[2:])
    q = flat(q.transpose(0, 2, 3, 1, 4))  # (B K, N/K, T, H)
    k, v = (flat(x.swapaxes(1, 2)) for x in (k, v))  # (B K, S, H)
    carry = jax.tree.map(flat, carry)

    def group(xs):
        q, k, v, carry, number = xs
        sample = jax.tree.map(lambda x: x[number // K], of_sample)
        heads = jax.tree.map(lambda x: x[number % K], of_head)
        head = lambda xs: one(xs[0], k, v, xs[1], sample, xs[2])
        if q.shape[0] == 1:
            squeeze = lambda tree: jax.tree.map(lambda x: x[0], tree)
            return jax.tree.map(lambda x: x[None], head(squeeze((q, carry, heads))))
        return lax.map(head, (q, carry, heads))

    out = lax.map(group, (q, k, v, carry, jnp.arange(B * K)))
    out, carry = jax.tree.map(lambda x: x.reshape(B, N, *x.shape[2:]), out)
    return out.swapaxes(1, 2), carry
