import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._buckets import over_first
from xformers_lab.depth.fixed import Fixed
from xformers_lab.depth.mixture_of_depths import ROOM, Taken
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, by_token, mean_of
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.position import Position


class MixtureOfRecursions(Depth):
    """Mixture-of-Recursions: shared layers in the middle, applied again and again, and a router that says how often to
    each token (Bae et al., 2025, arXiv 2507.10524).

        x_1 = first layer(x),    x_(r+1) = x_r but for the tokens of recursion r = 1..R,    out = last layer(x_(R+1))

    With F the shared layers, which see the tokens of their recursion alone, gathered in their order with their own
    positions, and w_r (D) of a router:

        routing=expert   s = w_r . x_r;    the ceil(n (R - r + 1) / R) of the tokens of recursion r - 1 with the largest
                         s, n being the sequence's; to them x_(r+1) = x_r + alpha sigmoid(s) F(x_r)
        routing=token    g = softmax(w_1 . x_1 ... w_R . x_1);    a token has the recursions up to i = argmax g; there
                         x_(r+1) = F(x_r) for r < i, and g_i F(x_i) + x_1 for r = i

    What is causal: with routing=token all of it, for a token decides on its own, and a loss of `weight` R sum_i f_i p_i
    (f_i the share of tokens with i recursions, p_i the mean of g_i) keeps the numbers balanced. With routing=expert the
    choice among a whole sequence looks at tokens to come, so a decoder has it in training alone: there a token's state
    does depend on whether later tokens score higher. A loss of `weight` times the cross-entropy of sigmoid(s) and that
    choice teaches s to be above 0 where a token is chosen (the paper's auxiliary loss), and in evaluation and decoding
    that is the choice, of no fixed number. An encoder keeps the first. Decoding keeps keys and values of every
    recursion for the tokens that had it (the paper's recursion-wise caching), of each sequence apart.

    `layers` counts those that have parameters: first, shared and last. "computation" is how many a token passed, shared
    ones as often as it did. Training with routing=token computes every recursion for all tokens. Positions that add
    scores are refused, as are packed data.

    Deviations from the paper: routers have no bias and no z-loss; capacities do not shrink over a warm-up; keys and
    values are not shared between recursions.

    Options:
        recursions: R, how often a token passes the shared layers at most
        routing: expert: a recursion chooses its tokens; token: a token chooses its recursions
        alpha: with expert, what a recursion's update is multiplied by besides
        weight: of the router's loss
    """

    def __init__(
        self,
        size: Size,
        *,
        recursions: int = 3,
        routing: Literal["expert", "token"] = "expert",
        alpha: float = 0.1,
        weight: float = 0.001,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if size.layers < 3:
            raise Refused(f"layers={size.layers} are no first, shared and last ones: use at least 3 layers")
        if recursions < 2:
            raise Refused(f"recursions must be at least 2, got {recursions}; use depth=fixed")
        if alpha <= 0 or weight < 0:
            raise Refused(f"alpha must be above 0 and weight at least 0, got {alpha:g} and {weight:g}")

        def part(first: int, count: int):
            make = lambda index, rngs: make_block(first + index, rngs)
            return Fixed(dataclasses.replace(size, layers=count), make_block=make, period=period, rngs=rngs)

        self.shared = size.layers - 2
        self.first, self.core, self.last = part(0, 1), part(1, self.shared), part(1 + self.shared, 1)
        self.causal = [*self.first.periods, *self.first.rest][0].causal
        self.router = Linear(size.dim, recursions, use_bias=False, rngs=rngs)
        self.recursions, self.routing, self.alpha, self.weight = recursions, routing, alpha, weight

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        B, T, _ = x.shape
        keys = [None] * (self.recursions + 2) if key is None else list(jax.random.split(key, self.recursions + 2))
        x, _, aux = self.first.run(x, self.first.initial_carries(B, T, T), context, key=keys[-2])
        begun, losses = x, jnp.zeros(())
        inside = jnp.ones((B, T), bool) if context.valid is None else context.valid
        passed, count, (share, number) = jnp.zeros((B, T)), inside.sum(1), self.chosen(x)
        for r in range(self.recursions):
            if self.routing == "token":
                inside, sizes = inside & (r < number), [-(-T // 2), T] if key is None and T > 1 else [T]
            else:
                share, before = self.score(x, r), inside
                best = count if key is not None or not self.causal else None
                inside, sizes = self.of_recursion(r, share, before, best)
                if key is not None and self.causal:
                    wrong = jax.nn.softplus(jnp.where(inside, -share, share))
                    losses = losses + self.weight * mean_of(wrong, before)
            y, more = self.through(x, inside, sizes, context, key=keys[r])
            x = jnp.where(inside[..., None], self.updated(r, x, y, share, number, begun), x)
            passed, aux = passed + inside, aux + more
        if self.routing == "token":
            losses = self.weight * self.balance(begun, number, context.valid)
        x, _, more = self.last.run(x, self.last.initial_carries(B, T, T), context, key=keys[-1])
        aux = (aux + more) | by_token("computation", 2 + self.shared * passed, context.valid)
        return x, aux if key is None else aux | Aux(losses={"router": losses})

    # ---- routing -----------------------------------------------------------------------------------------------------

    def score(self, x: jax.Array, r: int) -> jax.Array:
        """What the router of recursion r makes of states (..., D), (...)."""
        return self.router(x.astype(jnp.float32))[..., r]

    def chosen(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """With routing=token, the probability of the number of recursions that states (..., D) choose, and it."""
        p = jax.nn.softmax(self.router(x.astype(jnp.float32)))
        return p.max(-1), p.argmax(-1) + 1

    def balance(self, x: jax.Array, number: jax.Array, valid: jax.Array | None) -> jax.Array:
        """R sum_i f_i p_i of valid states, 1 where both are even."""
        p = jax.nn.softmax(self.router(x.astype(jnp.float32)))
        products = [mean_of(number == i + 1.0, valid) * mean_of(p[..., i], valid) for i in range(self.recursions)]
        return self.recursions * sum(products, jnp.zeros(()))

    def of_recursion(
        self, r: int, score: jax.Array, before: jax.Array, count: jax.Array | None
    ) -> tuple[jax.Array, list[int]]:
        """With routing=expert, which of the tokens `before` (B, T) have recursion r, counted from 0, and the numbers of
        rows that are enough for them. count (B,): of how many tokens of each sequence its best ones are a share; None:
        tokens with a score above 0."""
        T, R = score.shape[1], self.recursions
        many = lambda count: -(-count * (R - r) // R)
        if count is None:
            some = min(T, math.ceil(ROOM * many(T)))
            return before & (score > 0), [some, T] if some < T else [T]
        best_first = jnp.argsort(-jnp.where(before, score, MASKED), axis=1, stable=True)
        order = jnp.argsort(best_first, axis=1)
        return before & (order < many(count)[:, None]), [many(T)]

    def updated(self, r: int, x, y, share, number, begun):
        """The new states of the tokens of recursion r, whose shared layers made y of x."""
        if self.routing == "expert":
            return x + (self.alpha * jax.nn.sigmoid(share)[..., None] * y).astype(x.dtype)
        last = (number == r + 1)[..., None]
        return jnp.where(last, (share[..., None] * y).astype(x.dtype) + begun, y)

    def through(
        self, x: jax.Array, inside: jax.Array, sizes: list[int], context: Context, *, key: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """The shared layers on the tokens that are inside (B, T) -> what they make of them, (B, T, D), zeros elsewhere,
        and aux; sizes: numbers of rows, the last of which is enough for every sequence."""
        B, T, D = x.shape
        places = jnp.sort(jnp.where(inside, jnp.arange(T)[None], T), axis=1)

        def on(core: Fixed, size: int):
            rows = places[:, :size]
            at = jnp.minimum(rows, T - 1)
            tokens = None if context.tokens is None else jnp.take_along_axis(context.tokens, at, 1)
            where = Context(Gathered(context.position, at), rows < T, tokens=tokens)
            taken = jnp.take_along_axis(x, at[..., None], 1)
            y, _, aux = core.run(taken, core.initial_carries(B, size, size), where, key=key)
            # Places of T lie outside, and are dropped.
            put = lambda y, rows: jnp.zeros((T, D), y.dtype).at[rows].set(y, mode="drop")
            return jax.vmap(put)(y, rows), aux

        if len(sizes) == 1:  # training, which may change variables of the layers
            return on(self.core, sizes[0])
        graph, variables = nnx.split(self.core)
        # Of copies, for layers may write to their variables, as each branch has them anew.
        core = lambda: nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))
        return over_first(inside.sum(1).max(), sizes, lambda size: on(core(), size))

    # ---- decoding: every sequence has a cache of its own, for each has seen another number of tokens -----------------

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Of every recursion the shared layers' cache of each sequence, the positions of the tokens in it, and how many
        they are."""
        wide = lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape))
        one = {
            "core": jax.tree.map(wide, self.core.init_cache(1, length)),
            "at": jnp.zeros((B, length), jnp.int32),
            "count": jnp.zeros(B, jnp.int32),
        }
        outer = {name: getattr(self, name).init_cache(B, length) for name in ("first", "last")}
        return outer | {"recursions": [one] * self.recursions}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        x, first = self.first.step(x, cache["first"], context, at=at)
        begun, inside, (share, number) = x, jnp.ones(len(x), bool), self.chosen(x)
        graph, variables = nnx.split(self.core)

        def one(x, inside, old, places, count, token):
            places = places.at[count].set(at)
            token = None if token is None else token[None]
            where = Context(Gathered(context.position, places[None]), tokens=token)
            y, new = nnx.merge(graph, variables).step(x[None], old, where, at=count)
            kept = jax.tree.map(lambda new, old: jnp.where(inside, new, old), new, old)
            return y[0], kept, places, count + inside

        def run(x, inside, cache):
            y, *after = jax.vmap(one)(x, inside, cache["core"], cache["at"], cache["count"], context.tokens)
            return y, dict(zip(("core", "at", "count"), after, strict=True))

        recursions = []
        for r, of_recursion in enumerate(cache["recursions"]):
            if self.routing == "expert":
                share = self.score(x, r)
                inside = inside & (share > 0)
            else:
                inside = r < number
            skip = lambda x, inside, cache: (x, cache)
            y, of_recursion = lax.cond(inside.any(), run, skip, x, inside, of_recursion)
            x = jnp.where(inside[..., None], self.updated(r, x, y, share, number, begun), x)
            recursions.append(of_recursion)
        x, last = self.last.step(x, cache["last"], context, at=at)
        return x, {"first": first, "last": last, "recursions": recursions}


class Gathered(Position):
    """The positions of every layer for tokens that were taken out of their sequences, see `Taken`."""

    def __init__(self, position: Position, at: jax.Array):
        self.position, self.at = position, at

    def of_layer(self, layer: int) -> Position:
        return Taken(self.position.of_layer(layer), self.at)
