import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position

# How often a plane turns within the trained length that yarn divides, or that it leaves, as its paper has it for Llama.
FEW, MANY = 1, 32


class Rope(Position):
    """Rotary positions: queries and keys are turned by their position (Su et al., 2021, arXiv 2104.09864, equation 34).

    Plane i of H/2 is turned by the angle t / base^(2i/H), so a score depends on the distance alone.

    With `scale` it reaches lengths so many times those it was trained on. linear divides positions by it (Chen et al.,
    2023, arXiv 2306.15595). ntk makes the base base scale^(H/(H-2)) instead, so that the fastest plane stays as it is
    and the slowest is divided. yarn divides a plane that turns once or less within the trained length, leaves one that
    turns 32 times or more, goes from one to the other by the number of turns between, and multiplies scores by
    (0.1 ln scale + 1)^2 (ntk and yarn: Peng et al., 2023, arXiv 2309.00071).
    Deviations from the paper: yarn's ramp is of turns, as in its equations; its authors' code has one of the planes'
        numbers.

    Options:
        base: the longest wavelength is base * 2 pi
        pairs: which channels form a plane; half: i and i + H/2 (GPT-NeoX, Llama), interleaved: 2i and 2i + 1 (GPT-J)
        scale: how many times the trained length it is to reach; 1 changes nothing
        scaling: how it reaches it
        trained: the trained length, which scaling=yarn needs
        turned: the share of each head's channels that are turned, the first ones; the others know no position (GPT-J,
            GPT-NeoX)
    """

    turns = True
    later_options: ClassVar = ("scaling", "trained", "turned")

    def __init__(
        self,
        size: Size,
        *,
        base: float = 10_000.0,
        pairs: Literal["half", "interleaved"] = "half",
        scale: float = 1.0,
        scaling: Literal["linear", "ntk", "yarn"] = "linear",
        trained: int | None = None,
        turned: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if base <= 1:
            raise Refused(f"base must be above 1, got {base}")
        if scale <= 0:
            raise Refused(f"scale must be above 0, got {scale}")
        if not 0 < turned <= 1:
            raise Refused(f"turned is a share of the channels, above 0 and at most 1, got {turned:g}")
        if turned == 1 and size.head % 2:
            raise Refused(f"rotary positions pair channels, and a head of {size.head} (dim / heads) is odd")
        if size.head < 2:
            raise Refused("rotary positions pair channels, and a head (dim / heads) has one alone")
        if scaling == "yarn" and (trained is None or trained < 1):
            raise Refused("scaling=yarn goes by how often planes turn within the trained length: such as trained=128")
        if scaling != "yarn" and trained is not None:
            raise Refused(f"trained={trained} is an option of scaling=yarn, got scaling={scaling}")
        super().__init__(size, rngs=rngs)
        self.base, self.pairs, self.scale, self.turned = base, pairs, scale, turned
        self.scaling, self.trained = scaling, trained
        if scaling == "yarn":
            self.share = (0.1 * math.log(scale) + 1) ** 2

    def rotate(self, x: jax.Array, at: jax.Array) -> jax.Array:
        # A mechanism may turn a part of a head, of which the share is taken.
        channels = 2 * max(1, round(self.turned * x.shape[-1] / 2))
        x, rest = x[..., :channels], x[..., channels:]
        angle = at[:, None] * self.speeds(channels)
        cos, sin = (wave(angle)[:, None].astype(x.dtype) for wave in (jnp.cos, jnp.sin))
        if self.pairs == "half":
            a, b = jnp.split(x, 2, -1)
            x = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
        else:
            a, b = x[..., ::2], x[..., 1::2]
            x = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
        return jnp.concatenate([x, rest], -1)

    def speeds(self, channels: int) -> jax.Array:
        """By how much one position turns each plane of so many channels (channels / 2,)."""
        powers = jnp.arange(0, channels, 2) / channels
        if self.scaling == "ntk":
            # One plane alone is the fastest, which stays.
            base = self.base * self.scale ** (channels / (channels - 2)) if channels > 2 else self.base
            return base**-powers
        speeds = self.base**-powers
        if self.trained is None:
            return speeds / self.scale
        turns = self.trained * speeds / (2 * math.pi)
        kept = jnp.clip((turns - FEW) / (MANY - FEW), 0, 1)
        return speeds * (kept + (1 - kept) / self.scale)
