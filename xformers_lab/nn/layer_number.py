"""Which layer of a stack a mechanism is in, where what it computes goes by that."""

import jax.numpy as jnp
from flax import nnx


class LayerNumber(nnx.Variable):
    """The number of the layer that holds it, from 0 on, int32 (), or of a stack those of its layers, (L,).

    The layers of a stack are one program, whose constructor does not know it: a mechanism makes `first_layer()`, and
    reads the number when it runs. Blocks and stacks write it. Layers that are used again keep theirs.
    """


def first_layer() -> LayerNumber:
    return LayerNumber(jnp.zeros((), jnp.int32))


def moved(module: nnx.Module, by) -> None:
    """Adds to the numbers of all layers in a module: one number for all, or of a stack that of each, (L,)."""
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, LayerNumber):
            variable[...] = variable[...] + jnp.asarray(by, jnp.int32)
