from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._stack import run_layer
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, by_token, mean_of
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._waves import waves

# How large the waves of a step are beside those of positions: unit size stays that, nearly (nn/embedding.py).
STEP = 0.2


class Universal(Depth):
    """Universal Transformer: one layer, applied again and again (Dehghani et al., 2018, arXiv 1807.03819).

    `layers` counts the applications; mechanisms joined by `+` make one period that is applied layers / period times.
    Before each, a sinusoidal code of the step is added, and with position=sinusoidal that of the position, too: both
    are the paper's coordinates. code=false leaves them to what the model adds before the first step; layers then share
    their weights as in ALBERT (Lan et al., 2019, arXiv 1909.11942). With act=true every position halts on its own,
    once its halting probabilities p_n, of which the last is what is left to 1, sum up to 1 - slack:

        halting=after    p_n of the state s_n that step n gave, out = sum of p_n s_n; a halted position keeps its state,
                         and the last step halts whatever still runs (Graves, 2016, arXiv 1603.08983)
        halting=before   p_n of what step n is given, with its codes, out_n = p_n s_n + (1 - p_n) out_(n-1), out_0 = 0;
                         states go on beside, of halted positions, too, and what still runs at the end has no last
                         weight (the paper's listing)

    The loss gets ponder times the mean of steps plus remainder. "steps" reports the mean steps of a position, its
    figures of tokens those of each, which `xlab eval` prints along the sequence. Every step is computed for all
    positions; evaluation leaves the steps out behind which none is still running, and training and decoding none.
    "computation" counts what was needed, of each token, too.
    Deviations from the paper: with act=true its listing is halting=before; positions of another kind, learned ones too,
    are added once, before the first step; the code of the step is a fifth as large.

    Options:
        act: whether positions halt on their own
        halting: with act, what a halting probability is of, and how states are put together
        slack: how near to 1 the halting probabilities must come
        ponder: what a step costs in the loss
        code: whether the number of the step is added before it, and positions with it
    """

    documents_apart = True
    later_options: ClassVar = ("halting",)

    def __init__(
        self,
        size: Size,
        *,
        act: bool = False,
        halting: Literal["after", "before"] = "after",
        slack: float = 0.01,
        ponder: float = 0.01,
        code: bool = True,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if size.layers % period:
            raise Refused(f"layers={size.layers} is not divisible by the {period} mechanisms that share their weights")
        if not 0 < slack < 1 or ponder < 0:
            raise Refused(f"slack must be between 0 and 1 and ponder at least 0, got {slack} and {ponder}")
        self.steps, self.act, self.slack, self.ponder = size.layers // period, act, slack, ponder
        self.code, self.plan, self.halting = code, plan_of(size), halting
        self.blocks = nnx.List(make_block(index, rngs) for index in range(period))
        if act:
            self.halt = Linear(size.dim, 1, bias_init=nnx.initializers.ones, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        carries = {}
        for block in self.blocks:
            carries |= block.initial_carries(x.shape[0], x.shape[1], x.shape[1])
        keys = None if key is None else jax.random.split(key, (self.steps, len(self.blocks)))
        split = [nnx.split(block, nnx.Param, ...) for block in self.blocks]

        again = lambda x: context.position.embed_rows(x, documents=context.documents)

        def apply(state, step):
            x, carries, rest, halting = state
            number, keys = step
            given, total, changed = self._marked(x, number, context.position, again), Aux(), []
            y = given
            for place, (graph, params, _) in enumerate(split):
                of_layer = {"key": None if keys is None else keys[place], "plan": self.plan, "looped": self.steps > 1}
                y, carries, aux, left = run_layer(graph, params, rest[place], y, carries, context, **of_layer)
                total = total + aux
                changed.append(left)
            if halting is not None:
                y, halting = self._halted(x, y, number, halting, given)
            return (y, carries, changed, halting), total

        def apply_where_needed(state, step):
            """Behind the last position that still runs nothing changes any more."""
            running = self._running_still(state[3])
            running = running if context.valid is None else running & context.valid
            nothing = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
            idle = lambda state, step: (state, jax.tree.map(nothing, jax.eval_shape(apply, state, step)[1]))
            return lax.cond(running.any(), apply, idle, state, step)

        start = (x, carries, [rest for _, _, rest in split], self._running(x))
        # Not unrolled: the layers are one anyway, and the steps may be many.
        of_step = apply_where_needed if self.act and key is None else apply
        (y, _, rest, halting), aux = lax.scan(of_step, start, (jnp.arange(self.steps), keys))
        for block, changed in zip(self.blocks, rest, strict=True):
            nnx.update(block, changed)
        aux = jax.tree.map(lambda values: jnp.sum(values, 0), aux)
        if halting is None:
            return y, aux
        steps, valid = halting["steps"], context.valid
        spent = by_token("steps", steps, valid) | by_token("computation", steps * len(self.blocks), valid)
        spent |= Aux(losses={"ponder": self.ponder * mean_of(steps + halting["left"], valid)})
        return halting["out"].astype(x.dtype), aux | spent

    def _marked(self, x, number, position: Position, again):
        """(B, T, D) plus the sinusoidal codes of a step's number and, after the first, of positions: `again(x)`."""
        if not self.code:
            return x
        if position.adds_waves:
            x = jnp.where(number > 0, again(x), x)
        return x + STEP * waves(number + 1, x.shape[-1]).astype(x.dtype)

    def _running(self, x):
        """Sums of each position (B, T), or (B,): halting probability, steps taken, remainder, and the output so far."""
        if not self.act:
            return None
        zeros = jnp.zeros(x.shape[:-1])
        return {"sum": zeros, "steps": zeros, "left": zeros, "out": jnp.zeros(x.shape, jnp.float32)}

    def _running_still(self, halting):
        return halting["sum"] < (1 if self.halting == "before" else 1 - self.slack)

    def _halted(self, x, y, number, halting, given):
        """The state after a step that made y of what it was given, and the sums with it: y where a position still ran,
        x where it had halted; with halting=before y everywhere."""
        running = self._running_still(halting)
        if self.halting == "before":
            p = jax.nn.sigmoid(self.halt(given.astype(jnp.float32)))[..., 0]
            last, left = running & (halting["sum"] + p > 1 - self.slack), 1 - halting["sum"]
            weight = jnp.where(last, left, jnp.where(running, p, 0))
            return y, {
                "sum": jnp.where(last, 1.0, halting["sum"] + weight),
                "steps": halting["steps"] + running,
                "left": jnp.where(last, left, halting["left"]),
                "out": weight[..., None] * y + (1 - weight[..., None]) * halting["out"],
            }
        y = jnp.where(running[..., None], y, x)
        p = jax.nn.sigmoid(self.halt(y.astype(jnp.float32)))[..., 0]
        last = running & ((halting["sum"] + p >= 1 - self.slack) | (number == self.steps - 1))
        left = 1 - halting["sum"]
        weight = jnp.where(last, left, jnp.where(running, p, 0))
        return y, {
            "sum": jnp.where(last, 1.0, halting["sum"] + weight),
            "steps": halting["steps"] + running,
            "left": jnp.where(last, left, halting["left"]),
            "out": halting["out"] + weight[..., None] * y,
        }

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Every step keeps what its layer would; what the mechanisms get below the first step."""
        one, below = [block.init_cache(B, length) for block in self.blocks], {}
        for block in self.blocks:
            below |= block.initial_carries(B, 1, length)
        wide = lambda leaf: jnp.broadcast_to(leaf, (self.steps, *leaf.shape))
        return {"steps": jax.tree.map(wide, one), "below": below}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        def apply(state, step):
            x, carries, halting = state
            number, caches = step
            again = lambda x: context.position.embed(x, at[None])
            given, changed = self._marked(x[:, None], number, context.position, again)[:, 0], []
            y = given
            for block, one in zip(self.blocks, caches, strict=True):
                y, one, carries = block.step(y, one, carries, context, at)
                changed.append(one)
            if halting is not None:
                y, halting = self._halted(x, y, number, halting, given)
            return (y, carries, halting), changed

        start = (x, cache["below"], self._running(x))
        (y, _, halting), caches = lax.scan(apply, start, (jnp.arange(self.steps), cache["steps"]))
        out = y if halting is None else halting["out"].astype(x.dtype)
        return out, cache | {"steps": caches}
