import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn import counted_trips, normalisation
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.documents import places
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

# Of the normal distribution that the logarithm of the Poisson rate is drawn from.
SPREAD = 0.5


class Looped(Depth):
    """Latent recurrent depth: a few layers in the middle are applied as often as is asked for (Geiping et al., 2025,
    arXiv 2502.05171).

        e = prelude(x),    s_0 ~ N(0, noise^2),    s_i = norm(core(A [s_(i-1); e])) for i = 1..r,    out = coda(s_r)

    x, e and s are (B, T, D), A is (2 D, D) without a bias, norm an RMSNorm. In training r is drawn once a step,

        r ~ Poisson(exp(tau)) + 1,    tau ~ N(log(mean) - 1/8, 1/4),    so that r is mean + 1 on average,

    and gradients flow through the last `backward` iterations alone, and through the e that these were given, so that
    memory does not grow with r. In evaluation r is `iterations`, which `xlab eval RUN depth.iterations=32` changes
    without training anew. `layers` counts those of prelude, core and coda; "iterations" reports r, and "computation"
    counts the core r times.

    In evaluation s_0 is drawn, too, but once for all: a position has the same state in every sequence (in every
    document, where several are packed), so that answers are repeatable and decoding begins with what the whole pass
    has. What a mechanism hands to the layer above ends with each of the three parts, and with each iteration. Decoding
    keeps the core's keys and values of every iteration apart: `iterations` times its cache. FLOPs of training are those
    of an average step.

    Deviations from the paper: its own placement, of four norms, is norm=sandwich; mean and backward are 32 and 8 there;
    its code normalises the last state alone, which its placement lets it, and draws s_0 within three standard
    deviations; caches shared between iterations and stopping a token that no longer moves are left out.

    Options:
        iterations: how often the core is applied in evaluation; none: mean
        mean: how often in training, on average and beside the one that is always there
        backward: how many of the last iterations gradients flow through
        prelude: layers before the core; none: a quarter of them, at least one
        coda: layers after it; none: as for prelude
        noise: standard deviation of the state that the loop begins with
    """

    documents_apart = True

    def __init__(
        self,
        size: Size,
        *,
        iterations: int | None = None,
        mean: int = 8,
        backward: int = 4,
        prelude: int | None = None,
        coda: int | None = None,
        noise: float = 1.0,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        before, after = (max(1, size.layers // 4) if count is None else count for count in (prelude, coda))
        middle = size.layers - before - after
        if min(before, middle, after) < 1:
            raise Refused(
                f"layers={size.layers} are {before} before the core, {middle} in it and {after} after it, and each "
                "must be at least 1; use at least 3 layers"
            )
        for name, value in {"iterations": iterations, "mean": mean, "backward": backward}.items():
            if value is not None and value < 1:
                raise Refused(f"{name} must be at least 1, got {value}")
        if noise < 0:
            raise Refused(f"noise must be at least 0, got {noise:g}")

        def part(first: int, count: int):
            make = lambda index, rngs: make_block(first + index, rngs)
            return Fixed(dataclasses.replace(size, layers=count), make_block=make, period=period, rngs=rngs)

        self.prelude = part(0, before)
        self.core = Core(size, part(before, middle), rngs=rngs)
        self.coda = part(before + middle, after)
        self.iterations, self.mean, self.backward = mean if iterations is None else iterations, mean, backward
        self.noise, self.dim = noise, size.dim

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        B, T, _ = x.shape
        first, middle, last = (None, None, None) if key is None else jax.random.split(key, 3)
        e, _, aux = self.prelude.run(x, self.prelude.initial_carries(B, T, T), context, key=first)
        if middle is None:
            at = jnp.arange(T) if context.documents is None else places(context.documents)
            s = jnp.broadcast_to(self.begun(at), x.shape).astype(x.dtype)
            count = jnp.array(self.iterations)
            s, more = self._evaluate(s, e, context)
        else:
            begun, drawn, middle = jax.random.split(middle, 3)
            s = (self.noise * jax.random.normal(begun, x.shape)).astype(x.dtype)
            count = self.drawn(drawn)
            s, more = self._train(s, e, context, count, middle)
        s, _, most = self.coda.run(s, self.coda.initial_carries(B, T, T), context, key=last)
        return s, aux + more + most | Aux(scalars={"iterations": count.astype(jnp.float32)})

    def drawn(self, key: jax.Array) -> jax.Array:
        """How often a step of training applies the core, () int32."""
        rate, count = jax.random.split(key)
        tau = math.log(self.mean) - SPREAD**2 / 2 + SPREAD * jax.random.normal(rate)
        return jax.random.poisson(count, jnp.exp(tau)) + 1

    def begun(self, at: jax.Array) -> jax.Array:
        """The states that evaluation begins with at positions (...) -> (..., D) float32."""
        one = lambda at: jax.random.normal(jax.random.fold_in(jax.random.key(0), at), (self.dim,))
        return self.noise * jax.vmap(one)(at.reshape(-1)).reshape(*at.shape, self.dim)

    def _evaluate(self, s: jax.Array, e: jax.Array, context: Context) -> tuple[jax.Array, Aux]:
        graph, variables = nnx.split(self.core)
        # Of copies, for layers may write to their variables, as each iteration has them anew.
        iterate = lambda s, _: nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))(s, e, context)
        s, aux = lax.scan(iterate, s, length=self.iterations)
        return s, jax.tree.map(lambda values: jnp.sum(values, 0), aux)

    def _train(
        self, s: jax.Array, e: jax.Array, context: Context, count: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """`count` iterations, the last of which keep what their backward pass needs."""
        graph, params, rest = nnx.split(self.core, nnx.Param, ...)

        def iterate(state, number):
            s, rest, aux = state
            core = nnx.merge(graph, params, rest)
            s, more = core(s, e, context, key=jax.random.fold_in(key, number))
            return s, nnx.split(core, nnx.Param, ...)[2], jax.tree.map(jnp.add, aux, more)

        copied = lambda: jax.tree.map(lambda leaf: leaf, rest)
        of_one = lambda: nnx.merge(graph, params, copied())(s, e, context, key=key)[1]
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_one))
        before = jnp.maximum(count - self.backward, 0)

        def unkept(s, rest):
            with counted_trips.saying(max(self.mean + 1 - self.backward, 0)):
                going = lambda state: state[0] < before
                one = lambda state: (state[0] + 1, iterate(state[1], state[0]))
                return lax.while_loop(going, one, (jnp.zeros_like(before), (s, rest, nothing)))[1]

        # Whatever an iteration learns by, positions and sources too, becomes an argument that can be stopped.
        pure, held = jax.closure_convert(unkept, s, rest)
        state = pure(*jax.tree.map(lax.stop_gradient, (s, rest)), *map(lax.stop_gradient, held))

        def kept(state, number):
            one = lambda state: iterate(state, before + number)
            return lax.cond(before + number < count, one, lambda state: state, state), None

        (s, rest, aux), _ = lax.scan(kept, state, jnp.arange(self.backward))
        nnx.update(self.core, rest)
        return s, aux

    # ---- decoding: every iteration has a cache of its own ------------------------------------------------------------

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        wide = lambda leaf: jnp.broadcast_to(leaf, (self.iterations, *leaf.shape))
        core = jax.tree.map(wide, self.core.layers.init_cache(B, length))
        outer = {name: getattr(self, name).init_cache(B, length) for name in ("prelude", "coda")}
        return outer | {"core": core}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        return self._decoded("step", x, cache, context, at, at)

    def step_several(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        return self._decoded("step_several", x, cache, context, at, at + jnp.arange(x.shape[1]))

    def _decoded(self, way: str, x: jax.Array, cache: Any, context: Context, at: jax.Array, all_at: jax.Array):
        """`step` or `step_several`, whose tokens stand at positions `all_at`."""
        e, prelude = getattr(self.prelude, way)(x, cache["prelude"], context, at=at)
        s = jnp.broadcast_to(self.begun(all_at), x.shape).astype(x.dtype)

        def iterate(s, cache):
            s, cache = getattr(self.core.layers, way)(self.core.joined(s, e), cache, context, at=at)
            return self.core.norm(s), cache

        s, core = lax.scan(iterate, s, cache["core"])
        s, coda = getattr(self.coda, way)(s, cache["coda"], context, at=at)
        return s, {"prelude": prelude, "core": core, "coda": coda}


class Core(nnx.Module):
    """One iteration: what the state and the prelude's output become together."""

    def __init__(self, size: Size, layers: Fixed, *, rngs: nnx.Rngs):
        self.adapter = Linear(2 * size.dim, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.layers = layers
        self.norm = normalisation.RMSNorm(size.dim, dtype=size.dtype, rngs=rngs)

    def __call__(
        self, s: jax.Array, e: jax.Array, context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        B, T, _ = s.shape
        s, _, aux = self.layers.run(self.joined(s, e), self.layers.initial_carries(B, T, T), context, key=key)
        return self.norm(s), aux

    def joined(self, s: jax.Array, e: jax.Array) -> jax.Array:
        """What the first layer of the core is given."""
        return self.adapter(jnp.concatenate([s, e], -1))
