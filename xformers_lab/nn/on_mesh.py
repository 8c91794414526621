"""What a model makes of the mesh that it is traced in, if there is one: where its states lie, what it leaves whole."""

import math
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec

from xformers_lab.layouts import AXES, FSDP, ROWS, SEQUENCE, TENSOR

T = TypeVar("T")


def shares(*axes: str) -> bool:
    """Whether one of these axes has several devices."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return any(sizes.get(name, 1) > 1 for name in axes)


def any_shared() -> bool:
    """Whether anything is shared out over devices."""
    return shares(*AXES)


def flat(x: jax.Array) -> jax.Array:
    """(..., D) as one matrix (n, D); as it is where positions are shared out, for they have no place in one axis with
    samples: all devices would get all."""
    return x if shares(SEQUENCE) else x.reshape(-1, x.shape[-1])


def whole_rows(table: jax.Array) -> jax.Array:
    """A table (V, D) to look up rows in, each row whole: where channels are shared out, the compiler can make rows that
    are shared out themselves only by way of all of them on every device."""
    if not shares(FSDP):
        return table
    tensor = jax.sharding.get_abstract_mesh().shape[TENSOR]
    return jax.lax.with_sharding_constraint(table, PartitionSpec(None if len(table) % tensor else TENSOR, None))


def states(x: T) -> T:
    """States (B, T, D), or a pytree with such among its arrays, whose sequences and positions lie where the batch's do.

    The compiler finds a place for everything between such states. Without them it may follow parameters that are shared
    out, and then move whole layers of states between devices. What the mesh does not divide is left to the compiler,
    and so is everything where sequences alone are shared out.
    """
    if not shares(FSDP, SEQUENCE, TENSOR):
        return x
    sizes = jax.sharding.get_abstract_mesh().shape
    rows, positions = math.prod(sizes[name] for name in ROWS), sizes[SEQUENCE]

    def place(leaf):
        if getattr(leaf, "ndim", 0) != 3:
            return leaf
        divides = lambda axis, count, names: names if leaf.shape[axis] % count == 0 else PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(divides(0, rows, ROWS), divides(1, positions, SEQUENCE), None)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree.map(place, x)
