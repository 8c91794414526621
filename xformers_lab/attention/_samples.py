"""Samples one at a time, for a bias that every sample has of its own: mechanisms know one of all samples alone."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import _heads


def apart(mechanism, q, k, v, *, bias, key, causal, **given):
    """`mix` with a bias whose leaves have leading axes B and N; given: x, x_q, real and carry, each of every sample.

    Auxiliary scalars, and variables that a training step moves, are means over samples.
    """
    graph, params, rest = nnx.split(mechanism, nnx.Param, ...)

    def one(sample):
        q, k, v, bias, key, given = sample
        layer = nnx.merge(graph, params, rest)
        q, k, v, given = jax.tree.map(lambda leaf: leaf[None], (q, k, v, given))
        out, carry, aux = layer.mix(q, k, v, bias=bias, key=key, causal=causal, **given)
        return *jax.tree.map(lambda leaf: leaf[0], (out, carry)), aux, nnx.split(layer, nnx.Param, ...)[2]

    keys = None if key is None else jax.random.split(key, len(q))
    samples = (q, k, v, bias, keys, given)
    # As with heads: one by one on CPU, where that keeps the scores in cache.
    looped = jax.default_backend() == "cpu" and q.shape[1] * k.shape[1] >= _heads.LOOP_FROM
    out, carry, aux, after = lax.map(one, samples) if looped else jax.vmap(one)(samples)
    nnx.update(mechanism, jax.tree.map(_mean, after))
    return out, carry, jax.tree.map(_mean, aux)


def step_apart(mechanism, cache, q, k, v, *, bias, x=None, carry=None):
    """`mix_step` with a bias whose leaves have leading axes B and N."""
    leaves, structure = jax.tree.flatten(cache)
    axes = _axes_of_samples(mechanism)

    def one(leaves, q, k, v, bias, x, carry):
        widened = [
            leaf if axis is None else jnp.expand_dims(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)
        ]
        q, k, v, x, carry = jax.tree.map(lambda leaf: leaf[None], (q, k, v, x, carry))
        out, after, carry = mechanism.mix_step(structure.unflatten(widened), q, k, v, x=x, bias=bias, carry=carry)
        after = zip(jax.tree.leaves(after), axes, strict=True)
        after = [leaf if axis is None else jnp.squeeze(leaf, axis) for leaf, axis in after]
        return out[0], after, jax.tree.map(lambda leaf: leaf[0], carry)

    run = jax.vmap(one, in_axes=(axes, 0, 0, 0, 0, 0, 0), out_axes=(0, axes, 0))
    out, after, carry = run(leaves, q, k, v, bias, x, carry)
    return out, structure.unflatten(after), carry


def _axes_of_samples(mechanism) -> list[int | None]:
    """Which axis of every leaf of a cache is that of samples: the one that grows with them, if any."""
    one, two = (
        jax.tree.leaves(jax.eval_shape(lambda B=B: mechanism.init_cache(B, mechanism.size.length))) for B in (1, 2)
    )
    grown = lambda a, b: next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)
    return [grown(a, b) for a, b in zip(one, two, strict=True)]


def _mean(leaf):
    """Over samples, of what is a number; what is not (a count, a random key) is the same in all."""
    return leaf.mean(0) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[0]
