from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, gate_of, gated
from xformers_lab.attention._engine.linear.gated import delta_rule
from xformers_lab.attention.delta_net import direction
from xformers_lab.errors import Refused
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class DeltaProduct(Recurrent):
    """DeltaProduct: several steps of the delta rule for each token (Siems et al., 2025, arXiv 2502.10297, section 3).

    S_t = H_n ... H_1 a_t S_(t-1) + ..., out_t = silu(W x_t) * rms(q_t S_t): a token makes n corrections of the state, S
    <- S + b_j k_j (v_j - k_j S)^T, one after the other, with a key, a value and a strength b_j of each. A transition is
    then a product of n generalised Householder matrices H_j = I - b_j k_j k_j^T: with strengths up to 2 each may
    reflect, and two reflections rotate, so that the state can follow permutations.

    Deviations from the paper: the short convolution before the silu of q, k and v is the model's conv=4; heads are
        normalised without learned weights. With kv_heads, the keys and values of a token's first step are shared
        by heads, the others are not.

    Options:
        householders: steps of each token
        strength: reflecting: b_j between 0 and 2; correcting: between 0 and 1, as in DeltaNet
        forget: scalar: the state fades by a_t = sigmoid(w x_t + 4) before a token's steps, as in Gated DeltaProduct
        chunk: tokens whose corrections are solved for together
    """

    refuses: ClassVar = {**Recurrent.refuses, "map": "a position writes several values"}
    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T n H (H + n chunk) + T n (n chunk)^2)",
        memory="O(T n (H + n chunk))",
        decoding="one H x H matrix",
    )

    def __init__(
        self,
        size: Size,
        *,
        householders: int = 2,
        strength: Literal["reflecting", "correcting"] = "reflecting",
        forget: Literal["none", "scalar"] = "none",
        chunk: int = 32,
        rngs: nnx.Rngs,
    ):
        if chunk < 1 or householders < 1:
            raise Refused(f"chunk and householders must be at least 1, got {chunk} and {householders}")
        super().__init__(size, rngs=rngs)
        self.householders, self.chunk, self.most = householders, chunk, 2.0 if strength == "reflecting" else 1.0
        self.gate, N = gate_of(size, rngs), size.heads
        linear = lambda width, **options: Linear(size.dim, width, dtype=size.dtype, rngs=rngs, **options)
        more = (householders - 1) * N * size.head
        self.more_key, self.more_value = (linear(more, use_bias=False) if more else None for _ in "kv")
        self.strength = linear(householders * N)
        self.forget = linear(N, bias_init=nnx.initializers.constant(4.0)) if forget == "scalar" else None

    def scale_init(self, share: float) -> None:
        super().scale_init(share)
        if self.more_value is not None:
            scale_init(share, self.more_value)

    def from_keys(self, x):
        strength = self.strength(x).reshape(*x.shape[:2], self.size.heads, self.householders)
        arrays: dict[str, Any] = {"beta": self.most * jax.nn.sigmoid(strength.astype(jnp.float32))}
        arrays["decay"] = None if self.forget is None else jax.nn.log_sigmoid(self.forget(x).astype(jnp.float32))
        for name, project in {"more_k": self.more_key, "more_v": self.more_value}.items():
            shape = (*x.shape[:2], self.size.heads, self.householders - 1, self.size.head)
            arrays[name] = None if project is None else project(x).reshape(shape)
        return arrays

    def from_queries(self, x):
        return {"gate": self.heads_of(self.gate(x))}

    def summed(self, v):
        return jax.nn.silu(v)

    def finished(self, mean, *, gate):
        return gated(mean, gate)

    def attend(self, q, k, v, *, valid=None, causal, beta, decay, more_k, more_v):
        return self.forward(direction(q), self._keys(k, v, beta, decay, more_k, more_v), valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, beta, decay, more_k, more_v):
        return self.by_definition(direction(q), self._keys(k, v, beta, decay, more_k, more_v), valid, causal)

    def _keys(self, k, v, beta, decay, more_k, more_v):
        """Of all positions (S, ...), or of one: keys and values of all steps, (S, n, H)."""
        k, v = k[..., None, :], v[..., None, :]
        if self.householders > 1:
            k = jnp.concatenate([k, more_k], -2)
            v = jnp.concatenate([v, self.summed(more_v).astype(v.dtype)], -2)
        decay = jnp.zeros(beta.shape[:-1]) if decay is None else decay
        return {"k": direction(k), "v": v, "beta": beta, "decay": decay}

    def scanned(self, state, q, k, v, beta, decay):
        """Each step is a position of its own: the first fades, the last is asked."""
        T, n = beta.shape
        q, decay = jnp.pad(q[:, None], ((0, 0), (n - 1, 0), (0, 0))), jnp.pad(decay[:, None], ((0, 0), (0, n - 1)))
        rows = (x.reshape(T * n, *x.shape[2:]) for x in (q, k, v, beta, decay))
        out, state = delta_rule(*rows, chunk=self.chunk * n, state=state)
        return out.reshape(T, n, -1)[:, -1], state

    def update(self, state, q, k, v, beta, decay):
        state = jnp.exp(decay) * state
        for step in range(self.householders):
            state = state + beta[step] * jnp.outer(k[step], v[step] - k[step] @ state)
        return q @ state, state

    def step(self, state, q, k, v, *, beta, decay, more_k, more_v):
        return self.update(state, direction(q), **self._keys(k, v, beta, decay, more_k, more_v))

    def steps(self, state, q, k, v, *, beta, decay, more_k, more_v):
        return self.scanned(state, direction(q), **self._keys(k, v, beta, decay, more_k, more_v))

    def cost(self, T: int, S: int) -> Cost:
        H, rows, C = self.size.head, S * self.householders, min(self.chunk, S) * self.householders
        inverse = 2 * C * C // 3  # of a chunk's triangle, by halves
        return Cost(flops=rows * (H * (10 * C + 6 * H) + inverse), memory=rows * max(C, 2 * H), state=H * H)
