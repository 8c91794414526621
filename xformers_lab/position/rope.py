from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position


class Rope(Position):
    """Rotary positions: queries and keys are turned by their position (Su et al., 2021, arXiv 2104.09864, equation 34).

    Plane i of H/2 is turned by the angle t / (scale base^(2i/H)), so a score depends on the distance alone.

    Options:
        base: the longest wavelength is base * 2 pi
        pairs: which channels form a plane; half: i and i + H/2 (GPT-NeoX, Llama), interleaved: 2i and 2i + 1 (GPT-J)
        scale: positions are divided by it, to reach lengths beyond those trained on (Chen et al., 2023, arXiv
            2306.15595)
    """

    turns = True

    def __init__(
        self,
        size: Size,
        *,
        base: float = 10_000.0,
        pairs: Literal["half", "interleaved"] = "half",
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if base <= 1:
            raise Refused(f"base must be above 1, got {base}")
        if scale <= 0:
            raise Refused(f"scale must be above 0, got {scale}")
        if size.head % 2:
            raise Refused(f"rotary positions pair channels, and a head of {size.head} (dim / heads) is odd")
        super().__init__(size, rngs=rngs)
        self.base, self.pairs, self.scale = base, pairs, scale

    def rotate(self, x: jax.Array, at: jax.Array) -> jax.Array:
        H = x.shape[-1]
        angle = at[:, None] / self.scale * self.base ** (-jnp.arange(0, H, 2) / H)
        cos, sin = (wave(angle)[:, None].astype(x.dtype) for wave in (jnp.cos, jnp.sin))
        if self.pairs == "half":
            a, b = jnp.split(x, 2, -1)
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
