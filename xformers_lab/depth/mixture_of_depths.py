import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth._buckets import over_first
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, by_token, mean_of
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.position import Position

# Evaluation lets as many tokens through as its predictor says. Where no sequence has more than this multiple of the
# trained share, no more are computed.
ROOM = 1.5


class MixtureOfDepths(Fixed):
    """Mixture-of-Depths: a layer is run on the tokens that its router scores highest, the others pass it by (Raposo et
    al., 2024, arXiv 2404.02258).

    With r_t = w . x_t, and C the ceil(capacity n) tokens of a sequence of n that have the largest r:

        x_t + r_t f(x_C)_t for t in C, x_t for the others; f(x) = block(x) - x

    The tokens of C are gathered in their order, with their own positions, and the block sees nothing else, so that
    a window or a stride of its attention counts them alone. The router learns through r_t, which scales what the block
    adds.

    The choice among a whole sequence looks at tokens to come, so a decoder uses it in training alone, as the paper
    does: there a token's update does depend on whether later tokens score higher. A small network that sees x_t alone
    learns to foretell whether t is in C (binary cross-entropy; its input's gradient is stopped), and in evaluation and
    decoding its answer, above 0 or not, is the choice: causal, and of no fixed number. An encoder keeps the top choice.

    A mechanism that hands something from layer to layer is refused, for layers do not see the same tokens; so is a
    position that adds scores, which are the same for all samples. "computation" is the mean number of layers that a
    token was processed by, and of each token its own.

    Options:
        capacity: share of a sequence's tokens that a routed layer processes
        every: each so-many-th layer is routed, the others process all tokens
        weight: what scales the block's update: the router's score itself, or its sigmoid
        predictor: weight of the predictor's loss
    """

    own_layers = False  # layers run on some of the tokens

    def __init__(
        self,
        size: Size,
        *,
        capacity: float = 0.125,
        every: int = 2,
        weight: Literal["linear", "sigmoid"] = "linear",
        predictor: float = 0.01,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if not 0 < capacity <= 1:
            raise Refused(f"capacity is a share of the tokens, above 0 and at most 1, got {capacity}")
        if not 1 <= every <= size.layers:
            raise Refused(f"every={every} must be from 1 to layers={size.layers}, else no layer is routed")
        if predictor < 0:
            raise Refused(f"predictor is the weight of a loss, at least 0, got {predictor}")

        def routed(index: int, rngs: nnx.Rngs):
            block = make_block(index, rngs)
            if (index + 1) % every:
                return block
            return Routed(size, block, capacity=capacity, weight=weight, predictor=predictor, rngs=rngs)

        super().__init__(size, make_block=routed, period=math.lcm(period, every), rngs=rngs)


class Routed(nnx.Module):
    """A block that some of the tokens pass by."""

    def __init__(self, size: Size, block: Any, *, capacity: float, weight: str, predictor: float, rngs: nnx.Rngs):
        if jax.eval_shape(lambda: block.initial_carries(1, size.length, size.length)):
            raise Refused(
                f"{block.name} hands something to the layer above, but with depth=mixture_of_depths each layer sees "
                "other tokens; use another attention"
            )
        self.block, self.capacity, self.weight, self.predictor_weight = block, capacity, weight, predictor
        self.router = Linear(size.dim, 1, use_bias=False, rngs=rngs)
        self.guess = Linear(size.dim, max(1, size.dim // 2), rngs=rngs)
        self.guess_out = Linear(max(1, size.dim // 2), 1, rngs=rngs)

    def __call__(
        self, x: jax.Array, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any], Aux]:
        score = self.router(x.astype(jnp.float32))[..., 0]
        if key is None and self.block.causal:
            foretold = self.foretell(x)
            chosen = foretold > 0 if context.valid is None else (foretold > 0) & context.valid
            y, aux = self._evaluate(x, score, carries, context, chosen)
            return y, carries, aux | by_token("computation", chosen, context.valid)
        places, full = self.top(score, context.valid)
        y, aux = self.through(x, score, places, carries, context, key=key, full=full)
        inside = jnp.zeros(score.shape, bool)
        inside = jax.vmap(lambda row, at: row.at[at].set(True, mode="drop"))(inside, places)
        aux |= by_token("computation", inside, context.valid)
        if self.block.causal:
            foretold = self.foretell(lax.stop_gradient(x))
            wrong = jax.nn.softplus(jnp.where(inside, -foretold, foretold))
            aux |= Aux(losses={"predictor": self.predictor_weight * mean_of(wrong, context.valid)})
        return y, carries, aux

    def foretell(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (...): above 0 where a token is expected to be among its sequence's best."""
        return self.guess_out(jax.nn.gelu(self.guess(x.astype(jnp.float32))))[..., 0]

    def top(self, score: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, bool]:
        """Places (B, k) of the best tokens of each sequence in rising order, T for those that a padded sequence leaves
        empty; and whether no place is empty."""
        T = score.shape[1]
        if valid is None:
            return jnp.sort(lax.top_k(score, math.ceil(self.capacity * T))[1], axis=1), True
        k = math.ceil(self.capacity * T)
        best = lax.top_k(jnp.where(valid, score, MASKED), k)[1]
        many = jnp.ceil(self.capacity * valid.sum(1, keepdims=True))
        return jnp.sort(jnp.where(jnp.arange(k)[None] < many, best, T), axis=1), False

    def through(
        self,
        x: jax.Array,
        score: jax.Array,
        places: jax.Array,
        carries: dict[str, Any],
        context: Context,
        *,
        key: jax.Array | None = None,
        full: bool = False,
    ) -> tuple[jax.Array, Aux]:
        """The block on the tokens at `places` (B, k), T where there is none -> x with their updates, aux."""
        T = x.shape[1]
        at = jnp.minimum(places, T - 1)
        inside = jnp.take_along_axis(x, at[..., None], 1)
        tokens = None if context.tokens is None else jnp.take_along_axis(context.tokens, at, 1)
        where = Context(Taken(self.block.position(context), at), None if full else places < T, tokens=tokens)
        y, _, aux = self.block(inside, carries, where, key=key)
        share = jnp.take_along_axis(self.share(score), at, 1)[..., None]
        update = (share * (y - inside).astype(jnp.float32)).astype(x.dtype)
        # Places of T lie outside, and are dropped.
        return jax.vmap(lambda x, at, update: x.at[at].add(update, mode="drop"))(x, places, update), aux

    def share(self, score: jax.Array) -> jax.Array:
        """What a token's update is multiplied by, of its router's score (...)."""
        return score if self.weight == "linear" else jax.nn.sigmoid(score)

    def _evaluate(self, x, score, carries, context: Context, chosen):
        """The chosen tokens (B, T) through the block, which gets no more rows than the fullest sequence needs."""
        T = x.shape[1]
        places = jnp.sort(jnp.where(chosen, jnp.arange(T)[None], T), axis=1)
        graph, variables = nnx.split(self)

        def run(size: int):
            # Made anew in each branch: a module belongs to the trace that made it. Evaluation changes no variable.
            routed = nnx.merge(graph, variables)
            return routed.through(x, score, places[:, :size], carries, context)

        some = min(T, math.ceil(ROOM * self.capacity * T))
        return over_first(chosen.sum(1).max(), [some, T] if some < T else [T], run)

    # ---- decoding: every sequence has a cache of its own, for each has seen another number of tokens ---------------

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return {}

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """The block's cache of each sequence, the positions of the tokens in it, and how many they are."""
        wide = lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape))
        of_block = jax.tree.map(wide, self.block.init_cache(1, length))
        return {"block": of_block, "at": jnp.zeros((B, length), jnp.int32), "count": jnp.zeros(B, jnp.int32)}

    def step(
        self, x: jax.Array, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        score, chosen = self.router(x.astype(jnp.float32))[..., 0], self.foretell(x) > 0
        graph, variables = nnx.split(self.block)

        def one(x, chosen, old, places, count, token):
            places = places.at[count].set(at)
            token = None if token is None else token[None]
            where = Context(Taken(self.block.position(context), places[None]), tokens=token)
            y, new, _ = nnx.merge(graph, variables).step(x[None], old, {}, where, count)
            keep = lambda new, old: jnp.where(chosen, new, old)
            return y[0], jax.tree.map(keep, new, old), places, count + chosen

        def run(cache):
            y, *after = jax.vmap(one)(x, chosen, cache["block"], cache["at"], cache["count"], context.tokens)
            update = self.share(score)[..., None] * (y - x).astype(jnp.float32)
            after = dict(zip(("block", "at", "count"), after, strict=True))
            return x + jnp.where(chosen[..., None], update, 0).astype(x.dtype), after

        y, cache = lax.cond(chosen.any(), run, lambda cache: (x, cache), cache)
        return y, cache, carries


class Taken(Position):
    """The positions of tokens that were taken out of their sequences: the i-th of sample b stands at at[b, i]."""

    def __init__(self, position: Position, at: jax.Array):
        adds = getattr(position, "key_terms", None) is not None or position.adds_to_values
        if adds or position.bias() is not None:
            raise Refused(
                f"position={type(position).__name__.lower()} adds scores by the place in a sequence, but "
                "this depth takes tokens from other places of each; use position=rope, learned, sinusoidal or none"
            )
        self.position, self.at, self.turns, self.share = position, at, position.turns, position.share

    def rotate(self, x: jax.Array, at: jax.Array) -> jax.Array:
        one = lambda x, places: self.position.rotate(x[None], places)[0]
        return jax.vmap(one)(x, self.at[:, at])
