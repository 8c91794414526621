import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost, Stepwise
from xformers_lab.attention._engine.linear.features import (
    EXACT,
    divided,
    empty_state,
    exponential,
    one_more,
    several_more,
    sums,
)
from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# Added to every feature of the relu kernel, so that no query is without weights.
FLOOR = 1e-3


def orthogonal(key, count: int, size: int):
    """Uniformly distributed orthogonal matrices (count, size, size).

    Gram-Schmidt on Gaussian columns gives the factor Q whose R has a positive diagonal, which is uniform (Mezzadri,
    2006); once more takes away what rounding left. Not `jnp.linalg.qr`: where several of a training step run at once
    on CPU, they starve XLA's thread pool (jaxlib 0.10.2), and none ends.
    """

    def add(columns, step):
        column, at = step
        for _ in range(2):
            column -= jnp.einsum("nj,njs->ns", jnp.einsum("ns,njs->nj", column, columns), columns)
        column *= lax.rsqrt(jnp.square(column).sum(-1, keepdims=True))
        return columns.at[:, at].set(column), None

    gaussian = jax.random.normal(key, (count, size, size))
    steps = jnp.moveaxis(gaussian, 2, 0), jnp.arange(size)
    with jax.default_matmul_precision("highest"):
        columns, _ = lax.scan(add, jnp.zeros_like(gaussian), steps)
    return jnp.swapaxes(columns, 1, 2)


