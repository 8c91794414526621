"""How heads and batch are mapped: the lab's decision, in one place, never a mechanism's."""

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.nn import on_mesh
from xformers_lab.nn.plan import Plan


def over_heads(one, q, k, v, carry, of_sample, of_head, *, plan: Plan, at_once: int = 1):
    """Run `one(q, k, v, carry, of_sample, of_head)` on every head of every sample.

    q (B, T, N, H); k, v (B, S, K, H), each shared by N / K query heads; carry has leading axes (B, N), of_sample (B),
    of_head (N). at_once: how many heads run together where the plan has a loop over them, at most. -> (B, T, N, H) and
    the carry.

    Never in a loop where devices share out samples or heads: each would run all of it.
    """
    if plan.loops(q.shape[1], k.shape[1]) and not on_mesh.any_shared():
        return _loop(one, q, k, v, carry, of_sample, of_head, at_once)
    return _batch(one, q, k, v, carry, of_sample, of_head)


def over_samples(one, q, k, v, of_sample, *, plan: Plan):
    """Run `one(q, k, v, of_sample)` on every sample of (B, N, T, H), (B, N, S, H) and a pytree of (B, ...): one by one
    where the plan says so, which keeps the scores of a block in cache, and no devices share them out."""
    if plan.loops(q.shape[2], k.shape[2]) and not on_mesh.any_shared():
        return lax.map(lambda each: one(*each), (q, k, v, of_sample))
    return jax.vmap(one)(q, k, v, of_sample)


def _grouped(tree, axis: int, K: int):
    """Query heads, an axis of every leaf, as (K groups, N / K heads)."""
    split = lambda x: x.reshape(*x.shape[:axis], K, x.shape[axis] // K, *x.shape[axis + 1 :])
    return jax.tree.map(split, tree)


def _batch(one, q, k, v, carry, of_sample, of_head):
    B, _, N, _ = q.shape
    q, carry, of_head = (_grouped(x, axis, k.shape[2]) for x, axis in ((q, 2), (carry, 1), (of_head, 0)))
    heads = jax.vmap(one, in_axes=(1, None, None, 0, None, 0))
    groups = jax.vmap(heads, in_axes=(1, 1, 1, 0, None, 0))
    out = jax.vmap(groups, in_axes=(0, 0, 0, 0, 0, None))(q, k, v, carry, of_sample, of_head)
    out, carry = jax.tree.map(lambda x: x.reshape(B, N, *x.shape[3:]), out)
    return jnp.swapaxes(out, 1, 2), carry


def _loop(one, q, k, v, carry, of_sample, of_head, most: int):
    """At most `most` heads at once."""
    B, _, N, _ = q.shape
    K = k.shape[2]
    at_once = max(n for n in range(1, most + 1) if B * K % n == 0)
    carry, of_head = _grouped(carry, 1, K), _grouped(of_head, 0, K)
    flat = lambda x: x.reshape(B * K, *x.shape[2:])
    # Heads of a group are neighbours; a group's axis of its own before the transposition would cost one more copy.
    q = q.swapaxes(1, 2).reshape(B * K, N // K, *q.shape[1::2])  # (B K, N/K, T, H)
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

    groups = q, k, v, carry, jnp.arange(B * K)
    out = jax.vmap(group)(groups) if at_once == B * K else lax.map(group, groups, batch_size=at_once)
    out, carry = jax.tree.map(lambda x: x.reshape(B, N, *x.shape[2:]), out)
    return out.swapaxes(1, 2), carry
