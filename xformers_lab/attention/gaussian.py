import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, KeepsKeys
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.pattern import All
from xformers_lab.attention._engine.softmax import softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# Where b of kind=distance starts, but for its sign.
HEIGHT = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Around:
    """Scores to add: -(j - centre)^2 tightness for key number j, of the query `first` positions into the sequence."""

    centre: jax.Array  # (T,)
    tightness: jax.Array  # (T,) 1 / (2 sigma^2)
    number: jax.Array  # (S,) of valid keys, counted from one
    other: Any
    first: int = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at, k_at):
        t, j = q_at - self.first, jax.lax.stop_gradient(self.number)[k_at]
        added = -self.tightness[t] * (j - self.centre[t]) ** 2
        return added if self.other is None else added + self.other(q_at, k_at)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distance:
    """Scores to add: -|steepness d^2 - height| for keys d positions away."""

    steepness: jax.Array
    height: jax.Array
    other: Any

    def __call__(self, q_at, k_at):
        added = -jnp.abs(self.steepness * (q_at - k_at) ** 2 - self.height)
        return added if self.other is None else added + self.other(q_at, k_at)


class Gaussian(KeepsKeys, Patterned):
    """Attention with a learned Gaussian prior on positions (Yang et al., 2018, arXiv 1810.10182; kind=distance: Guo et
    al., 2019, AAAI 33, doi 10.1609/aaai.v33i01.33016489).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H) - (s - P_t)^2 / (2 sigma_t^2)) v_s, sigma_t = D_t / 2, where each query
    predicts the centre P_t = I sigmoid(u . tanh(W q_t)) and the window D_t = I sigmoid(z_t) among I keys.

    Deviations from the paper: I counts the valid keys, causally those up to the query, and s is a key's number among
        them, from one; kind=layer causally takes the mean of the keys so far; every head has a prior of its own,
        predicted from its queries as they are after a rotation by position; D is at least one position.

    Options:
        kind: the window is that of each query, of the layer, or fixed; distance is the Gaussian Transformer's prior
            query: z_t = u' . tanh(W q_t); layer: z = u' . tanh(W' mean key); fixed: D is `width`;
            distance: -|w (t - s)^2 + b| with learned w > 0 > b is added instead
        width: D of kind=fixed, in positions; with kind=distance w starts there; none: 10
    """

    kind = "prior"
    exact = True
    accuracy = ": the prior is added to the scores of every key"
    complexity = Complexity(
        time="O(T S H)",
        memory="O((T + S) H)",
        decoding="every key and value",
        memory_note=", scores are never stored",
    )

    def __init__(
        self,
        size: Size,
        *,
        kind: Literal["query", "layer", "fixed", "distance"] = "query",
        width: float | None = None,
        rngs: nnx.Rngs,
    ):
        if width is not None and width <= 0:
            raise Refused(f"width must be above 0, got {width}")
        if width is not None and kind not in ("fixed", "distance"):
            raise Refused(f"width is an option of kind=fixed and kind=distance, got kind={kind}, which predicts it")
        width = 10.0 if width is None else width
        super().__init__(size, All(), rngs=rngs)
        self.form, self.width = kind, width
        N, H = size.heads, size.head
        matrix, vector = nnx.initializers.lecun_normal(batch_axis=0), nnx.initializers.normal(H**-0.5)
        if kind == "distance":
            # The steepness starts at 1 / (2 sigma^2), like that of kind=fixed; softplus keeps both above zero.
            start = jnp.log(jnp.expm1(jnp.array([2 / width**2, HEIGHT])))
            self.shape = nnx.Param(jnp.broadcast_to(start, (N, 2)), decays=False)
            return
        self.hidden = nnx.Param(matrix(rngs.params(), (N, H, H)), decays=True)
        self.centre = nnx.Param(vector(rngs.params(), (N, H)), decays=False)
        if kind == "layer":
            self.window_hidden = nnx.Param(matrix(rngs.params(), (N, H, H)), decays=True)
        if kind != "fixed":
            self.window = nnx.Param(vector(rngs.params(), (N, H)), decays=False)

    def per_head(self):
        names = [name for name in ("shape", "hidden", "centre", "window_hidden", "window") if hasattr(self, name)]
        return {"prior": {name: getattr(self, name)[...] for name in names}}

    def attend(self, q, k, v, *, valid=None, causal, bias=None, prior):
        T, S = q.shape[0], k.shape[0]
        if self.form == "distance":
            steepness, height = jax.nn.softplus(prior["shape"])
            added = Distance(steepness, height, bias)
        else:
            centre, tightness, number = self._predicted(q, k, valid, causal, prior)
            added = Around(centre, tightness, number, bias, S - T)
        blocks = self.blocks(T, S, causal)
        return block_sparse(q, k, v, pattern=self.seen(causal), valid=valid, bias=added, blocks=blocks)

    def _predicted(self, q, k, valid, causal: bool, prior):
        """Centres (T,) and tightness (T,) of queries, numbers (S,) of keys."""
        T, S = q.shape[0], k.shape[0]
        valid = jnp.ones(S, bool) if valid is None else valid
        number = jnp.cumsum(valid.astype(jnp.float32))
        at = jnp.maximum(jnp.arange(T) + S - T, 0) if causal else jnp.full(T, S - 1)
        count = jnp.maximum(number[at], 1)
        hidden = _hidden(q, prior["hidden"])
        if self.form == "fixed":
            window = jnp.full(T, self.width)
        elif self.form == "query":
            window = count * jax.nn.sigmoid(hidden @ prior["window"])
        else:
            keys = jnp.where(valid[:, None], k, 0).astype(jnp.float32)
            mean = (jnp.cumsum(keys, 0)[at] if causal else keys.sum(0)) / (count[:, None] if causal else count[0])
            window = count * jax.nn.sigmoid(_hidden(mean, prior["window_hidden"]) @ prior["window"])
        return count * jax.nn.sigmoid(hidden @ prior["centre"]), 2 / jnp.maximum(window, 1) ** 2, number

    def reference(self, q, k, v, *, valid=None, causal, bias=None, prior):
        T, S = q.shape[0], k.shape[0]
        valid = jnp.ones(S, bool) if valid is None else valid
        t, s = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        seen = valid[None] & ((s <= t) if causal else (s >= 0))
        if self.form == "distance":
            w, b = jnp.logaddexp(prior["shape"], 0) * jnp.array([1.0, -1.0])
            added = -jnp.abs(w * (t - s) ** 2 + b)
        else:
            number = ((s <= s.T) & valid[None]).sum(1)
            I = jnp.maximum(jnp.broadcast_to(seen, (T, S)).sum(1), 1)
            hidden = jnp.tanh(q.astype(jnp.float32) @ prior["hidden"])
            P = I / (1 + jnp.exp(-(hidden @ prior["centre"])))
            if self.form == "layer":
                mean = jnp.broadcast_to(seen, (T, S)) @ jnp.where(valid[:, None], k.astype(jnp.float32), 0) / I[:, None]
                hidden = jnp.tanh(mean @ prior["window_hidden"])
            D = self.width if self.form == "fixed" else I / (1 + jnp.exp(-(hidden @ prior["window"])))
            sigma = jnp.broadcast_to(jnp.maximum(D, 1) / 2, (T,))
            added = -((number[None] - P[:, None]) ** 2) / (2 * sigma[:, None] ** 2)
        return softmax_average(scores(q, k, bias) + added, seen, v)

    @staticmethod
    def limit(length: int):
        return {"kind": "fixed", "width": 1e5 * length}


def _hidden(x, matrix):
    return jnp.tanh(jnp.dot(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32))
