import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, rms
from xformers_lab.attention._engine.linear.gated import channel_decay, power_of_two, value_decay
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Gsa(Recurrent):
    """Gated slot attention (Zhang et al., 2024, arXiv 2409.07146, section 3).

    K_t = diag(a_t) K_(t-1) + (1 - a_t) k_t^T, V_t = diag(a_t) V_(t-1) + (1 - a_t) v_t^T, out_t = rms(silu(softmax(K_t
    q_t / sqrt(H)) V_t)), with q, k and v after silu: softmax attention over `slots` rows, each of which forgets what it
    holds by the share a_t = sigmoid(w x_t)^(1 / temperature) and takes as much of what is new.

    Deviations from the paper: heads are normalised without learned weights.

    Options:
        slots: rows that a head remembers of keys and of values
        temperature: the larger, the slower a slot forgets
        chunk: positions whose products are computed together, rounded up to a power of two
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T (H + slots) chunk + T H slots)",
        memory="O(T (H + slots + chunk))",
        decoding="two slots x H matrices",
    )

    def __init__(self, size: Size, *, slots: int = 64, temperature: float = 8.0, chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1 or slots < 1:
            raise Refused(f"chunk and slots must be at least 1, got {chunk} and {slots}")
        if temperature <= 0:
            raise Refused(f"temperature must be above 0, got {temperature:g}")
        super().__init__(size, rngs=rngs)
        self.slots, self.temperature, self.chunk = slots, temperature, chunk
        self.forget = Linear(size.dim, size.heads * slots, use_bias=False, dtype=size.dtype, rngs=rngs)

    def from_keys(self, x):
        forget = self.forget(x).reshape(*x.shape[:2], self.size.heads, self.slots)
        return {"decay": jax.nn.log_sigmoid(forget.astype(jnp.float32)) / self.temperature}

    def summed(self, v):
        return jax.nn.silu(v)

    def finished(self, mean):
        return rms(jax.nn.silu(mean))

    def attend(self, q, k, v, *, valid=None, causal, decay):
        return self.forward(_query(q), _keys(k, v, decay), valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, decay):
        return self.by_definition(_query(q), _keys(k, v, decay), valid, causal)

    def scanned(self, state, q, k, v, decay):
        new = -jnp.expm1(decay)
        scores, keys = value_decay(q, k, new, decay, chunk=self.chunk, state=state[0].T)
        out, values = channel_decay(jax.nn.softmax(scores), new, v, decay, chunk=self.chunk, state=state[1])
        return out, (keys.T, values)

    def start(self):
        rows = jnp.zeros((self.slots, self.size.head), jnp.float32)
        return rows, rows

    def update(self, state, q, k, v, decay):
        kept, new = jnp.exp(decay)[:, None], -jnp.expm1(decay)
        keys, values = (kept * rows + jnp.outer(new, x) for rows, x in zip(state, (k, v), strict=True))
        return jax.nn.softmax(keys @ q) @ values, (keys, values)

    def step(self, state, q, k, v, *, decay):
        return self.update(state, _query(q), **_keys(k, v, decay))

    def steps(self, state, q, k, v, *, decay):
        return self.scanned(state, _query(q), **_keys(k, v, decay))

    def cost(self, T: int, S: int) -> Cost:
        H, m, C = self.size.head, self.slots, power_of_two(min(self.chunk, S))
        flops = S * (C * (3 * H + 2 * m) + 8 * H * m + 2 * self.size.dim * m)  # the last: what slots forget
        return Cost(flops=flops, memory=S * max(C, H, m), state=2 * m * H)


def _query(q):
    return jax.nn.silu(q.astype(jnp.float32)) * q.shape[-1] ** -0.5


def _keys(k, v, decay):
    return {"k": jax.nn.silu(k.astype(jnp.float32)), "v": v, "decay": decay}
