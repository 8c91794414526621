from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Widened, gate_of, gated, unit
from xformers_lab.attention._engine.linear.gated import delta_rule
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class DeltaNet(Widened):
    """DeltaNet: a memory that corrects what it holds under a key (Schlag et al., 2021, arXiv 2102.11174, equation 24;
    in chunks: Yang et al., 2024, arXiv 2406.06484).

    S_t = S_(t-1) + b_t k_t (v_t - k_t S_(t-1))^T, out_t = rms(q_t S_t), b_t = sigmoid(w x_t), with q, k and v after
    silu, q and k then of unit length.

    Deviations from the paper: the short convolution before the silu of q, k and v is the model's conv=4; heads are
        normalised without learned weights unless gain says so. It follows the second paper; the first has its own
        feature map and does not normalise.

    Options:
        gate: silu: the output times silu(W x_t), as published models may add; none: as it is
        gain: whether normalised heads are multiplied by learned weights of their channels, the same in all heads
        expand: channels of the values, and of what the gate multiplies, for each of the block's
        chunk: positions whose corrections are solved for together
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk) + T chunk^2)",
        memory="O(T (H + chunk))",
        decoding="one H x expand H matrix",
    )
    later_options: ClassVar = ("gain", "expand")

    def __init__(
        self,
        size: Size,
        *,
        gate: Literal["none", "silu"] = "none",
        gain: bool = False,
        expand: int = 1,
        chunk: int = 64,
        rngs: nnx.Rngs,
    ):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        if expand < 1:
            raise Refused(f"expand must be at least 1, got {expand}")
        super().__init__(size, rngs=rngs)
        width = expand * size.head
        self.gate, self.chunk = gate_of(size, rngs, numbers=width) if gate == "silu" else None, chunk
        self.strength = Linear(size.dim, size.heads, dtype=size.dtype, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(width), decays=False) if gain else None
        self.widen(expand, rngs)

    def from_keys(self, x):
        return {"beta": jax.nn.sigmoid(self.strength(x).astype(jnp.float32)), "more_v": self.more_values(x)}

    def from_queries(self, x):
        return {"gate": None if self.gate is None else self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def summed(self, v):
        return jax.nn.silu(v)

    def finished(self, mean, *, gate):
        out = gated(mean, gate)
        return self.narrowed(out if self.gain is None else out * self.gain[...])

    def attend(self, q, k, v, *, valid=None, causal, beta, more_v):
        return self.forward(*self.asked(q, k, v, beta, more_v), valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, beta, more_v):
        return self.by_definition(*self.asked(q, k, v, beta, more_v), valid, causal)

    def asked(self, q, k, v, beta, more_v):
        """What the recurrence reads of queries and of keys, of all positions or of one."""
        return direction(q), {"k": direction(k), "v": self.wide(v, more_v), "beta": beta}

    def scanned(self, state, q, k, v, beta):
        return delta_rule(q, k, v, beta, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, beta):
        state = state + beta * jnp.outer(k, v - k @ state)
        return q @ state, state

    def step(self, state, q, k, v, *, beta, more_v):
        q, keys = self.asked(q, k, v, beta, more_v)
        return self.update(state, q, **keys)

    def steps(self, state, q, k, v, *, beta, more_v):
        q, keys = self.asked(q, k, v, beta, more_v)
        return self.scanned(state, q, **keys)

    def cost(self, T: int, S: int) -> Cost:
        H, C, E = self.size.head, min(self.chunk, S), self.expand
        inverse = 2 * C * C // 3  # of a chunk's triangle, by halves
        flops = S * (H * (6 * C + 2 * H + E * (4 * C + 4 * H)) + inverse) + self.flops_of_width(S)
        return Cost(flops=flops, memory=S * max(C, (1 + E) * H), state=E * H * H)


def direction(x):
    """silu(x) at unit length, in float32."""
    return unit(jax.nn.silu(x.astype(jnp.float32)))
