from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.memory import Look, Remembered
from xformers_lab.memory.xl import Xl
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Compressive(Xl):
    """Compressive Transformer: states that leave the memory of Transformer-XL are compressed, not dropped (Rae et al.,
    2019, arXiv 1911.05507, section 3).

        source = stop_gradient([c; m]), then h    (B, C + M + T, D)
        c'     = the last C rows of [c; pool(o)]  o: the T oldest rows of [m; h], pooled `rate` at a time

    Compressed states stand at the positions right before the memory, as if each were one token. The mean and the
    maximum of the valid states have no parameters. conv is a convolution whose kernel and stride are `rate`, W [o_1;
    ...; o_rate] + b in every layer, trained by what the layer's attention gets of the compressed states in place of
    those they were made of (algorithm 2 of the paper):

        compression loss = |look(h, o) - look(h, conv(o))|^2,    look(h, s) = softmax(q(h) k(s)^T / sqrt(H)) v(s)

    the mean over valid queries and channels of the heads, for every layer, whatever its mechanism, without positions.
    h, o and the layer's parameters are constants in it, so that it trains W and b alone; and nothing else does, for no
    gradient flows into what is remembered. It costs attention on T + T / rate keys more. The paper's dilated
    convolutions and most used states are not here.

    Options:
        length: remembered states M per layer (none: as many as a segment has)
        compressed: compressed states C per layer (none: as many as a segment has)
        rate: how many states become one; must divide the length of a segment
        pool: mean or max of them, or conv, which is learned
    """

    def __init__(
        self,
        size: Size,
        *,
        length: int | None = None,
        compressed: int | None = None,
        rate: int = 4,
        pool: Literal["mean", "max", "conv"] = "mean",
        rngs: nnx.Rngs,
    ):
        super().__init__(size, length=length, rngs=rngs)
        self.recent, self.old = self.length, size.length if compressed is None else compressed
        if self.old < 1:
            raise Refused(f"compressed must be at least 1, got {compressed}; memory=xl compresses nothing")
        if rate < 1 or size.length % rate:
            raise Refused(f"rate={rate} must divide seq_len={size.length}, the states that leave at a time")
        self.length, self.rate, self.pool = self.recent + self.old, rate, pool
        self.learns = pool == "conv"
        if self.learns:
            self.conv = Linear(rate * size.dim, size.dim, dtype=size.dtype, rngs=rngs)
        self.states = Remembered(jnp.zeros((1, self.length, size.dim), size.dtype))
        self.valid = Remembered(jnp.zeros((1, self.length), bool))

    def write(self, x: jax.Array, valid: jax.Array | None) -> None:
        states, known = self._all(x, valid)
        pooled, counted = self.compressed(*self._leaving(states, known, x.shape[1]))
        join = lambda old, new, recent: jnp.concatenate(
            [jnp.concatenate([old[:, : self.old], new], 1)[:, -self.old :], recent[:, -self.recent :]], 1
        )
        self.states.set_value(lax.stop_gradient(join(states, pooled, states)))
        self.valid.set_value(join(known, counted, known))

    def _all(self, x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """What is remembered and the segment, and which of both is valid."""
        states, known = self.read(len(x))
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        return jnp.concatenate([states, x.astype(states.dtype)], 1), jnp.concatenate([known, valid], 1)

    def _leaving(self, states: jax.Array, known: jax.Array, T: int) -> tuple[jax.Array, jax.Array]:
        """What a segment of T pushes out of the memory of single states."""
        if T % self.rate:
            raise Refused(f"a segment of {T} tokens cannot be compressed {self.rate} at a time")
        return states[:, self.old : self.old + T], known[:, self.old : self.old + T]

    def compressed(self, states: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, T, D) and which of it is valid (B, T) -> the same of the T / rate states that they become."""
        B, _, D = states.shape
        states, known = states.reshape(B, -1, self.rate, D), known.reshape(B, -1, self.rate)
        some, inside = known.any(2), jnp.where(known[..., None], states, 0)
        if self.pool == "conv":
            return self.conv(inside.reshape(B, -1, self.rate * D)), some
        if self.pool == "mean":
            return inside.sum(2) / jnp.maximum(known.sum(2), 1)[..., None].astype(states.dtype), some
        most = jnp.where(known[..., None], states, jnp.finfo(states.dtype).min).max(2)
        return jnp.where(some[..., None], most, 0), some

    def loss(self, x: jax.Array, valid: jax.Array | None, look: Look) -> Aux:
        if not self.learns:
            return Aux()
        states, known = self._leaving(*self._all(lax.stop_gradient(x), valid), x.shape[1])
        short, whole = look(*self.compressed(states, known)), look(states, known)
        apart = jnp.square(short.astype(jnp.float32) - whole.astype(jnp.float32)).mean((2, 3))
        # Queries that are valid, of sequences of which something leaves.
        counted = jnp.broadcast_to(known.any(1)[:, None], apart.shape) & (True if valid is None else valid)
        total = jnp.where(counted, apart, 0).sum()
        return Aux(losses={"compression": total / jnp.maximum(counted.sum(), 1)})
