"""The linear layer of every model here."""

from typing import Any

import jax
from flax import nnx

from xformers_lab.nn import remat
from xformers_lab.nn.on_mesh import flat


class Linear(nnx.Linear):
    """`nnx.Linear` on (..., in) -> (..., out), computed as one product of matrices.

    XLA:CPU runs the gradient of the weights of an N-dimensional product two to four times slower than that of the same
    product of two matrices.
    """

    def __init__(self, *sizes: int, **options: Any):
        super().__init__(*sizes, **options, kernel_metadata={"decays": True}, bias_metadata={"decays": False})

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        rows = super().__call__(flat(inputs), out_sharding)
        return remat.product(rows.reshape(*inputs.shape[:-1], -1))
