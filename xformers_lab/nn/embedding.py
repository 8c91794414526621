"""How large the vectors are that reach the first layer: one rule for all models, positions and depths.

At the start a token's vector has unit size, a root mean square of 1 over its channels. What is added to it, for its
position or for the step of a depth, has ADDED of that, as sines and cosines have, and `marked` brings the sum back to
unit size. So where two positions or depths are compared, scales are not.

Tables of vectors are drawn small, START, as GPT-2's and BERT's are, and multiplied up to size. An optimizer like Adam
moves every number by as much as any other: vectors whose numbers were as large as they are used would hardly turn while
the layers learn.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn import on_mesh
from xformers_lab.nn.linear import Linear

# The standard deviation of tables of vectors at the start.
START = 0.02
# The root mean square of what is added to a token, where the token's is 1.
ADDED = 0.5**0.5


def marked(x: jax.Array, added: jax.Array) -> jax.Array:
    """Vectors of unit size and, broadcast to them, what is added, ADDED as large -> their sum, of unit size."""
    return (x + added.astype(x.dtype)) * (1 + ADDED**2) ** -0.5


class Embedding(nnx.Embed):
    """Tokens (...) -> vectors (..., D) of unit size: rows of a table times `scale`.

    `attend` gives the products of states with all rows, a tied head's logits, times `share`: with it they are small at
    the start, that of the token itself, which is still in the states, at most 1.
    """

    def __init__(self, tokens: int, dim: int, *, dtype: Any = None, rngs: nnx.Rngs):
        draw = nnx.initializers.normal(START)
        super().__init__(tokens, dim, dtype=dtype, embedding_init=draw, embedding_metadata={"decays": True}, rngs=rngs)
        self.scale, self.share = 1 / START, 1 / (START * dim)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        table = on_mesh.whole_rows(self.embedding[...])
        return jnp.take(table if self.dtype is None else table.astype(self.dtype), inputs, axis=0) * self.scale

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        return super().attend(query, out_sharding) * self.share


class Numbers(nnx.Module):
    """Numbers (B, T, channels) of unit variance -> vectors (B, T, D) of unit size: a linear projection."""

    def __init__(self, channels: int, dim: int, *, dtype: Any = None, rngs: nnx.Rngs):
        draw = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.project, self.dtype = Linear(channels, dim, kernel_init=draw, dtype=dtype, rngs=rngs), dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.project(inputs)


def first_layer(tokens: int, channels: int, dim: int, *, dtype: Any = None, rngs: nnx.Rngs) -> Any:
    """What makes vectors of a task's inputs: of so many different tokens or, where it has channels, of numbers."""
    if channels:
        return Numbers(channels, dim, dtype=dtype, rngs=rngs)
    return Embedding(tokens, dim, dtype=dtype, rngs=rngs)
