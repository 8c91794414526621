import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size

EPSILON = 1e-5


class Batchnorm(nnx.Module):
    """BatchNorm: each channel's mean and variance over all valid rows of a batch (Ioffe and Szegedy, 2015, arXiv
    1502.03167; in a Transformer: Shen et al., 2020, arXiv 2003.07845, who set it beside PowerNorm).

        y = g (x - m) / sqrt(v + 1e-5) + b

    per channel (D,). In training m and v are the mean and the variance of the batch's valid rows, through which
    gradients flow, so that a decoder trained so sees what comes later in the batch. In evaluation and decoding they are
    running averages of these, and a row does not depend on others. The averages are no parameters: the state keeps them
    and checkpoints save them. Shen et al. find that those of text vary so much from batch to batch that it trains worse
    than LayerNorm.

    Deviations: the moving averages start as the plain mean of the batches so far, not at 0 and 1, and are of the
    variance that divides by the number of rows, as it is used, where the first paper corrects it by n / (n - 1). A
    normaliser that a step passes several times (accumulate, a depth that repeats layers) has statistics of each pass
    and moves at each. Under layout=pmap each device has statistics of its own rows, and their mean is kept.

    Options:
        decay: how much of the running statistics a training pass keeps
    """

    def __init__(self, size: Size, *, decay: float = 0.9, rngs: nnx.Rngs):
        if not 0 <= decay < 1:
            raise Refused(f"decay is the share of the statistics that is kept, at least 0 and below 1, got {decay:g}")
        self.scale, self.bias = (
            nnx.Param(jnp.ones(size.dim), decays=False),
            nnx.Param(jnp.zeros(size.dim), decays=False),
        )
        self.mean, self.variance = nnx.Variable(jnp.zeros(size.dim)), nnx.Variable(jnp.ones(size.dim))
        self.passes = nnx.Variable(jnp.zeros((), jnp.int32))
        self.decay = decay

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        exact, mean, variance = x.astype(jnp.float32), self.mean[...], self.variance[...]
        if context.train:
            valid = jnp.ones(x.shape[:-1], bool) if context.valid is None else context.valid
            mean, variance = moments(exact, valid)
            self._move(lax.stop_gradient(mean), lax.stop_gradient(variance), valid.any())
        z = (exact - mean) * lax.rsqrt(variance + EPSILON)
        return (self.scale[...] * z + self.bias[...]).astype(x.dtype)

    def _move(self, mean: jax.Array, variance: jax.Array, known: jax.Array) -> None:
        """Towards those of a batch, where anything of it is `known` ()."""
        passes = self.passes[...]
        rate = jnp.where(known, jnp.maximum(1 - self.decay, 1 / (passes + 1)), 0)
        for kept, new in ((self.mean, mean), (self.variance, variance)):
            kept[...] = kept[...] + rate * (new - kept[...])
        self.passes[...] = passes + known


def moments(x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance (D,) of the rows of x (..., D) that are valid (...); zeros where none is."""
    count, axes = jnp.maximum(valid.sum(), 1), range(valid.ndim)
    over_rows = lambda values: jnp.where(valid[..., None], values, 0).sum(axes) / count
    mean = over_rows(x)
    return mean, over_rows(jnp.square(x - mean))
