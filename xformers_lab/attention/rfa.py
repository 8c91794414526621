from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost, Stepwise, why_not_one_way
from xformers_lab.attention._base.recurrent import unit
from xformers_lab.attention._engine.linear.features import EXACT, divided, sums
from xformers_lab.attention._engine.linear.gated import aligned, scalar_decay
from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

# The Gaussian kernel of unit vectors is at least exp(-2); a mean weight below this is an error of few features.
FLOOR = 0.1


class Rfa(Stepwise):
    """Random feature attention (Peng et al., 2021, arXiv 2103.02143, sections 3.1 and 3.2).

    out_t = phi(q_t) S_t / (phi(q_t) . z_t) with S_t = sum_s phi(k_s) v_s^T, z_t = sum_s phi(k_s), for q and k of unit
    length; a gate g_t = sigmoid(w x_t + b) makes the sums forget, S_t = g_t S_(t-1) + (1 - g_t) phi(k_t) v_t^T.
    gaussian: phi(x) = [cos Wx, sin Wx] / sqrt(F), on average exp(-|s (q - k)|^2 / 2) for rows of W that are Gaussian
    times s, learned for every channel; arccos: phi(x) = relu(Wx) / sqrt(F).

    The kernel is the softmax of cosines, not of q . k.
    Deviations from the paper: the mean of weights, which few features may bring near 0 or below, counts as at least 0.1
        (gaussian).

    Options:
        features: F, random rows per head
        kernel: gaussian or arccos
        gate: none, or learned: causal alone, every head forgets at a rate computed from the input
        redraw: when W is drawn: once, or anew in every training step (evaluation keeps the first)
        chunk: positions whose causal products are computed together
    """

    kind = "linearised"
    exact = False
    accuracy = ": the error falls as 1 / sqrt(F)"
    complexity = Complexity(
        time="O(T H F)",
        memory="O(T F)",
        decoding="a 2 F x (H + 1) matrix, for arccos F x (H + 1)",
        time_note=", chunked where causal",
    )

    refuses: ClassVar = {"documents": "its sums are over all keys that stand before"}

    def __init__(
        self,
        size: Size,
        *,
        features: int = 64,
        kernel: Literal["gaussian", "arccos"] = "gaussian",
        gate: Literal["none", "learned"] = "none",
        redraw: Literal["once", "step"] = "once",
        chunk: int = 64,
        rngs: nnx.Rngs,
    ):
        if features < 1:
            raise Refused(f"features must be at least 1, got {features}")
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.features, self.kernel, self.redraw, self.chunk = features, kernel, redraw, chunk
        self.gate = Linear(size.dim, size.heads, dtype=size.dtype, rngs=rngs) if gate == "learned" else None
        self.spread = nnx.Param(jnp.ones((size.heads, size.head)), decays=False)
        self.projection = nnx.Variable(jax.random.normal(rngs.params(), (size.heads, features, size.head)))

    def refusals(self):
        fades = {"bidirectional": "with gate=learned it reads from left to right"} if self.gate is not None else {}
        return {**super().refusals(), **fades}

    def per_head(self):
        return {"projection": self.projection[...], "spread": self.spread[...]}

    def from_keys(self, x):
        if self.gate is None:
            return {"decay": None}
        return {"decay": jax.nn.log_sigmoid(self.gate(x).astype(jnp.float32))}

    def attend(self, q, k, v, *, valid=None, causal, projection, spread, decay=None, key=None):
        W = self._rows(projection, key) * spread
        return jax.checkpoint(self._attend, static_argnums=6)(q, k, v, W, valid, decay, causal)

    def _attend(self, q, k, v, W, valid, decay, causal):
        q, k, wide = self._map(q, W), self._map(k, W), v.astype(jnp.float32)
        if decay is None:
            out, total = sums(q, k, wide, valid=valid, causal=causal, chunk=self.chunk)
            weight = _seen(jnp.ones(len(k)), len(q), valid, causal)
        else:
            self._one_way(causal)
            keys = {"k": k, "v": jnp.pad(wide, ((0, 0), (0, 1)), constant_values=1), "decay": decay}
            both = aligned(lambda q, **keys: self._faded(q, **keys)[0], q, keys, valid)
            out, total = both[:, :-1], both[:, -1]
            weight = -jnp.expm1(_seen(decay, len(q), valid, causal))
        return self._divided(out, total, weight).astype(v.dtype)

    def _faded(self, q, k, v, decay, state=None):
        return scalar_decay(q, k * -jnp.expm1(decay)[:, None], v, decay, chunk=self.chunk, state=state)

    def _one_way(self, causal: bool) -> None:
        if not causal:
            raise Refused(f"with gate=learned {why_not_one_way(type(self))}, or gate=none")

    def _rows(self, projection, key):
        return jax.random.normal(key, projection.shape) if self.redraw == "step" and key is not None else projection

    def _map(self, x, W):
        e = jnp.dot(unit(x), W.T, **EXACT)
        both = jax.nn.relu(e) if self.kernel == "arccos" else jnp.concatenate([jnp.cos(e), jnp.sin(e)], -1)
        return both * self.features**-0.5

    def _divided(self, out, total, weight):
        return divided(out, total if self.kernel == "arccos" else jnp.maximum(total, FLOOR * weight))

    def reference(self, q, k, v, *, valid=None, causal, projection, spread, decay=None, key=None):
        T, S = len(q), len(k)
        W = self._rows(projection, key) * spread
        seen = jnp.tril(jnp.ones((T, S), bool), S - T) if causal else jnp.ones((T, S), bool)
        seen = seen if valid is None else seen & valid
        share = seen.astype(jnp.float32)  # what is left of each key, and what was taken of it
        if decay is not None:
            self._one_way(causal)
            decay = decay if valid is None else jnp.where(valid, decay, 0)
            fall = jnp.cumsum(decay)
            now = fall[jnp.maximum(jnp.arange(T) + S - T, 0)][:, None]
            share = jnp.exp(jnp.where(seen, now - fall, MASKED)) * (1 - jnp.exp(decay))
        e = (unit(q) @ W.T)[:, None], (unit(k) @ W.T)[None]
        if self.kernel == "arccos":
            weights = (jax.nn.relu(e[0]) * jax.nn.relu(e[1])).mean(-1)
        else:
            weights = jnp.cos(e[0] - e[1]).mean(-1)
        weights = weights * share
        return self._divided(weights @ v, weights.sum(1), share.sum(1)).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, F = self.size.head, self._count()
        return Cost(
            flops=2 * H * self.features * (T + S) + 2 * H * F * (T + S), memory=max(T, S) * F, state=F * (H + 1) + 1
        )

    def _count(self) -> int:
        return self.features * (1 if self.kernel == "arccos" else 2)

    def init_state(self, length: int, dtype=jnp.float32):
        return {"sums": jnp.zeros((self._count(), self.size.head + 1)), "weight": jnp.zeros(())}

    def step(self, state, q, k, v, *, projection, spread, decay=None):
        W = projection * spread
        q, k = self._map(q, W), self._map(k, W)
        kept, new = (1, 1) if decay is None else (jnp.exp(decay), -jnp.expm1(decay))
        added = new * jnp.outer(k, jnp.append(v.astype(jnp.float32), 1))
        state = {"sums": kept * state["sums"] + added, "weight": kept * state["weight"] + new}
        both = q @ state["sums"]
        return self._divided(both[None, :-1], both[None, -1], state["weight"])[0].astype(v.dtype), state

    def steps(self, state, q, k, v, *, projection, spread, decay=None):
        W = projection * spread
        q, k = self._map(q, W), self._map(k, W)
        wide = jnp.pad(v.astype(jnp.float32), ((0, 0), (0, 1)), constant_values=1)
        if decay is None:
            weight = state["weight"] + jnp.arange(1.0, len(k) + 1)
            both, total = scalar_decay(q, k, wide, jnp.zeros(len(k)), chunk=self.chunk, state=state["sums"])
        else:
            # What is missing of a weight of 1 fades.
            weight = 1 - (1 - state["weight"]) * jnp.exp(jnp.cumsum(decay))
            both, total = self._faded(q, k, wide, decay, state["sums"])
        out = self._divided(both[:, :-1], both[:, -1], weight).astype(v.dtype)
        return out, {"sums": total, "weight": weight[-1]}


def _seen(x, T: int, valid, causal: bool):
    """(T,) sums of x (S,) over the valid keys that each query sees."""
    x = x if valid is None else jnp.where(valid, x, 0)
    if not causal:
        return jnp.broadcast_to(x.sum(), (T,))
    total, S = jnp.cumsum(x), len(x)
    return total[S - T :] if T <= S else jnp.pad(total, (T - S, 0))
