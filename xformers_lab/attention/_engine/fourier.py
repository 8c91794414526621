"""Fourier transforms that are the same at every run, and causal convolutions as long as the sequence by them."""

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab import hardware
from xformers_lab.nn.platform import platform

# Numbers of float32 in the widest vector of a CPU.
LANES = 16


def of_lines(transform, x):
    """A transform of the last axis, the same to the bit at every run.

    XLA:CPU shares lines among as many threads as it finds free, and lines that fill no vector of a thread's share are
    rounded otherwise. Zeros fill them up.
    """
    lines = x.reshape(-1, x.shape[-1])
    count = len(lines)
    if platform() == "cpu" and count >= LANES:  # fewer are one thread's
        lines = jnp.pad(lines, ((0, -count % (LANES * (hardware.cores() or 1))), (0, 0)))
    return transform(lines)[:count].reshape(*x.shape[:-1], -1)


def causal_convolution(x, taps, *, chunk: int):
    """sum_(s <= t) taps_(t-s) x_s along the last axis: x (B, D, S), taps (D, S) -> (B, D, S), float32.

    Of every 2s positions the second half is told by a transform what it has from the first, for s = chunk, 2 chunk and
    so on, and within chunks by products. One transform of the whole would be a logarithm cheaper, and let what comes
    later into what comes before, by rounding: large numbers are enough to see it.
    """
    B, D, S = x.shape
    blocks = lambda x, size: jnp.pad(x, ((0, 0), (0, 0), (0, -S % size))).reshape(B, D, -1, size)
    back = np.arange(chunk)[:, None] - np.arange(chunk)
    near = jnp.where(back >= 0, jnp.pad(taps, ((0, 0), (0, max(0, chunk - S))))[:, np.maximum(back, 0)], 0)
    inside = jnp.einsum("dij,bdmj->bdmi", near, blocks(x, chunk), preferred_element_type=jnp.float32)
    total, s = inside.reshape(B, D, -1)[:, :, :S], chunk
    while s < S:
        transform = lambda x, s=s: of_lines(lambda lines: jnp.fft.rfft(lines, 2 * s), x)
        product = transform(blocks(x, 2 * s)[..., :s]) * transform(taps[:, : 2 * s])[:, None]
        far = of_lines(lambda lines, s=s: jnp.fft.irfft(lines, 2 * s), product)[..., s:]
        total += jnp.pad(far, ((0, 0), (0, 0), (0, 0), (s, 0))).reshape(B, D, -1)[:, :, :S]
        s *= 2
    return total


def convolution_by_definition(x, taps):
    """The same, one position after the other."""
    S = x.shape[2]

    @jax.checkpoint
    def one(t):
        back = t - jnp.arange(S)
        return (jnp.where(back >= 0, taps[:, jnp.maximum(back, 0)], 0) * x).sum(2)

    return jnp.moveaxis(jax.lax.map(one, jnp.arange(S)), 0, 2)
