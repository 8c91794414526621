from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.size import Size


class Layerdrop(Fixed):
    """LayerDrop: in training every layer is left out of a step with probability `rate` (Fan et al., 2019, arXiv
    1909.11556). In evaluation all of them run; a model trained so also works with fewer.

    Options:
        rate: probability that a layer is left out
    """

    documents_apart = True
    several_streams = True

    def __init__(self, size: Size, *, rate: float = 0.2, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        if not 0 <= rate < 1:
            raise Refused(f"rate is a probability below 1, got {rate}")
        droppable = lambda index, rngs: Droppable(make_block(index, rngs), rate)
        super().__init__(size, make_block=droppable, period=period, rngs=rngs)


class Droppable(nnx.Module):
    """A block that training may leave out."""

    def __init__(self, block: Any, rate: float):
        self.block, self.rate = block, rate

    def __call__(
        self, x: jax.Array, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any], Aux]:
        y, above, aux = self.block(x, carries, context, key=key)
        if key is None:
            return y, above, aux
        runs = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - self.rate)
        keep = lambda new, old: jnp.where(runs, new, old)
        aux = jax.tree.map(lambda value: jnp.where(runs, value, 0), aux)
        return keep(y, x), jax.tree.map(keep, above, carries), aux | computation(runs)

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return self.block.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int) -> Any:
        return self.block.init_cache(B, length)

    def step(
        self, x: jax.Array, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        return self.block.step(x, cache, carries, context, at)

    def step_several(self, x: jax.Array, cache: Any, context: Context, at: jax.Array) -> tuple[jax.Array, Any]:
        return self.block.step_several(x, cache, context, at)

    def rewound(self, before: Any, after: Any, taken: jax.Array, *, read: int) -> Any:
        return self.block.rewound(before, after, taken, read=read)
