import jax.numpy as jnp

from xformers_lab.model._transformer import Transformer


class Encoder(Transformer):
    """Every position sees both sides; a sequence is pooled by the mean of its real positions (BERT without [CLS])."""

    def pool(self, x, real):
        if real is None:
            return x.mean(1)
        weights = real[..., None].astype(x.dtype)
        return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
