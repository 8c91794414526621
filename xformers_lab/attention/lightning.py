import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, gate_of, rms
from xformers_lab.attention._engine.linear.gated import scalar_decay
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Lightning(Recurrent):
    """Lightning attention (Qin et al., 2024, arXiv 2401.04658; the layer: MiniMax-01, 2025, arXiv 2501.08313).

    S_t = g S_(t-1) + silu(k_t) silu(v_t)^T, out_t = sigmoid(W x_t) * rms(silu(q_t) S_t); head n of N forgets at the
    rate of ALiBi's slopes, g = exp(-2^(-8 n / N)).

    Deviations from the paper: every head is normalised by its own root mean square, not by that of all heads, and
        without weights; slopes are the same on every layer, where MiniMax lets later layers forget less.

    Options:
        chunk: positions whose products are computed together
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(time="O(T H (H + chunk))", memory="O(T H + T H^2 / chunk)", decoding="one H x H matrix")

    def __init__(self, size: Size, *, chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.gate, self.chunk = gate_of(size, rngs), chunk

    def per_head(self):
        N = self.size.heads
        return {"decay": -jnp.exp2(-8 * jnp.arange(1, N + 1) / N)}

    def from_queries(self, x):
        return {"gate": self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def summed(self, v):
        return jax.nn.silu(v)

    def finished(self, mean, *, gate):
        return rms(mean) * jax.nn.sigmoid(gate.astype(jnp.float32))

    def attend(self, q, k, v, *, valid=None, causal, decay):
        return self.forward(jax.nn.silu(q), _keys(k, v, decay), valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, decay):
        return self.by_definition(jax.nn.silu(q), _keys(k, v, decay), valid, causal)

    def scanned(self, state, q, k, v, decay):
        return scalar_decay(q, k, v, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay) * state + jnp.outer(k, v)
        return q @ state, state

    def step(self, state, q, k, v, *, decay):
        q, k = (jax.nn.silu(x.astype(jnp.float32)) for x in (q, k))
        return self.update(state, q, k, v, decay)

    def steps(self, state, q, k, v, *, decay):
        return self.scanned(state, jax.nn.silu(q), **_keys(k, v, decay))

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, min(self.chunk, S)
        return Cost(flops=4 * S * H * (H + C), memory=S * max(C, H, H * H / C), state=H * H)


def _keys(k, v, decay):
    return {"k": jax.nn.silu(k), "v": v, "decay": jnp.full(len(k), decay)}