class Performer(Stepwise):
    """Performer, FAVOR+: softmax by positive orthogonal random features (Choromanski et al., 2020, arXiv 2009.14794).

    out_t = phi(q_t) sum_s phi(k_s) v_s^T / (phi(q_t) . sum_s phi(k_s)), phi(x) = exp(W x - |x|^2 / 2) of x / H^(1/4):
    on average over Gaussian rows of W, phi(q) . phi(k) is exp(q . k / sqrt(H)). The rows of W come in orthogonal blocks
    of H, with the lengths of Gaussian vectors.

    Deviations from the paper: a key's features are divided by the largest of those that the query may see, exactly so
    that no later key is felt (the authors' code divides by the largest of all keys); nothing is added to the features
    of the exponential unless `epsilon` says so, and nothing to the sum of the features alone (causal code adds 1e-6).

    Options:
        epsilon: added to every feature of the exponential, which mixes in uniform attention, as code does with 1e-4 or
            1e-6; a query's are exp(W q - |q|^2 / 2) over exp(the largest entry of its W q), a key's over exp(the
            largest of W k among the keys that the query may see)
        features: F, rows of W per head; none: int(H log H)
        kernel: softmax, or relu: phi(x) = relu(W x) + 0.001, which is not the softmax
        rows: orthogonal blocks, or independent Gaussian rows
        redraw: when W is drawn: once, or anew in every training step (evaluation keeps the first)
        chunk: positions whose causal products are computed together
    """

    kind = "linearised"
    exact = False
    accuracy = (
        ": the variance falls as 1 / F and grows as exp(|q + k|^2 / sqrt(H)), so that many features come near the "
        "softmax for short q and k alone"
    )
    complexity = Complexity(
        time="O(T H F)",
        memory="O(T F)",
        decoding="one H x F matrix, one vector, one number",
        time_note=", chunked where causal",
    )

    refuses: ClassVar = {"documents": "its sums are over all keys that stand before"}

    def __init__(
        self,
        size: Size,
        *,
        epsilon: float = 0.0,
        features: int | None = None,
        kernel: Literal["softmax", "relu"] = "softmax",
        rows: Literal["orthogonal", "independent"] = "orthogonal",
        redraw: Literal["once", "step"] = "once",
        chunk: int = 128,
        rngs: nnx.Rngs,
    ):
        if features is not None and features < 1:
            raise Refused(f"features must be at least 1, or none for int(H log H), got {features}")
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        if epsilon < 0:
            raise Refused(f"epsilon must be at least 0, got {epsilon:g}")
        if epsilon and kernel != "softmax":
            raise Refused(f"epsilon is an option of kernel=softmax, got kernel={kernel}, which adds {FLOOR} always")
        super().__init__(size, rngs=rngs)
        self.epsilon = epsilon
        self.features = max(1, int(size.head * math.log(size.head))) if features is None else features
        self.kernel, self.rows, self.redraw, self.chunk = kernel, rows, redraw, chunk
        self.projection = nnx.Variable(jax.vmap(self._draw)(jax.random.split(rngs.params(), size.heads)))

    def _draw(self, key):
        """W (F, H) of one head."""
        F, H = self.features, self.size.head
        gaussian = jax.random.normal(key, (F, H))
        if self.rows == "independent":
            return gaussian
        directions = orthogonal(jax.random.fold_in(key, 1), -(-F // H), H)
        return directions.reshape(-1, H)[:F] * jnp.linalg.norm(gaussian, axis=1, keepdims=True)

    def per_head(self):
        return {"projection": self.projection[...]}

    def attend(self, q, k, v, *, valid=None, causal, projection, key=None):
        return jax.checkpoint(self._attend, static_argnums=5)(q, k, v, valid, self._rows(projection, key), causal)

    def _attend(self, q, k, v, valid, W, causal):
        (q, _), (k, log) = self._map(q, W, key=False), self._map(k, W, key=True)
        options = {"valid": valid, "causal": causal, "chunk": self.chunk}
        out, total = sums(q, k, v, log=log, **options)
        if self.epsilon:
            # Added to every feature of every key alike, it weighs all keys by the sum of the query's features.
            even = self.epsilon * q.sum(-1, keepdims=True)
            further = sums(even, jnp.ones((len(k), 1), q.dtype), v, **options)
            out, total = out + further[0], total + further[1]
        return divided(out, total).astype(v.dtype)

    def _rows(self, projection, key):
        return self._draw(key) if self.redraw == "step" and key is not None else projection

    def _map(self, x, W, *, key: bool):
        """phi and the logarithm of its scale; of a query the scale cancels, and |q|^2 with it."""
        H = x.shape[-1]
        e = jnp.dot(x, (W * H**-0.25).T.astype(x.dtype), **EXACT)
        if self.kernel == "relu":
            return jax.nn.relu(e) + FLOOR, None
        half = jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True) * (H**-0.5 / 2)
        if not self.epsilon:
            return exponential(e - half if key else e)
        # What epsilon is added to: the largest entry alone is taken out, and the norm stays.
        phi, log = exponential(e)
        phi = phi * jnp.exp(-half)
        return (phi, log) if key else (phi + self.epsilon, log)

    def reference(self, q, k, v, *, valid=None, causal, projection, key=None):
        T, S = q.shape[0], k.shape[0]
        W = self._rows(projection, key)
        seen = jnp.tril(jnp.ones((T, S), bool), S - T) if causal else jnp.ones((T, S), bool)
        seen = seen if valid is None else seen & valid
        q, k = (x * self.size.head**-0.25 for x in (q, k))
        if self.kernel == "relu":
            weights = (jax.nn.relu(q @ W.T) + FLOOR) @ (jax.nn.relu(k @ W.T) + FLOOR).T * seen
        elif self.epsilon:
            top = lambda e, axis: jax.lax.stop_gradient(e.max(axis, keepdims=True))
            of_q, of_k = (x @ W.T - jnp.square(x).sum(-1, keepdims=True) / 2 for x in (q, k))
            phi_q = jnp.exp(of_q - top(q @ W.T, -1)) + self.epsilon
            largest = top(jnp.where(seen, (k @ W.T).max(-1), MASKED), -1)  # (T, 1), of what each query sees
            phi_k = jnp.exp(jnp.where(seen[..., None], of_k[None] - largest[..., None], MASKED)) + self.epsilon
            weights = jnp.einsum("tf,tsf->ts", phi_q, phi_k) * seen
        else:
            logs = jax.nn.logsumexp((q @ W.T)[:, None] + (k @ W.T)[None], -1) - jnp.square(k).sum(-1) / 2
            logs = jnp.where(seen, logs, MASKED)
            weights = jnp.exp(logs - jax.lax.stop_gradient(logs.max(-1, keepdims=True))) * seen
        return (weights @ v / jnp.where(seen.any(-1), weights.sum(-1), 1)[:, None]).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, F = self.size.head, self.features
        even = H + 2 if self.epsilon else 0
        return Cost(flops=4 * F * H * (T + S), memory=max(T, S) * max(F, H), state=H * F + F + 1 + even)

    def init_state(self, length: int, dtype=jnp.float32):
        state = empty_state(self.features, self.size.head)
        return (state, empty_state(1, self.size.head)) if self.epsilon else (state,)

    def step(self, state, q, k, v, *, projection):
        (q, _), (k, log) = self._map(q[None], projection, key=False), self._map(k[None], projection, key=True)
        sums, out, total = one_more(state[0], q[0], k[0], v, log)
        if not self.epsilon:
            return divided(out[None], total[None])[0].astype(v.dtype), (sums,)
        even, *further = one_more(state[1], self.epsilon * q[0].sum(keepdims=True), jnp.ones(1), v)
        return divided((out + further[0])[None], (total + further[1])[None])[0].astype(v.dtype), (sums, even)

    def steps(self, state, q, k, v, *, projection):
        (q, _), (k, log) = self._map(q, projection, key=False), self._map(k, projection, key=True)
        sums, out, total = several_more(state[0], q, k, v, log, chunk=self.chunk)
        if not self.epsilon:
            return divided(out, total).astype(v.dtype), (sums,)
        even, one = self.epsilon * q.sum(-1, keepdims=True), jnp.ones((len(k), 1), q.dtype)
        even, *further = several_more(state[1], even, one, v, chunk=self.chunk)
        return divided(out + further[0], total + further[1]).astype(v.dtype), (sums, even)
