from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.embedding import marked
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._waves import waves


class Randomized(Position):
    """Randomized positions: tokens stand at places drawn from a range longer than any sequence (Ruoss et al., 2023,
    arXiv 2305.16843, section 3).

    The sinusoids of places i_1 < ... < i_T, drawn from 0..range - 1 without replacement, are added to T tokens as
    position=sinusoidal adds those of 0..T - 1. So no place is new in a sequence longer than those of training, up to
    `range` tokens. With draw=offset the places follow one another from a random one on (Dehghani et al., 2019, arXiv
    1807.03819, on algorithmic tasks). T is the length that the model is built for: what is shorter, padded or not,
    stands at the first places. In training a step draws once for all sequences, as both papers do; each device and
    each part of `accumulate` draws its own.
    Deviation from the papers: in evaluation they draw anew for every batch. Here a run draws once for each length, by
    its init_seed, so that it scores the same twice, and a token decoded stands where it stood in the whole.

    Options:
        range: how many places there are to draw from, at least seq_len and every test_len
        draw: subset: T places in order; offset: T that follow one another
    """

    embeds = True
    adds_waves = True

    def __init__(
        self,
        size: Size,
        *,
        range: int = 2048,
        draw: Literal["subset", "offset"] = "subset",
        rngs: nnx.Rngs,
    ):
        if range < size.length:
            raise Refused(
                f"range={range} has no places for {size.length} tokens: use range={size.length} or more, or a shorter "
                "seq_len and test_len"
            )
        super().__init__(size, rngs=rngs)
        self.range, self.draw = range, draw
        self.key = nnx.Variable(jax.random.key_data(rngs.params()))

    def drawn(self, key: jax.Array) -> "Randomized":
        other = nnx.clone(self)
        other.key[...] = jax.random.key_data(key)
        return other

    def places(self) -> jax.Array:
        """Where the tokens of a sequence stand, in ascending order, (T,) int32."""
        key, length = jax.random.wrap_key_data(self.key[...]), self.size.length
        if self.draw == "offset":
            return jax.random.randint(key, (), 0, self.range - length + 1) + jnp.arange(length)
        return jnp.sort(jax.random.permutation(key, self.range)[:length])

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        return marked(x, waves(self.places()[at], self.size.dim))
