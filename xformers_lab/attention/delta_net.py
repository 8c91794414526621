from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, gate_of, gated, unit
from xformers_lab.attention._engine.linear.gated import delta_rule
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class DeltaNet(Recurrent):
    """DeltaNet: a memory that corrects what it holds under a key (Schlag et al., 2021, arXiv 2102.11174, equation 24;
    in chunks: Yang et al., 2024, arXiv 2406.06484).

    S_t = S_(t-1) + b_t k_t (v_t - k_t S_(t-1))^T, out_t = rms(q_t S_t), b_t = sigmoid(w x_t), with q, k and v after
    silu, q and k then of unit length.

    Deviations from the paper: no short convolution before the silu of q, k and v; heads are normalised without
        learned weights. It follows the second paper; the first has its own feature map and does not normalise.

    Options:
        gate: silu: the output times silu(W x_t), as published models may add; none: as it is
        chunk: positions whose corrections are solved for together
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk) + T chunk^2)",
        memory="O(T (H + chunk))",
        decoding="one H x H matrix",
    )

    def __init__(self, size: Size, *, gate: Literal["none", "silu"] = "none", chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.gate, self.chunk = gate_of(size, rngs) if gate == "silu" else None, chunk
        self.strength = Linear(size.dim, size.heads, dtype=size.dtype, rngs=rngs)

    def from_keys(self, x):
        return {"beta": jax.nn.sigmoid(self.strength(x).astype(jnp.float32))}

    def from_queries(self, x):
        return {"gate": None if self.gate is None else self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def summed(self, v):
        return jax.nn.silu(v)

    def finished(self, mean, *, gate):
        return gated(mean, gate)

    def attend(self, q, k, v, *, valid=None, causal, beta):
        keys = {"k": direction(k), "v": v, "beta": beta}
        return self.forward(direction(q), keys, valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, beta):
        keys = {"k": direction(k), "v": v, "beta": beta}
        return self.by_definition(direction(q), keys, valid, causal)

    def scanned(self, state, q, k, v, beta):
        return delta_rule(q, k, v, beta, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, beta):
        state = state + beta * jnp.outer(k, v - k @ state)
        return q @ state, state

    def step(self, state, q, k, v, *, beta):
        return self.update(state, direction(q), direction(k), v, beta)

    def steps(self, state, q, k, v, *, beta):
        return self.scanned(state, direction(q), direction(k), v, beta)

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, min(self.chunk, S)
        inverse = 2 * C * C // 3  # of a chunk's triangle, by halves
        return Cost(flops=S * (H * (10 * C + 6 * H) + inverse), memory=S * max(C, 2 * H), state=H * H)


def direction(x):
    """silu(x) at unit length, in float32."""
    return unit(jax.nn.silu(x.astype(jnp.float32)))
