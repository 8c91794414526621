import jax
from flax import nnx

from xformers_lab.depth import Context, Depth
from xformers_lab.depth._stack import add_aux, build_stack, init_caches, initial_carries, run_stack, step_stack
from xformers_lab.size import Size


class Fixed(Depth):
    """Every token gets every layer, each with parameters of its own (Vaswani et al., 2017, arXiv 1706.03762)."""

    own_layers = True

    def __init__(self, size: Size, *, make_block, period: int, rngs: nnx.Rngs):
        whole = size.layers // period * period
        places = lambda first, last: [list(range(first + place, last, period)) for place in range(period)]
        self.periods = nnx.List(build_stack(make_block, at, rngs) for at in places(0, whole) if at)
        # What is left of a last, shorter period.
        self.rest = nnx.List(build_stack(make_block, at, rngs) for at in places(whole, size.layers) if at)

    def __call__(self, x, context: Context, *, key=None):
        first, second = (None, None) if key is None else jax.random.split(key)
        carries = initial_carries([*self.periods, *self.rest], x.shape[0], x.shape[1], x.shape[1])
        x, carries, aux = run_stack(list(self.periods), x, carries, context, key=first)
        x, carries, more = run_stack(list(self.rest), x, carries, context, key=second)
        return x, add_aux(aux, more)

    def init_cache(self, B: int, length: int):
        """Caches of all layers, and what the mechanisms find below the first of them for one query."""
        layers = [init_caches(list(blocks), B, length) for blocks in (self.periods, self.rest)]
        return {"layers": layers, "below": initial_carries([*self.periods, *self.rest], B, 1, length)}

    def step(self, x, cache, context: Context, *, at):
        first, second = cache["layers"]
        x, first, carries = step_stack(list(self.periods), x, first, cache["below"], context, at)
        x, second, _ = step_stack(list(self.rest), x, second, carries, context, at)
        return x, cache | {"layers": [first, second]}
