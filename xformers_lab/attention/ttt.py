import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, centred
from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.attention._engine.linear.gated import aligned, by_definition
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Ttt(Recurrent):
    """TTT-Linear, whose state is a linear model that learns at test time (Sun et al., 2024, arXiv 2407.04620, sections
    2.1 to 2.7).

    f(x) = x + norm(x W + b); W_t = W' - r_i sum_(s in its batch, s <= t) h_s dl(W'; k_s), l = |f(k_s) - v_s|^2 / 2;
    out_t = norm(f(q_t; W_t)). The gradients of a batch of positions are taken at the same W', that before it, so that
    they are products of matrices. W at the start, the norm inside f and r_i, 1 / i at first for the i-th place of a
    batch, are learned, and so are steps h_s = rate sigmoid(u x_s + c) / H.

    Batches are counted from the first position on, padding included, which learns nothing.
    Deviations from the paper: no convolution in front of q and k, and positions are the model's; the norm of the output
        has no learned weights.

    Options:
        batch: positions whose gradients are taken at the same weights
        rate: the largest step of the inner model, times H
    """

    refuses: ClassVar = {**Recurrent.refuses, "map": "the norm of the inner model stands between values and output"}
    on_places: ClassVar = "it learns in batches of positions, which are counted"
    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + batch))",
        memory="O(T (H + batch) + T H^2 / batch)",
        decoding="two H x H matrices, 2 H numbers and a count",
        time_note=", a loop of T / batch turns",
    )

    def __init__(self, size: Size, *, batch: int = 16, rate: float = 1.0, rngs: nnx.Rngs):
        if batch < 1:
            raise Refused(f"batch must be at least 1, got {batch}")
        if rate <= 0:
            raise Refused(f"rate must be above 0, got {rate:g}")
        super().__init__(size, rngs=rngs)
        N, H, self.batch, self.rate = size.heads, size.head, batch, rate
        self.weights = nnx.Param(0.02 * jax.random.normal(rngs.params(), (N, H, H)), decays=True)
        self.bias, self.shift = (nnx.Param(jnp.zeros((N, H)), decays=False) for _ in range(2))
        self.gain = nnx.Param(jnp.ones((N, H)), decays=False)
        self.share = nnx.Param(jnp.broadcast_to(1 / jnp.arange(1.0, batch + 1), (N, batch)), decays=False)
        self.strength = Linear(size.dim, N, dtype=size.dtype, rngs=rngs)

    def per_head(self):
        return {"own": {name: getattr(self, name)[...] for name in ("weights", "bias", "gain", "shift", "share")}}

    def from_keys(self, x):
        return {"step_size": self.rate / self.size.head * jax.nn.sigmoid(self.strength(x).astype(jnp.float32))}

    def finished(self, mean):
        """At mean 0 and variance 1 over the channels of all heads."""
        return centred(mean.reshape(*mean.shape[:2], -1)).reshape(mean.shape)

    def attend(self, q, k, v, *, valid=None, causal, step_size, own):
        self.one_way(causal)

        @jax.checkpoint
        def run(q, keys, own):
            return aligned(functools.partial(self._batches, own=own), q, keys, valid)

        return run(*_wide(q, k, v, step_size), own)

    def _batches(self, q, k, v, step_size, there, own):
        T, C = len(q), min(self.batch, len(q))
        share, triangle = own["share"][:C, None], jnp.tril(jnp.ones((C, C)))

        def one(state, rows):
            q, k, v, step_size = rows
            W, b = state
            wrong = _wrong(k @ W + b, v - k, own) * step_size[:, None]
            inner = q @ W + b - share * ((q @ k.T + 1) * triangle @ wrong)
            return (W - share[-1] * k.T @ wrong, b - share[-1] * wrong.sum(0)), q + _normed(inner, own)

        rows = tuple(in_blocks(x, C) for x in (q, k, v, step_size))
        out = joined(lax.scan(one, (own["weights"], own["bias"]), rows)[1], T)
        return out * (jnp.cumsum(there) > 0)[:, None]

    def reference(self, q, k, v, *, valid=None, causal, step_size, own):
        self.one_way(causal)
        q, keys = _wide(q, k, v, step_size)
        return by_definition(functools.partial(self.update, own=own), self.start(), q, keys, valid)

    def start(self):
        """How far weights and bias have moved, the sums of this batch's gradients, how many places of the batch were
        passed, and whether a key was seen."""
        none = jnp.zeros((self.size.head, self.size.head), jnp.float32), jnp.zeros(self.size.head, jnp.float32)
        return {"moved": none, "gradients": none, "passed": jnp.zeros((), jnp.int32), "seen": jnp.zeros((), bool)}

    def update(self, state, q, k, v, step_size, there, own):
        moved, gradients, passed = state["moved"], state["gradients"], state["passed"]
        wrong = _wrong(k @ (own["weights"] + moved[0]) + own["bias"] + moved[1], v - k, own) * step_size
        gradients = gradients[0] + jnp.outer(k, wrong), gradients[1] + wrong
        here = tuple(before - own["share"][passed] * sum for before, sum in zip(moved, gradients, strict=True))
        out = q + _normed(q @ (own["weights"] + here[0]) + own["bias"] + here[1], own)
        ends, seen = passed == self.batch - 1, state["seen"] | (there > 0)
        next_batch = {"moved": here, "gradients": jax.tree.map(jnp.zeros_like, here), "passed": jnp.zeros_like(passed)}
        same_batch = {"moved": moved, "gradients": gradients, "passed": passed + 1}
        state = jax.tree.map(functools.partial(jnp.where, ends), next_batch, same_batch)
        return jnp.where(seen, out, 0), state | {"seen": seen}

    def step(self, state, q, k, v, *, step_size, own):
        q, keys = _wide(q, k, v, step_size)
        return self.update(state, q, **keys, own=own)

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, min(self.batch, S)
        return Cost(flops=S * H * (6 * H + 4 * C), memory=S * max(H, C, H * H / C), state=2 * (H * H + H) + 2)


def _wide(q, k, v, step_size):
    """Queries, and all that is read of keys, of all positions or of one, in float32."""
    keys = {"k": k, "v": v, "step_size": step_size, "there": jnp.ones_like(step_size)}
    return q.astype(jnp.float32), {name: x.astype(jnp.float32) for name, x in keys.items()}


def _normed(inner, own):
    """What the inner model adds to what it is asked."""
    return centred(inner) * own["gain"] + own["shift"]


def _wrong(inner, target, own):
    """The gradient to `inner` of half the squared error of what the model adds, (..., H)."""
    error = lambda inner: jnp.square(_normed(inner, own) - target).sum() / 2
    return jax.grad(error)(inner)
