from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.memory import Remembered
from xformers_lab.memory.xl import Xl
from xformers_lab.size import Size


class Compressive(Xl):
    """Compressive Transformer: states that leave the memory of Transformer-XL are compressed, not dropped (Rae et al.,
    2019, arXiv 1911.05507, section 3).

        source = stop_gradient([c; m]), then h    (B, C + M + T, D)
        c'     = the last C rows of [c; pool(o)]  o: the T oldest rows of [m; h], pooled `rate` at a time

    Compressed states stand at the positions right before the memory, as if each were one token. The mean and the
    maximum of the real states are taken; neither has parameters, so there is nothing for the paper's reconstruction
    loss to train, and its learned compressions (convolution, most used) are not here.

    Options:
        length: remembered states M per layer (none: as many as a segment has)
        compressed: compressed states C per layer (none: as many as a segment has)
        rate: how many states become one; must divide the length of a segment
        pool: mean or max of them
    """

    def __init__(
        self,
        size: Size,
        *,
        length: int | None = None,
        compressed: int | None = None,
        rate: int = 4,
        pool: Literal["mean", "max"] = "mean",
        rngs: nnx.Rngs,
    ):
        super().__init__(size, length=length, rngs=rngs)
        self.recent, self.old = self.length, size.length if compressed is None else compressed
        if self.old < 1:
            raise ValueError(f"compressed must be at least 1, got {compressed}; memory=xl compresses nothing")
        if rate < 1 or size.length % rate:
            raise ValueError(f"rate={rate} must divide seq_len={size.length}, the states that leave at a time")
        self.length, self.rate, self.pool = self.recent + self.old, rate, pool
        self.states = Remembered(jnp.zeros((1, self.length, size.dim), size.dtype))
        self.real = Remembered(jnp.zeros((1, self.length), bool))

    def write(self, x, real):
        B, T, D = x.shape
        if T % self.rate:
            raise ValueError(f"a segment of {T} tokens cannot be compressed {self.rate} at a time")
        states, known = self.read(B)
        real = jnp.ones((B, T), bool) if real is None else real
        states = jnp.concatenate([states, x.astype(states.dtype)], 1)
        known = jnp.concatenate([known, real], 1)
        start, end = self.old, self.old + T
        leaving = states[:, start:end].reshape(B, -1, self.rate, D)
        counted = known[:, start:end].reshape(B, -1, self.rate)
        if self.pool == "mean":
            total = jnp.where(counted[..., None], leaving, 0).sum(2)
            pooled = total / jnp.maximum(counted.sum(2), 1)[..., None].astype(total.dtype)
        else:
            lowest = jnp.finfo(leaving.dtype).min
            most = jnp.where(counted[..., None], leaving, lowest).max(2)
            pooled = jnp.where(counted.any(2)[..., None], most, 0)
        join = lambda old, new, recent: jnp.concatenate(
            [jnp.concatenate([old[:, : self.old], new], 1)[:, -self.old :], recent[:, -self.recent :]], 1
        )
        self.states.set_value(lax.stop_gradient(join(states, pooled, states)))
        self.real.set_value(join(known, counted.any(2), known))
