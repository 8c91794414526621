import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, interval_bias, rms
from xformers_lab.attention._engine.linear.gated import delta_rule, power_of_two
from xformers_lab.attention.delta_net import direction
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Kda(Recurrent):
    """Kimi Delta Attention (Kimi Team, 2025, arXiv 2510.26692, equation 1).

    S_t = diag(a_t) S_(t-1) + b_t k_t (v_t - k_t diag(a_t) S_(t-1))^T, out_t = sigmoid(W x_t) * rms(q_t S_t): Gated
    DeltaNet with a forget gate for every key channel, a_t = exp(-A softplus(W2 W1 x_t + c)), whose rate A > 0 is
    learned for every head.

    Deviations from the paper: the short convolution before the silu of q, k and v is the model's conv=4; heads are
        normalised without learned weights.

    Options:
        chunk: positions whose corrections are solved for together, rounded up to a power of two
        rank: width of W1 x, and of what the output's gate is computed from; none: a head's
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk) + T chunk^2)",
        memory="O(T (H + chunk))",
        decoding="one H x H matrix",
    )

    def __init__(self, size: Size, *, chunk: int = 64, rank: int | None = None, rngs: nnx.Rngs):
        rank = size.head if rank is None else rank
        if chunk < 1 or rank < 1:
            raise Refused(f"chunk and rank must be at least 1, got {chunk} and {rank}")
        super().__init__(size, rngs=rngs)
        self.chunk, width = chunk, size.heads * size.head
        self.strength = Linear(size.dim, size.heads, dtype=size.dtype, rngs=rngs)
        self.down, self.gate_down = (Linear(size.dim, rank, use_bias=False, dtype=size.dtype, rngs=rngs) for _ in "ag")
        self.up = Linear(rank, width, bias_init=interval_bias, dtype=size.dtype, rngs=rngs)
        self.gate = Linear(rank, width, dtype=size.dtype, rngs=rngs)
        self.rate = nnx.Param(
            jnp.log(jax.random.uniform(rngs.params(), (size.heads,), minval=1.0, maxval=16.0)), decays=False
        )

    def from_keys(self, x):
        fade = jax.nn.softplus(self.up(self.down(x)).astype(jnp.float32))
        decay = -jnp.exp(self.rate[...])[:, None] * self.heads_of(fade)
        return {"beta": jax.nn.sigmoid(self.strength(x).astype(jnp.float32)), "decay": decay}

    def from_queries(self, x):
        return {"gate": self.heads_of(self.gate(self.gate_down(x)))}

    def summed(self, v):
        return jax.nn.silu(v)

    def finished(self, mean, *, gate):
        return rms(mean) * jax.nn.sigmoid(gate.astype(jnp.float32))

    def attend(self, q, k, v, *, valid=None, causal, beta, decay):
        keys = {"k": direction(k), "v": v, "beta": beta, "decay": decay}
        return self.forward(direction(q), keys, valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, beta, decay):
        keys = {"k": direction(k), "v": v, "beta": beta, "decay": decay}
        return self.by_definition(direction(q), keys, valid, causal)

    def scanned(self, state, q, k, v, beta, decay):
        return delta_rule(q, k, v, beta, decay, chunk=self.chunk, state=state)

    def step(self, state, q, k, v, *, beta, decay):
        return self.update(state, direction(q), direction(k), v, beta, decay)

    def steps(self, state, q, k, v, *, beta, decay):
        return self.scanned(state, direction(q), direction(k), v, beta, decay)

    def update(self, state, q, k, v, beta, decay):
        state = jnp.exp(decay)[:, None] * state
        state = state + beta * jnp.outer(k, v - k @ state)
        return q @ state, state

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, power_of_two(min(self.chunk, S))
        inverse = 2 * C * C // 3  # of a chunk's triangle, by halves
        return Cost(flops=S * (H * (8 * C + 6 * H) + inverse), memory=S * max(C, 2 * H), state=H * H)
