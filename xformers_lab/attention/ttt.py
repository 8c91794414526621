import functools
import math
from itertools import pairwise
from typing import ClassVar, Literal

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
    """TTT-Linear and TTT-MLP, whose state is a model that learns at test time (Sun et al., 2024, arXiv 2407.04620,
    sections 2.1 to 2.7).

    f(x) = x + norm(x W + b), or with inner=mlp f(x) = x + norm(gelu(x W1 + b1) W2 + b2), 4 H hidden units wide;
    W_t = W' - r_i sum_(s in its batch, s <= t) h_s dl(W'; k_s), l = |f(k_s) - v_s|^2 / 2; out_t = norm(f(q_t; W_t)).
    The gradients of a batch of positions are taken at the same W', that before it, so that they are products of
    matrices. W at the start, the norm inside f and r_i, 1 / i at first for the i-th place of a batch, are learned, and
    so are steps h_s = rate sigmoid(u x_s + c) / H.

    Batches are counted from the first position on, padding included, which learns nothing.
    Deviations from the paper: the convolution in front of q and k is the model's conv=4, which has one of v, too, and
        positions are the model's; the norm of the output has no learned weights.

    Options:
        inner: linear: the inner model is a linear layer; mlp: two, with a gelu between them
        batch: positions whose gradients are taken at the same weights
        rate: the largest step of the inner model, times H; with inner=mlp 0.1 in the paper
    """

    refuses: ClassVar = {**Recurrent.refuses, "map": "the norm of the inner model stands between values and output"}
    on_places: ClassVar = "it learns in batches of positions, which are counted"
    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + batch))",
        memory="O(T (H + batch) + T H^2 / batch)",
        decoding="two H x H matrices, 2 H numbers and a count",
        time_note=", a loop of T / batch turns; with inner=mlp nine times as many products",
        memory_note="; decoding keeps eight times as much with inner=mlp",
    )
    later_options: ClassVar = ("inner",)

    def __init__(
        self,
        size: Size,
        *,
        inner: Literal["linear", "mlp"] = "linear",
        batch: int = 16,
        rate: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if batch < 1:
            raise Refused(f"batch must be at least 1, got {batch}")
        if rate <= 0:
            raise Refused(f"rate must be above 0, got {rate:g}")
        super().__init__(size, rngs=rngs)
        N, H, self.batch, self.rate = size.heads, size.head, batch, rate
        self.widths = (H, 4 * H, H) if inner == "mlp" else (H, H)
        first = lambda *shape: nnx.Param(0.02 * jax.random.normal(rngs.params(), (N, *shape)), decays=True)
        zeros = lambda width: nnx.Param(jnp.zeros((N, width)), decays=False)
        self.weights = first(*self.widths[:2])
        self.bias, self.shift = zeros(self.widths[1]), zeros(H)
        self.gain = nnx.Param(jnp.ones((N, H)), decays=False)
        self.share = nnx.Param(jnp.broadcast_to(1 / jnp.arange(1.0, batch + 1), (N, batch)), decays=False)
        self.strength = Linear(size.dim, N, dtype=size.dtype, rngs=rngs)
        if inner == "mlp":
            self.second, self.second_bias = first(4 * H, H), zeros(H)

    def per_head(self):
        layers = [(self.weights[...], self.bias[...])]
        if len(self.widths) == 3:
            layers.append((self.second[...], self.second_bias[...]))
        own = {name: getattr(self, name)[...] for name in ("gain", "shift", "share")}
        return {"own": own | {"layers": tuple(layers)}}

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

        def one(layers, rows):
            q, k, v, step_size = rows
            grown, out = self._batch(layers, None, q, k, v, step_size, own)
            return jax.tree.map(lambda p, grad: p - own["share"][C - 1] * grad, layers, grown), out

        rows = tuple(in_blocks(x, C) for x in (q, k, v, step_size))
        out = joined(lax.scan(one, own["layers"], rows)[1], T)
        return out * (jnp.cumsum(there) > 0)[:, None]

    def _batch(self, layers, before, q, k, v, step_size, own):
        """Sums of the gradients of a batch (C, ...) at the layers in front of it, with those `before`, of places of it
        that were passed already, and its outputs."""
        C, triangle = len(q), jnp.tril(jnp.ones((len(q), len(q))))
        inputs, wrong = _gradients(layers, k, v - k, step_size, own)
        inner, grown = q, []
        for number, ((W, b), x, error) in enumerate(zip(layers, inputs, wrong, strict=True)):
            inner = jax.nn.gelu(inner) if number else inner
            learned = (inner @ x.T + 1) * triangle @ error
            grown.append((x.T @ error, error.sum(0)))
            if before is not None:
                learned = learned + inner @ before[number][0] + before[number][1]
                grown[-1] = jax.tree.map(jnp.add, before[number], grown[-1])
            inner = inner @ W + b - own["share"][:C, None] * learned
        return tuple(grown), q + _normed(inner, own)

    def reference(self, q, k, v, *, valid=None, causal, step_size, own):
        self.one_way(causal)
        q, keys = _wide(q, k, v, step_size)
        return by_definition(functools.partial(self.update, own=own), self.start(), q, keys, valid)

    def start(self):
        """How far weights and biases have moved, the sums of this batch's gradients, how many places of the batch were
        passed, and whether a key was seen."""
        none = tuple((jnp.zeros(shape, jnp.float32), jnp.zeros(shape[1])) for shape in pairwise(self.widths))
        return {"moved": none, "gradients": none, "passed": jnp.zeros((), jnp.int32), "seen": jnp.zeros((), bool)}

    def update(self, state, q, k, v, step_size, there, own):
        moved, passed, added = state["moved"], state["passed"], functools.partial(jax.tree.map, jnp.add)
        inputs, wrong = _gradients(added(own["layers"], moved), k, v - k, step_size, own)
        new = tuple((jnp.outer(x, error), error) for x, error in zip(inputs, wrong, strict=True))
        gradients = added(state["gradients"], new)
        here = jax.tree.map(lambda before, sum: before - own["share"][passed] * sum, moved, gradients)
        inner = q
        for number, (W, b) in enumerate(added(own["layers"], here)):
            inner = (jax.nn.gelu(inner) if number else inner) @ W + b
        out = q + _normed(inner, own)
        ends, seen = passed == self.batch - 1, state["seen"] | (there > 0)
        next_batch = {"moved": here, "gradients": jax.tree.map(jnp.zeros_like, here), "passed": jnp.zeros_like(passed)}
        same_batch = {"moved": moved, "gradients": gradients, "passed": passed + 1}
        state = jax.tree.map(functools.partial(jnp.where, ends), next_batch, same_batch)
        return jnp.where(seen, out, 0), state | {"seen": seen}

    def step(self, state, q, k, v, *, step_size, own):
        q, keys = _wide(q, k, v, step_size)
        return self.update(state, q, **keys, own=own)

    def steps(self, state, q, k, v, *, step_size, own):
        """Batches as they are counted from the first position on: the first may be begun, the last unfinished."""
        T, C, passed = len(q), self.batch, state["passed"]
        q, keys = _wide(q, k, v, step_size)
        count = -(-(T + C - 1) // C)
        placed = lambda x: lax.dynamic_update_slice_in_dim(jnp.zeros((count * C, *x.shape[1:])), x, passed, 0)
        added = functools.partial(jax.tree.map, jnp.add)

        def one(state, rows):
            (moved, before), (number, q, k, v, step_size) = state, rows
            grown, out = self._batch(added(own["layers"], moved), before, q, k, v, step_size, own)
            ended = (number + 1) * C <= passed + T
            move = lambda p, grad: p - jnp.where(ended, own["share"][C - 1], 0) * grad
            return (jax.tree.map(move, moved, grown), jax.tree.map(lambda x: jnp.where(ended, 0, x), grown)), out

        rows = [in_blocks(placed(x), C) for x in (q, keys["k"], keys["v"], keys["step_size"])]
        start = (state["moved"], state["gradients"])
        (moved, gradients), out = lax.scan(one, start, (jnp.arange(count), *rows))
        out = lax.dynamic_slice_in_dim(joined(out, count * C), passed, T)
        ended = {"passed": (passed + T) % C, "seen": jnp.ones_like(state["seen"])}
        return out, {"moved": moved, "gradients": gradients} | ended

    def cost(self, T: int, S: int) -> Cost:
        C, layers = min(self.batch, S), list(pairwise(self.widths))
        flops = sum(6 * wide * high + 2 * C * (wide + high) for wide, high in layers)
        flops += 2 * math.prod(layers[1]) if len(layers) > 1 else 0  # gradients, back through the second layer
        most = max(*self.widths, C, math.prod(layers[0]) / C)
        return Cost(flops=S * flops, memory=S * most, state=2 * sum((wide + 1) * high for wide, high in layers) + 2)


def _wide(q, k, v, step_size):
    """Queries, and all that is read of keys, of all positions or of one, in float32."""
    keys = {"k": k, "v": v, "step_size": step_size, "there": jnp.ones_like(step_size)}
    return q.astype(jnp.float32), {name: x.astype(jnp.float32) for name, x in keys.items()}


def _normed(inner, own):
    """What the inner model adds to what it is asked."""
    return centred(inner) * own["gain"] + own["shift"]


def _gradients(layers, k, target, step_size, own):
    """What every layer is given of keys (..., H), and the gradients to what it makes of that, times the steps (...)."""
    inputs, made = [k], []
    for W, b in layers:
        made.append(inputs[-1] @ W + b)
        inputs.append(jax.nn.gelu(made[-1]))
    wrong = [_wrong(made[-1], target, own) * step_size[..., None]]
    for (W, _), below in zip(layers[:0:-1], made[-2::-1], strict=True):
        wrong.insert(0, jax.vjp(jax.nn.gelu, below)[1](wrong[0] @ W.T)[0])
    return inputs[:-1], wrong


def _wrong(inner, target, own):
    """The gradient to `inner` of half the squared error of what the model adds, (..., H)."""
    error = lambda inner: jnp.square(_normed(inner, own) - target).sum() / 2
    return jax.grad(error)(inner)
