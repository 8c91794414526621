"""Samples one at a time, for a bias that every sample has of its own: mechanisms know one of all samples alone."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention._base.call import Call
from xformers_lab.nn import on_mesh
from xformers_lab.nn.plan import plan_of


def apart(mechanism, call: Call):
    """`attend_heads` with a bias whose leaves have leading axes B and N.

    Auxiliary scalars, and variables that a training step moves, are means over samples.
    """
    graph, params, rest = nnx.split(mechanism, nnx.Param, ...)
    (B, T), S = call.q.shape[:2], call.k.shape[1]
    carries = _carries(mechanism, T, S)
    mapped, shared = carries.split(call.carry)

    def one(sample):
        arrays, bias, key, mapped = sample
        # Variables are made anew, so that they may change within this trace.
        layer = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))
        below = None if call.carry is None else carries.alone(mapped, shared)
        out, above, aux = layer.attend_heads(call.replace(**_alone(arrays), bias=bias, key=key, carry=below))
        return out[0], carries.without(above), aux, nnx.split(layer, nnx.Param, ...)[2]

    keys = None if call.key is None else jax.random.split(call.key, B)
    samples = (_of_samples(call), call.bias, keys, mapped)
    # As with heads: one by one on CPU, where that keeps the scores in cache, and no devices share them out.
    looped = plan_of(mechanism.size).loops(T, S) and not on_mesh.any_shared()
    out, above, aux, after = lax.map(one, samples) if looped else jax.vmap(one)(samples)
    nnx.update(mechanism, jax.tree.map(_mean, after))
    return out, carries.joined(above), jax.tree.map(_mean, aux)


def step_apart(mechanism, cache, call: Call):
    """`decode_heads` with a bias whose leaves have leading axes B and N."""
    length = mechanism.size.length
    caches, carries = _Samples(lambda B: mechanism.init_cache(B, length)), _carries(mechanism, 1, length)
    (mapped, shared), (mapped_below, shared_below) = caches.split(cache), carries.split(call.carry)

    def one(mapped, mapped_below, bias, arrays):
        below = None if call.carry is None else carries.alone(mapped_below, shared_below)
        of_sample = call.replace(**_alone(arrays), bias=bias, carry=below)
        out, after, above = mechanism.decode_heads(caches.alone(mapped, shared), of_sample)
        return out[0], caches.without(after), carries.without(above)

    out, after, above = jax.vmap(one)(mapped, mapped_below, call.bias, _of_samples(call))
    return out, caches.joined(after), carries.joined(above)


def _of_samples(call: Call) -> dict:
    """The arrays of a call that have an axis of samples."""
    return {name: getattr(call, name) for name in ("q", "k", "v", "x", "x_q", "valid", "documents", "marked")}


def _carries(mechanism, T: int, S: int) -> "_Samples":
    return _Samples(lambda B: mechanism.initial_carry(B, T, S) if mechanism.carries() else None)


class _Samples:
    """Pytrees some of whose leaves have an axis of samples: the one that differs between make(1) and make(2)."""

    def __init__(self, make):
        one, two = (jax.eval_shape(lambda B=B: make(B)) for B in (1, 2))
        grown = lambda a, b: next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)
        leaves, self.structure = jax.tree.flatten(one)
        self.axes = [grown(a, b) for a, b in zip(leaves, jax.tree.leaves(two), strict=True)]

    def split(self, tree):
        """Leaves with samples first, and the others; None in the place of each other."""
        pairs = list(zip(jax.tree.leaves(tree), self.axes, strict=False))
        mapped = [None if axis is None else jnp.moveaxis(leaf, axis, 0) for leaf, axis in pairs]
        return mapped, [leaf if axis is None else None for leaf, axis in pairs]

    def alone(self, mapped, shared):
        """The tree of one sample, whose axis is kept, from its leaves without it."""
        triples = zip(mapped, shared, self.axes, strict=True)
        leaves = [other if axis is None else jnp.expand_dims(leaf, axis) for leaf, other, axis in triples]
        return self.structure.unflatten(leaves)

    def without(self, tree):
        """The leaves of one sample's tree without the axis of samples."""
        pairs = zip(jax.tree.leaves(tree), self.axes, strict=True)
        return [leaf if axis is None else jnp.squeeze(leaf, axis) for leaf, axis in pairs]

    def joined(self, leaves):
        """The tree of all samples from leaves with samples first; what has no such axis is the same in all."""
        pairs = zip(leaves, self.axes, strict=True)
        return self.structure.unflatten([x[0] if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in pairs])


def _alone(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _mean(leaf):
    """Over samples, of what is a number; what is not (a count, a random key) is the same in all."""
    return leaf.mean(0) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[0]
