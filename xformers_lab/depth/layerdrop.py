import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import computation
from xformers_lab.nn.size import Size


class Layerdrop(Fixed):
    """LayerDrop: in training every layer is left out of a step with probability `rate` (Fan et al., 2019, arXiv
    1909.11556). In evaluation all of them run; a model trained so also works with fewer.

    Options:
        rate: probability that a layer is left out
    """

    def __init__(self, size: Size, *, rate: float = 0.2, make_block, period: int, rngs: nnx.Rngs):
        if not 0 <= rate < 1:
            raise Refused(f"rate is a probability below 1, got {rate}")
        droppable = lambda index, rngs: Droppable(make_block(index, rngs), rate)
        super().__init__(size, make_block=droppable, period=period, rngs=rngs)


class Droppable(nnx.Module):
    """A block that training may leave out."""

    def __init__(self, block, rate: float):
        self.block, self.rate = block, rate

    def __call__(self, x, carries, context, *, key=None):
        y, above, aux = self.block(x, carries, context, key=key)
        if key is None:
            return y, above, aux
        kept = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - self.rate)
        keep = lambda new, old: jnp.where(kept, new, old)
        aux = jax.tree.map(lambda value: jnp.where(kept, value, 0), aux)
        return keep(y, x), jax.tree.map(keep, above, carries), aux | computation(kept)

    def initial_carries(self, B: int, T: int, S: int):
        return self.block.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int):
        return self.block.init_cache(B, length)

    def step(self, x, cache, carries, context, at):
        return self.block.step(x, cache, carries, context, at)
