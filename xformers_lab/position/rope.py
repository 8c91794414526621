import jax.numpy as jnp
from flax import nnx

from xformers_lab.position import Position
from xformers_lab.size import Size


class Rope(Position):
    """Rotary positions: queries and keys are turned by their position (Su et al., 2021, arXiv 2104.09864, equation 34).

    Channels i and i + H/2 form a plane (the half-split layout of GPT-NeoX and Llama) turned by t / base^(2i/H), so a
    score depends on the distance alone.

    Options:
        base: the longest wavelength is base * 2 pi
    """

    def __init__(self, size: Size, *, base: float = 10_000.0, rngs: nnx.Rngs):
        if base <= 1:
            raise ValueError(f"base must be above 1, got {base}")
        if size.head % 2:
            raise ValueError(f"rotary positions pair channels, and a head of {size.head} (dim / heads) is odd")
        super().__init__(size, rngs=rngs)
        self.base = base

    def rotate(self, x, at):
        H = x.shape[-1]
        angle = at[:, None] * self.base ** (-jnp.arange(0, H, 2) / H)
        cos, sin = (wave(angle)[:, None].astype(x.dtype) for wave in (jnp.cos, jnp.sin))
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
