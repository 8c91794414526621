import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Attention, Cost
from xformers_lab.attention._engine.recurrence import linear_recurrence
from xformers_lab.size import Size

EPSILON = 1e-6


class Linear(Attention):
    """Linear attention with phi(x) = elu(x) + 1 (Katharopoulos et al., 2020, arXiv 2006.16236, equations 4 to 9).

    out_t = phi(q_t) sum_s phi(k_s) v_s^T / (phi(q_t) . sum_s phi(k_s)), the sums over all keys, causally over s <= t.
    Kind: linearised
    Time O(T H^2), chunked where causal; memory O(T H); decoding keeps one H x H matrix and one vector.
    Exact for its kernel, which is not the softmax. No scores exist, so no bias can be added.

    Options:
        chunk: positions whose causal products are computed together
    """

    def __init__(self, size: Size, *, chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.chunk = chunk

    def attend(self, q, k, v, *, real=None, causal):
        return jax.checkpoint(self._causal if causal else self._both_sides)(q, k, v, real)

    def _causal(self, q, k, v, real):
        out, total = linear_recurrence(_features(q), _masked(_features(k), real), v, chunk=self.chunk)
        return (out / (total + EPSILON)[:, None]).astype(v.dtype)

    def _both_sides(self, q, k, v, real):
        q, k = _features(q), _masked(_features(k), real)
        exact = {"preferred_element_type": jnp.float32}
        out = jnp.dot(q, jnp.dot(k.T, v, **exact).astype(q.dtype), **exact)
        total = jnp.dot(q, k.sum(0, dtype=jnp.float32).astype(q.dtype), **exact)
        return (out / (total + EPSILON)[:, None]).astype(v.dtype)

    def reference(self, q, k, v, *, real=None, causal):
        weights = jnp.dot(_features(q), _masked(_features(k), real).T, preferred_element_type=jnp.float32)
        if causal:
            weights = jnp.tril(weights, k.shape[0] - q.shape[0])
        return (weights @ v / (weights.sum(-1, keepdims=True) + EPSILON)).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H = self.size.head
        return Cost(flops=2 * H * H * (T + S), memory=max(T, S) * H, state=H * H + H)

    def init_state(self, length: int, dtype=jnp.float32):
        H = self.size.head
        return {"sum": jnp.zeros((H, H), jnp.float32), "norm": jnp.zeros(H, jnp.float32)}

    def step(self, state, q, k, v):
        q, k = _features(q), _features(k)
        state = {"sum": state["sum"] + jnp.outer(k, v), "norm": state["norm"] + k}
        return q @ state["sum"] / (q @ state["norm"] + EPSILON), state


def _features(x):
    return jax.nn.elu(x) + 1


def _masked(k, real):
    return k if real is None else jnp.where(real[:, None], k, 0)
