import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.nn.backward import Backward
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size

EPSILON = 1e-5


class Powernorm(nnx.Module):
    """PowerNorm: each channel divided by its running root mean square over valid rows (Shen et al., 2020, arXiv
    2003.07845, algorithm 2).

        y = g z + b,    z = x / psi,    in training then    psi^2 <- psi^2 + (1 - decay) (mean x^2 - psi^2)
        dx = (dz - nu z) / psi,         in training then    nu <- nu + (1 - decay) (mean dz z - nu mean z^2)

    per channel (D,), with the psi and nu of before the step; means are of the valid rows of the whole batch, and dx has
    no nu in padded rows. psi and nu are no parameters: the state keeps them and checkpoints save them. Evaluation and
    decoding divide by psi and move nothing, so that there a row does not depend on others. In the first `warmup`
    training passes psi is that of the batch itself, and dx the exact gradient, (dz - z mean dz z) / psi (the paper's
    PN-V): a decoder trained so sees what comes later in the batch.

    Deviations: the moving average of psi^2 starts as the plain mean of the batches so far, not at 1; nu is of the
    gradient of the summed loss, as it comes, before the step divides it by the number of targets. The authors' code
    first scales groups of channels in each row, and divides dx by the batch's psi; this is the paper's algorithm.
    A normaliser that a step passes several times (accumulate, a depth that repeats layers) moves at each; there dx has
    the nu of the pass's start, for it is not known in between. Under layout=pmap each device has statistics of its own
    rows, and their mean is kept.

    Options:
        decay: how much of the running statistics a training pass keeps
        warmup: training passes that use the statistics of their batch
    """

    def __init__(self, size: Size, *, decay: float = 0.9, warmup: int = 100, rngs: nnx.Rngs):
        if not 0 <= decay < 1:
            raise Refused(f"decay is the share of the statistics that is kept, at least 0 and below 1, got {decay:g}")
        if warmup < 0:
            raise Refused(f"warmup is a number of training passes, at least 0, got {warmup}")
        self.scale, self.bias = (
            nnx.Param(jnp.ones(size.dim), decays=False),
            nnx.Param(jnp.zeros(size.dim), decays=False),
        )
        self.square, self.nu = nnx.Variable(jnp.ones(size.dim)), Backward(jnp.zeros(size.dim))
        self.passes = nnx.Variable(jnp.zeros((), jnp.int32))
        self.decay, self.warmup = decay, warmup

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        if context.train:
            z = self._train(x, jnp.ones(x.shape[:-1], bool) if context.valid is None else context.valid)
        else:
            z = x.astype(jnp.float32) * lax.rsqrt(self.square[...] + EPSILON)
        return (self.scale[...] * z + self.bias[...]).astype(x.dtype)

    def _train(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        square, passes = self.square[...], self.passes[...]
        batch = mean(jnp.square(lax.stop_gradient(x).astype(jnp.float32)), valid)
        warming = passes < self.warmup
        psi = jnp.sqrt(jnp.where(warming, batch, square) + EPSILON)
        z, self.nu[...] = divided(x, valid, psi, warming, self.nu[...], self.decay)
        rate = jnp.maximum(1 - self.decay, 1 / (passes + 1))
        self.square[...] = square + jnp.where(valid.any(), rate, 0) * (batch - square)
        self.passes[...] = passes + 1
        return z


def mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """(..., D) over the rows that are valid (...) -> (D,); zeros where none is."""
    return jnp.where(valid[..., None], values, 0).sum(range(valid.ndim)) / jnp.maximum(valid.sum(), 1)


@jax.custom_vjp
def divided(
    x: jax.Array, valid: jax.Array, psi: jax.Array, warming: jax.Array, nu: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """z = x / psi (..., D) in float32, and nu (D,), see `Backward`; valid (...), psi (D,), warming ()."""
    return x.astype(jnp.float32) / psi, nu


def _forward(*arguments):
    return divided(*arguments), arguments


def _backward(saved, grads):
    x, valid, psi, warming, nu, decay = saved
    dz, newest = grads
    z = x.astype(jnp.float32) / psi
    along = mean(dz * z, valid)
    share = jnp.where(valid[..., None], jnp.where(warming, along, nu) * z, 0)
    newest = newest + (1 - decay) * (along - newest * mean(jnp.square(z), valid))
    return ((dz - share) / psi).astype(x.dtype), None, None, None, newest, None


divided.defvjp(_forward, _backward)
