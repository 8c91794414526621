from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth._buckets import over_first
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.ffn import Ffn
from xformers_lab.nn.aux_results import Aux, by_token
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

# A gate starts at the logit +2: nearly open, so that every sub-layer first learns what it is for.
START = 2.0


class Conditional(Fixed):
    """Conditional computation: a small network decides for each token which sub-layers it gets (Control Transformer:
    Bapna, Arivazhagan and Firat, 2020, arXiv 2002.07106).

    Each sub-layer f, attention or feed-forward, has a gate on its input x, G(x) = w . relu(W x + b) + c, and gives g
    f(x) in place of f(x). In training g = sigmoid(G + noise z), z standard normal, so that only a large |G| is safe
    from the noise and gates become hard; with estimator=straight_through g is 1 where that is above 1/2, else 0, with
    the sigmoid's gradient. In evaluation g is 1 where G > 0, else 0. The loss gets weight |mean g - budget|, the mean
    over sub-layers and valid tokens of a batch. The noise has one size; the paper lets it grow over the run.

    A token whose attention is skipped still has a key and a value that others see, and is still what a feed-forward
    layer that looks back sees. Evaluation skips an attention, or such a layer, that no token of the batch chooses, and
    runs any other feed-forward layer on the tokens that choose it, gathered to the smallest of T/4, T/2 and T places.
    In decoding a sub-layer is skipped when no sequence chooses it, but for keys, values and what is looked back at.
    Attention that hands something to the layer above is always run. "computation" is the mean number of layers that a
    token got, a sub-layer counting as half of one, and of each token its own.

    Options:
        budget: share of sub-layers that a token should get
        weight: of the budget's loss
        unit: token: each token decides; sample: a sequence's mean decides for all of it (encoder)
        estimator: how training sees a gate
        noise: standard deviation of the noise on a gate's logit
    """

    own_layers = False  # a sub-layer may run on some of the tokens, or not at all

    def __init__(
        self,
        size: Size,
        *,
        budget: float = 0.5,
        weight: float = 1.0,
        unit: Literal["token", "sample"] = "token",
        estimator: Literal["noise", "straight_through"] = "noise",
        noise: float = 1.0,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if not 0 <= budget <= 1:
            raise Refused(f"budget is a share of the sub-layers, from 0 to 1, got {budget}")
        if weight < 0 or noise < 0:
            raise Refused(f"weight and noise must be at least 0, got {weight} and {noise}")

        def gated(index: int, rngs: nnx.Rngs):
            block = make_block(index, rngs)
            if unit == "sample" and block.causal:
                raise Refused("unit=sample decides by the mean of a sequence, which a decoder may not see; use token")
            share = 1.0 if block.ffn is None else 0.5
            gate = lambda: Gate(size, unit=unit, estimator=estimator, noise=noise, share=share, rngs=rngs)
            block.attention = GatedAttention(block.attention, gate())
            if block.ffn is not None:
                block.ffn = GatedFfn(block.ffn, gate())
            return block

        super().__init__(size, make_block=gated, period=period, rngs=rngs)
        self.layers, self.budget, self.weight = size.layers, budget, weight

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        x, aux = super().__call__(x, context, key=key)
        if key is None:
            return x, aux
        share = aux.scalars["computation"] / self.layers
        return x, aux | Aux(losses={"budget": self.weight * jnp.abs(share - self.budget)})


class Gate(nnx.Module):
    """Whether a token gets a sub-layer that counts as `share` of a layer."""

    def __init__(self, size: Size, *, unit: str, estimator: str, noise: float, share: float, rngs: nnx.Rngs):
        hidden = max(1, size.dim // 4)
        self.hidden = Linear(size.dim, hidden, rngs=rngs)
        self.out = Linear(hidden, 1, bias_init=nnx.initializers.constant(START), rngs=rngs)
        self.unit, self.estimator, self.noise, self.share = unit, estimator, noise, share

    def logit(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """(..., T, D), valid (..., T) -> (..., T): above 0 where open."""
        x = x.astype(jnp.float32)
        if self.unit == "sample":
            weights = jnp.ones(x.shape[:2]) if valid is None else valid.astype(jnp.float32)
            mean = (x * weights[..., None]).sum(1) / jnp.maximum(weights.sum(1), 1)[:, None]
            return jnp.broadcast_to(self.logit_of(mean)[:, None], x.shape[:2])
        return self.logit_of(x)

    def logit_of(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (...)."""
        return self.out(jax.nn.relu(self.hidden(x)))[..., 0]

    def training(self, x: jax.Array, valid: jax.Array | None, key: jax.Array) -> jax.Array:
        """The soft gate, or the hard one with the soft one's gradient, (B, T)."""
        logit = self.logit(x, valid)
        shape = (len(x), 1) if self.unit == "sample" else logit.shape
        soft = jax.nn.sigmoid(logit + self.noise * jax.random.normal(key, shape))
        if self.estimator == "noise":
            return soft
        return soft + lax.stop_gradient((soft > 0.5) - soft)

    def spent(self, gate: jax.Array, valid: jax.Array | None) -> Aux:
        """The share of a layer that each token gets, of its gate (B, T)."""
        return by_token("computation", self.share * gate, valid)


class GatedAttention(nnx.Module):
    """In the place of a block's attention."""

    def __init__(self, layer: Any, gate: Gate):
        self.layer, self.gate = layer, gate

    @property
    def marks(self) -> int:
        return self.layer.marks

    def carries(self) -> bool:
        return self.layer.carries()

    def initial_carry(self, B: int, T: int, S: int) -> Any:
        return self.layer.initial_carry(B, T, S)

    @property
    def first_values(self) -> Any:
        return self.layer.first_values

    def no_values(self, B: int, T: int) -> Any:
        return self.layer.no_values(B, T)

    def init_cache(self, *sizes: Any) -> Any:
        return self.layer.init_cache(*sizes)

    def tails(self, *sizes: Any) -> Any:
        return self.layer.tails(*sizes)

    def rewound(self, before: Any, after: Any, taken: jax.Array, *, read: int) -> Any:
        return self.layer.rewound(before, after, taken, read=read)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
        *,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        carry: Any = None,
        **options: Any,
    ) -> tuple[jax.Array, Any, Aux]:
        """`options`, whatever else a layer is called with, pass by."""
        if key is not None:
            first, second = jax.random.split(key)
            gate = self.gate.training(x, valid, first)
            y, carry, aux = self.layer(x, memory, valid=valid, key=second, carry=carry, **options)
            return _scaled(y, gate), carry, aux | self.gate.spent(gate, valid)
        gate = self.gate.logit(x, valid) > 0
        chosen = gate if valid is None else gate & valid
        graph, variables = nnx.split(self.layer)
        call = lambda: nnx.merge(graph, variables)(x, memory, valid=valid, carry=carry, **options)
        always = jnp.array(self.carries() or self.first_values is not None)
        y, carry, aux = lax.cond(always | chosen.any(), call, lambda: _nothing(call))
        return _scaled(y, chosen), carry, aux | self.gate.spent(chosen, valid)

    def decode(self, x: jax.Array, cache: Any, *, carry: Any = None, **options: Any) -> tuple[jax.Array, Any, Any]:
        gate = self.gate.logit(x) > 0
        graph, variables = nnx.split(self.layer)
        call = lambda: nnx.merge(graph, variables).decode(x, cache, carry=carry, **options)

        def remember():
            """The compiler drops what only the unused output needs."""
            _, cache, carry = call()
            return jnp.zeros_like(x), cache, carry

        y, cache, carry = lax.cond(gate.any(), call, remember)
        return _scaled(y, gate), cache, carry


class GatedFfn(Ffn):
    """In the place of a block's feed-forward layer."""

    def __init__(self, layer: Any, gate: Gate):
        self.layer, self.gate, self.looks_back = layer, gate, layer.looks_back

    def takes(self, name: str) -> bool:
        return self.layer.takes(name)

    def init_cache(self, B: int, dtype: Any = jnp.float32) -> Any:
        return self.layer.init_cache(B, dtype)

    def step(self, x: jax.Array, cache: Any, **tokens: jax.Array) -> tuple[jax.Array, Any]:
        if not self.looks_back:
            return super().step(x, cache, **tokens)
        gate = self.gate.logit(x) > 0
        graph, variables = nnx.split(self.layer)
        call = lambda: nnx.merge(graph, variables).step(x, cache, **tokens)
        y, cache = lax.cond(gate.any(), call, lambda: (jnp.zeros_like(x), call()[1]))
        return _scaled(y, gate), cache

    def rewound(self, before: Any, after: Any, taken: jax.Array, *, read: int) -> Any:
        return self.layer.rewound(before, after, taken, read=read)

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None, **tokens: jax.Array
    ) -> tuple[jax.Array, Aux]:
        if key is not None:
            first, second = jax.random.split(key)
            gate = self.gate.training(x, valid, first)
            y, aux = self.layer(x, valid=valid, key=second, **tokens)
            return _scaled(y, gate), aux | self.gate.spent(gate, valid)
        gate = self.gate.logit(x, valid) > 0
        chosen = gate if valid is None else gate & valid
        T = x.shape[1]
        graph, variables = nnx.split(self.layer)
        if self.looks_back:
            whole = lambda: nnx.merge(graph, variables)(x, valid=valid, **tokens)
            y, aux = lax.cond(chosen.any(), whole, lambda: _nothing(whole))
            return _scaled(y, chosen), aux | self.gate.spent(chosen, valid)
        places = jnp.sort(jnp.where(chosen, jnp.arange(T)[None], T), axis=1)

        def run(size: int):
            call = lambda inside, valid, tokens: nnx.merge(graph, variables)(inside, valid=valid, **tokens)
            if not size:
                return _nothing(lambda: call(x, chosen, tokens))
            mine = places[:, :size]
            at = jnp.minimum(mine, T - 1)
            inside = jnp.take_along_axis(x, at[..., None], 1)
            y, aux = call(inside, mine < T, {name: jnp.take_along_axis(row, at, 1) for name, row in tokens.items()})
            # Places of T lie outside, and are dropped.
            return jax.vmap(lambda y, at: jnp.zeros((T, x.shape[2]), y.dtype).at[at].set(y, mode="drop"))(y, mine), aux

        sizes = sorted({0, -(-T // 4), -(-T // 2), T})
        y, aux = over_first(chosen.sum(1).max(), sizes, run)
        return y, aux | self.gate.spent(chosen, valid)


def _scaled(y, gate):
    return (y * gate[..., None]).astype(y.dtype)


def _nothing(call):
    """Zeros in the shape of what a call would give."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(call))
