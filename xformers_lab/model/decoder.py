import jax.numpy as jnp

from xformers_lab.model._transformer import Transformer


class Decoder(Transformer):
    """A position sees itself and what stands before it; a sequence is pooled by its last real position (GPT-like)."""

    causal = True

    def pool(self, x, real):
        if real is None:
            return x[:, -1]
        last = x.shape[1] - 1 - jnp.argmax(real[:, ::-1], 1)
        return jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]
