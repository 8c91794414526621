"""One layer: attention and feed-forward, each inside a residual placement."""

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab import spec
from xformers_lab.config import Config
from xformers_lab.depth._stack import add_aux
from xformers_lab.size import Size


class Block(nnx.Module):
    """The mechanisms and placements of one layer; one position, in the context, serves every layer."""

    def __init__(self, size: Size, attention: str, *, config: Config, causal: bool, rngs: nnx.Rngs):
        build = lambda shelf, choice: spec.build(shelf, choice, size, rngs=rngs)
        self.attention, self.attention_norm = build("attention", attention), build("norm", config.model.norm)
        self.attention_norm.start(self.attention)
        self.ffn = build("ffn", config.model.ffn)
        if self.ffn is not None:
            self.ffn_norm = build("norm", config.model.norm)
            self.ffn_norm.start(self.ffn)
        self.name, self.causal, self.dropout = attention, causal, config.model.dropout

    def initial_carries(self, x) -> dict:
        """{mechanism: carry below the first layer} for mechanisms that carry something from layer to layer."""
        if not self.attention.carries():
            return {}
        B, T, _ = x.shape
        return {self.name: self.attention.initial_carry(B, T, T)}

    def __call__(self, x, carries, context, *, key=None):
        """(B, T, D) and {mechanism: carry} -> the same, and a dict of auxiliary scalars."""
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        y, carry, aux = self.attention(
            self.attention_norm.before(x),
            real=context.real,
            causal=self.causal,
            position=context.position,
            carry=carries.get(self.name),
            key=keys[0],
        )
        if self.name in carries:
            carries = carries | {self.name: carry}
        x = self.attention_norm.after(x, drop(y, self.dropout, keys[1]))
        if self.ffn is not None:
            y, more = self.ffn(self.ffn_norm.before(x), real=context.real, key=keys[2])
            x = self.ffn_norm.after(x, drop(y, self.dropout, keys[3]))
            aux = add_aux(aux, more)
        return x, carries, aux


def drop(x, rate: float, key):
    """Residual dropout (Srivastava et al., 2014): zero a share `rate` of x, scale the rest; identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
