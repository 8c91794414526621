import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, centred, gate_of
from xformers_lab.attention._engine.linear.exponential import exponential_gates
from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

# exp of no more than this is a float32.
LARGEST = 80.0


class Xlstm(Recurrent):
    """xLSTM's matrix memory, the mLSTM (Beck et al., 2024, arXiv 2405.04517, equations 19 to 27).

    C_t = f_t C_(t-1) + i_t k_t v_t^T, n_t = f_t n_(t-1) + i_t k_t, out_t = sigmoid(W x_t) * norm(q_t C_t / max(|q_t .
    n_t|, 1)), with keys over sqrt(H), an exponential input gate i_t = exp(w x_t + b) and a forget gate f_t = sigmoid(u
    x_t + c) of every head.

    C and n are kept relative to exp(m_t), m_t = max(log f_t + m_(t-1), log i_t), so no gate overflows.
    Deviations from the paper: the mixer alone, without the block of twice the width around it, its convolution and its
        skip; heads are normalised without learned weights.

    Options:
        chunk: positions whose products are computed together
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk))",
        memory="O(T (H + chunk) + T H^2 / chunk)",
        decoding="one H x H matrix, H numbers and 1",
    )

    def __init__(self, size: Size, *, chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.chunk, self.gate = chunk, gate_of(size, rngs)
        gate = lambda start: Linear(
            size.dim,
            size.heads,
            kernel_init=nnx.initializers.zeros,
            bias_init=start,
            dtype=size.dtype,
            rngs=rngs,
        )
        self.write, self.forget = gate(nnx.initializers.normal(0.1)), gate(_long_and_longer)

    def from_keys(self, x):
        write, forget = (gate(x).astype(jnp.float32) for gate in (self.write, self.forget))
        return {"log": write, "decay": jax.nn.log_sigmoid(forget)}

    def from_queries(self, x):
        return {"gate": self.heads_of(self.gate(x))}

    def finished(self, mean, *, gate):
        return centred(mean) * jax.nn.sigmoid(gate.astype(jnp.float32))

    def attend(self, q, k, v, *, valid=None, causal, log, decay):
        keys = {"k": k * q.shape[-1] ** -0.5, "v": v, "log": log, "decay": decay}
        return self.forward(q, keys, valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, log, decay):
        keys = {"k": k * q.shape[-1] ** -0.5, "v": v, "log": log, "decay": decay}
        return self.by_definition(q, keys, valid, causal)

    def scanned(self, state, q, k, v, log, decay):
        sums, state = exponential_gates(q, k, v, log, decay, state, chunk=self.chunk)
        return _divided(*sums), state

    def start(self):
        H = self.size.head
        return jnp.zeros((H, H), jnp.float32), jnp.zeros(H, jnp.float32), jnp.asarray(MASKED, jnp.float32)

    def update(self, state, q, k, v, log, decay):
        C, n, m = state
        largest = jnp.maximum(decay + m, log)
        kept, new = jnp.exp(decay + m - largest), jnp.exp(log - largest)
        C, n = kept * C + new * jnp.outer(k, v), kept * n + new * k
        return _divided(q @ C, q @ n, largest), (C, n, largest)

    def step(self, state, q, k, v, *, log, decay):
        out, state = self.update(state, q, k * q.shape[-1] ** -0.5, v, log, decay)
        return out, state

    def steps(self, state, q, k, v, *, log, decay):
        return self.scanned(state, q, k * q.shape[-1] ** -0.5, v, log, decay)

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, min(self.chunk, S)
        return Cost(flops=4 * S * H * (H + C), memory=S * max(C, H, H * H / C), state=H * H + H + 1)


def _divided(out, total, log):
    """out (..., H) / max(|total|, 1), both to be multiplied by exp(log) first."""
    least = jnp.exp(-jnp.clip(log, -LARGEST, LARGEST))
    return out / jnp.maximum(jnp.abs(total), least)[..., None]


def _long_and_longer(key, shape, dtype):
    """Biases of forget gates, one of each head: from one that forgets within some 20 positions to one of 400."""
    return jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)
