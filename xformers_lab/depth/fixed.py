from typing import Any, ClassVar

import jax
from flax import nnx

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._stack import (
    build_stack,
    caches_of,
    caches_with,
    depth_of,
    first,
    init_caches,
    initial_carries,
    rewound,
    rounds,
    run_stack,
    several_stack,
    step_stack,
)
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class Fixed(Depth):
    """Every token gets every layer, each with parameters of its own (Vaswani et al., 2017, arXiv 1706.03762)."""

    own_layers = True
    documents_apart = True
    several_streams = True
    # Whether `step` is no more than the step of every layer in turn, so that several tokens may pass a layer together.
    plain_step: ClassVar[bool] = True
    # Whether a step of its own loops over the caches of all layers, which are then stacked.
    stacked_caches: ClassVar[bool] = False

    def __init__(self, size: Size, *, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        whole = size.layers // period * period
        places = lambda first, last: [list(range(first + place, last, period)) for place in range(period)]
        self.periods = nnx.List(build_stack(make_block, at, rngs) for at in places(0, whole) if at)
        self.plan, self.period, self.whole, self.layers = plan_of(size), period, whole, size.layers
        # What is left of a last, shorter period.
        self.rest = nnx.List(build_stack(make_block, at, rngs) for at in places(whole, size.layers) if at)

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        B, T = x.shape[:2]
        x, _, aux = self.run(x, self.initial_carries(B, T, T), context, key=key)
        return x, aux

    def run(
        self, x: Any, carries: dict[str, Any], context: Any, *, key: jax.Array | None = None
    ) -> tuple[Any, dict[str, Any], Aux]:
        """All layers on x, whatever their blocks take as it and as context -> x, the last layer's carries, aux."""
        one, other = (None, None) if key is None else jax.random.split(key)
        x, carries, aux = run_stack(list(self.periods), x, carries, context, key=one, plan=self.plan)
        x, carries, more = run_stack(list(self.rest), x, carries, context, key=other, plan=self.plan)
        return x, carries, aux + more

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        """What the mechanisms get below the first layer, for T queries and S keys."""
        return initial_carries([*self.periods, *self.rest], B, T, S)

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Caches of all layers, and what the mechanisms get below the first of them for one query."""
        layers = []
        for blocks in map(list, (self.periods, self.rest)):
            count = depth_of(blocks[0]) if blocks else 0
            # In a loop over layers each step would copy their caches out and in.
            written_out = not self.stacked_caches and count * len(blocks) <= self.plan.unrolled
            layers.append(init_caches(blocks, B, length, written_out=written_out))
        return {"layers": layers, "below": self.initial_carries(B, 1, length)}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        x, layers, _ = self.run_step(x, cache["layers"], cache["below"], context, at=at)
        return x, cache | {"layers": layers}

    def step_several(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        if not self.plain_step or cache["below"]:
            return super().step_several(x, cache, context, at=at)
        layers = []
        for blocks, caches in zip((self.periods, self.rest), cache["layers"], strict=True):
            x, caches = several_stack(list(blocks), x, caches, context, at)
            layers.append(caches)
        return x, cache | {"layers": layers}

    # ---- drafting ----------------------------------------------------------------------------------------------------

    def check_draft(self, layers: int) -> None:
        if not self.plain_step:
            super().check_draft(layers)
        self.check_exit(layers)
        if carrying := [block for block in (*self.periods, *self.rest) if first(block).initial_carries(1, 1, 1)]:
            raise Refused(
                f"attention={first(carrying[0]).name} hands something to the layer above, which tokens that are "
                "verified later would miss; use another attention"
            )

    def check_exit(self, layers: int) -> None:
        """Raises Refused where no token can be answered above so many layers."""
        known = range(self.period, min(self.whole, self.layers - 1) + 1, self.period)
        if layers not in known:
            mend = f"the first ones are {', '.join(map(str, known))}" if known else "use more layers"
            raise Refused(
                f"{layers} of {self.layers} layers: others must be above them, and whole rounds of the {self.period} "
                f"mechanism(s) below; {mend}"
            )

    def step_below(
        self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array, layers: int
    ) -> tuple[jax.Array, Any]:
        (caches, rest), count = cache["layers"], layers // self.period
        some = caches_of(caches, 0, count)
        x, some, _ = step_stack(rounds(self.periods, 0, count), x, some, cache["below"], context, at)
        return x, cache | {"layers": [caches_with(caches, some, 0), rest]}

    def step_above(
        self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array, layers: int
    ) -> tuple[jax.Array, Any]:
        (caches, rest), count = cache["layers"], layers // self.period
        if layers < self.whole:
            some = caches_of(caches, count)
            x, some = several_stack(rounds(self.periods, count), x, some, context, at)
            caches = caches_with(caches, some, count)
        x, rest = several_stack(list(self.rest), x, rest, context, at)
        return x, cache | {"layers": [caches, rest]}

    def rewound(self, before: Any, after: Any, taken: jax.Array, *, read: int) -> Any:
        parts = zip((self.periods, self.rest), before["layers"], after["layers"], strict=True)
        layers = [rewound(list(blocks), old, new, taken, read=read) for blocks, old, new in parts]
        return after | {"layers": layers}

    def run_step(
        self, x: Any, layers: list, carries: dict[str, Any], context: Any, *, at: jax.Array
    ) -> tuple[Any, list, dict[str, Any]]:
        """`run` for one token, with the caches of all layers."""
        whole, rest = layers
        x, whole, carries = step_stack(list(self.periods), x, whole, carries, context, at)
        x, rest, carries = step_stack(list(self.rest), x, rest, carries, context, at)
        return x, [whole, rest], carries
