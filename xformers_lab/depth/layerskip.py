from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._stack import initial_carries, rounds, run_stack, run_watched
from xformers_lab.depth.fixed import Fixed
from xformers_lab.depth.layerdrop import Droppable
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.size import Size


class Layerskip(Fixed):
    """LayerSkip: layers that are left out the more often the higher they are, and one head that answers above any of
    them (Elhoushi et al., 2024, arXiv 2404.16710).

    In training layer l = 0..L - 1 is left out of a sample with probability

        p_l = dropout S(t) (2^(l / (L - 1)) - 1),    S(t) = 2^min(t / ramp, 1) - 1, or 1 without a ramp

    t counts training passes. The model's own head, its last norm included, also answers above the first l + 1 layers,
    l < L - 1, and the loss gets the loss of that answer, with a weight relative to that of the last layer,

        scale (l + 1) (l + 2) / (L (L + 1)),    where the curriculum has it enabled

        rotational   every `every`-th exit, another one each pass: as many as exits by default, so one a pass
        gradual      the highest first, one more in ramp / (2 L) passes
        none         all of them

    Evaluation runs all layers, or answers above the first `exit` of them: `xlab eval RUN depth.exit=2`. In generation
    `xlab generate RUN --temperature 0 --draft 2` has the first two propose tokens, which the others then verify
    together, so that what is written is what all layers would write (self-speculative decoding). With mechanisms joined
    by `+` there is an exit above each round of them; l and L then count rounds in the weights.

    A dropped layer is computed for all samples and left out of some, so dropping saves no time here; mechanisms that
    hand something to the layer above are refused. "computation" is the mean number of layers that a sample had.

    Deviations from the paper: weights of exits are relative to that of the last layer's loss, which keeps its weight of
    1 (the paper divides all by their sum), and are sums of 1, 2, ..., as the authors' code has them (the paper's begin
    at 0, which leaves the first exit untrained).

    Options:
        dropout: probability that the last layer is left out
        scale: of the exits' weights
        curriculum: which exits have a loss at a time
        every: with rotational, so many exits take turns; none: all of them
        ramp: training passes in which dropout grows, and gradual's exits come in; 0: dropout is there from the start
        exit: layers that an evaluation answers above; none: all
    """

    own_layers = False  # a sample may pass a layer by
    documents_apart = True
    several_streams = True

    def __init__(
        self,
        size: Size,
        *,
        dropout: float = 0.1,
        scale: float = 1.0,
        curriculum: Literal["rotational", "gradual", "none"] = "rotational",
        every: int | None = None,
        ramp: int = 0,
        exit: int | None = None,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if not 0 <= dropout < 1:
            raise Refused(f"dropout is a probability below 1, got {dropout:g}")
        if scale < 0 or ramp < 0:
            raise Refused(f"scale and ramp must be at least 0, got {scale:g} and {ramp}")
        if every is not None and every < 1:
            raise Refused(f"every must be at least 1, got {every}")
        if curriculum == "gradual" and not ramp:
            raise Refused("curriculum=gradual brings exits in over a number of training passes: say it as ramp=")
        skipped = lambda index, rngs: Skipped(make_block(index, rngs), dropout, last=max(size.layers - 1, 1))
        super().__init__(size, make_block=skipped, period=period, rngs=rngs)
        self.exits = self.whole // period - (not self.rest)
        if self.exits < 1:
            raise Refused(f"layers={size.layers} have no exit between rounds of {period}: use more layers")
        if exit is not None and exit != size.layers:
            self.check_exit(exit)
        self.exit, self.scale, self.curriculum, self.ramp = exit, scale, curriculum, ramp
        self.every = self.exits if every is None else min(every, self.exits)
        self.passes = nnx.Variable(jnp.zeros((), jnp.int32))

    @property
    def cut(self) -> int | None:
        """How many layers an evaluation runs, None where it leaves none out."""
        return self.exit if self.exit != self.layers else None

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        if key is not None:
            return self._train(x, context, key)
        if self.cut is None:
            return super().__call__(x, context)
        blocks = rounds(self.periods, 0, self.cut // self.period)
        carries = initial_carries(blocks, x.shape[0], x.shape[1], x.shape[1])
        x, _, aux = run_stack(blocks, x, carries, context, key=None, plan=self.plan)
        return x, aux

    def _train(self, x: jax.Array, context: Context, key: jax.Array) -> tuple[jax.Array, Aux]:
        if context.predict is None:
            raise Refused("depth=layerskip needs a model that tells how it predicts, see Context.predict")
        passes = self.passes[...]
        self.passes[...] = passes + 1
        progress = jnp.minimum(passes / self.ramp, 1) if self.ramp else jnp.ones(())
        state = x, jnp.zeros((), jnp.int32), jnp.exp2(progress) - 1
        first, second = jax.random.split(key)
        of_stack = {"plan": self.plan, "watch": lambda state: state[0]}
        state, _, aux, states = run_watched(list(self.periods), state, {}, context, key=first, **of_stack)
        state, _, more = run_stack(list(self.rest), state, {}, context, key=second, plan=self.plan)
        predictions = {}
        for name, number, weight in self.enabled(passes, progress):
            predictions[name] = weight, context.predict(states[number], valid=context.valid)
        return state[0], (aux + more) | Aux(predictions=predictions)

    def enabled(self, passes: jax.Array, progress: jax.Array) -> list[tuple[str, Any, jax.Array]]:
        """(name, exit, its weight) of every loss of a training pass, exits counted from 0: those of a rotation change
        from pass to pass."""
        heads = self.exits + 1
        weight = lambda number: self.scale * (number + 1) * (number + 2) / (heads * (heads + 1))
        if self.curriculum == "rotational":
            turns = [passes % self.every + turn * self.every for turn in range(-(-self.exits // self.every))]
            there = [(jnp.minimum(number, self.exits - 1), number < self.exits) for number in turns]
            return [
                (f"early{turn}", number, jnp.where(ok, weight(number), 0.0))
                for turn, (number, ok) in enumerate(there, 1)
            ]
        named = [(f"exit{(number + 1) * self.period}", number) for number in range(self.exits)]
        if self.curriculum == "none":
            return [(name, number, jnp.asarray(weight(number))) for name, number in named]
        due = lambda number: 2 * progress >= (heads - 1 - number) / heads
        return [(name, number, jnp.where(due(number), weight(number), 0.0)) for name, number in named]

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        if self.cut is not None:
            return self.step_below(x, cache, context, at=at, layers=self.cut)
        return super().step(x, cache, context, at=at)

    def step_several(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        if self.cut is not None:
            return Depth.step_several(self, x, cache, context, at=at)
        return super().step_several(x, cache, context, at=at)

    def check_draft(self, layers: int) -> None:
        if self.cut is not None:
            raise Refused(
                f"depth=layerskip:exit={self.exit} answers above the layers that would verify: leave exit out"
            )
        super().check_draft(layers)


class Skipped(Droppable):
    """A block that training leaves out of some samples; rate: how probable that is for the layer of number `last`.

    In training the state goes with the number of the layer, and with what all probabilities are multiplied by.
    """

    def __init__(self, block: Any, rate: float, *, last: int):
        super().__init__(block, rate)
        self.last = last
        if block.initial_carries(1, 1, 1):
            raise Refused(
                f"attention={block.name} hands something to the layer above, which a layer that was left out of some "
                "samples has not: use depth=layerdrop, or another attention"
            )

    def __call__(
        self, x: Any, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[Any, dict[str, Any], Aux]:
        if key is None:
            return self.block(x, carries, context)
        x, number, growth = x
        y, carries, aux = self.block(x, carries, context, key=key)
        rate = growth * self.rate * (jnp.exp2(number / self.last) - 1)
        drops = jax.random.bernoulli(jax.random.fold_in(key, 1), rate, (len(x),))
        x = jnp.where(drops[:, None, None], x, y)
        return (x, number + 1, growth), carries, aux | computation(1 - drops.mean())
