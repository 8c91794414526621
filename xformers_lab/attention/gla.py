import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, gate_of, gated
from xformers_lab.attention._engine.linear.gated import channel_decay, power_of_two
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Gla(Recurrent):
    """Gated linear attention (Yang et al., 2023, arXiv 2312.06635, equations 3 to 6).

    S_t = diag(a_t) S_(t-1) + k_t v_t^T, out_t = silu(W x_t) * rms(q_t S_t / sqrt(H)), with a forget gate for every key
    channel, a_t = sigmoid(W2 W1 x_t)^(1 / temperature).

    Deviations from the paper: keys are as wide as values.

    Options:
        chunk: positions whose products are computed together, rounded up to a power of two
        rank: width of W1 x, from which all heads' gates are computed
        temperature: the larger, the slower a gate forgets
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(time="O(T H (H + chunk))", memory="O(T (H + chunk))", decoding="one H x H matrix")

    def __init__(self, size: Size, *, chunk: int = 64, rank: int = 16, temperature: float = 16.0, rngs: nnx.Rngs):
        if chunk < 1 or rank < 1:
            raise Refused(f"chunk and rank must be at least 1, got {chunk} and {rank}")
        if temperature <= 0:
            raise Refused(f"temperature must be above 0, got {temperature}")
        super().__init__(size, rngs=rngs)
        self.gate, self.chunk, self.temperature = gate_of(size, rngs), chunk, temperature
        self.down = Linear(size.dim, rank, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.up = Linear(rank, size.heads * size.head, dtype=size.dtype, rngs=rngs)

    def from_keys(self, x):
        forget = self.up(self.down(x)).astype(jnp.float32)
        return {"decay": jax.nn.log_sigmoid(forget).reshape(*x.shape[:2], self.size.heads, -1) / self.temperature}

    def from_queries(self, x):
        return {"gate": self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def finished(self, mean, *, gate):
        return gated(mean, gate)

    def attend(self, q, k, v, *, valid=None, causal, decay):
        keys = {"k": k * q.shape[-1] ** -0.5, "v": v, "decay": decay}
        return self.forward(q, keys, valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, decay):
        keys = {"k": k * q.shape[-1] ** -0.5, "v": v, "decay": decay}
        return self.by_definition(q, keys, valid, causal)

    def scanned(self, state, q, k, v, decay):
        return channel_decay(q, k, v, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay)[:, None] * state + jnp.outer(k, v)
        return q @ state, state

    def step(self, state, q, k, v, *, decay):
        out, state = self.update(state, q, k * q.shape[-1] ** -0.5, v, decay)
        return out, state

    def steps(self, state, q, k, v, *, decay):
        return self.scanned(state, q, k * q.shape[-1] ** -0.5, v, decay)

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, power_of_two(min(self.chunk, S))
        return Cost(flops=4 * S * H * (H + C), memory=S * max(C, H), state=H * H)
