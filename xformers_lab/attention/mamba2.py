import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Cost
from xformers_lab.attention._engine.gated import scalar_decay
from xformers_lab.attention._recurrent import Recurrent, gate_of, gated
from xformers_lab.linear import Linear
from xformers_lab.size import Size


class Mamba2(Recurrent):
    """Mamba-2, the state space dual of linear attention (Dao and Gu, 2024, arXiv 2405.21060, section 5 and 7).

    S_t = exp(-A d_t) S_(t-1) + d_t k_t v_t^T, y_t = q_t S_t + D v_t, out_t = rms(y_t) * silu(W x_t), where d_t =
    softplus(w x_t + c): q, k and v are the paper's C, B and x, with a learned A > 0 and D for every head.
    Kind: linearised
    Time O(T H (H + chunk)); memory O(T H + T H^2 / chunk); decoding keeps one H x H matrix.
    Exact.
    One way: it reads from left to right, so it serves no encoder and no cross-attention
    Deviations from the paper: no short convolution before q, k and v; the state is as wide as a head.

    Options:
        chunk: positions whose products are computed together
    """

    def __init__(self, size: Size, *, chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.gate, self.chunk, N = gate_of(size, rngs), chunk, size.heads
        # Intervals start between a thousandth and a tenth, as the paper's do.
        start = jnp.exp(jax.random.uniform(rngs.params(), (N,), minval=jnp.log(1e-3), maxval=jnp.log(0.1)))
        inverse = lambda key, shape, dtype: jnp.log(jnp.expm1(start)).astype(dtype)
        self.interval = Linear(size.dim, N, bias_init=inverse, dtype=size.dtype, rngs=rngs)
        self.rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (N,), minval=1.0, maxval=16.0)))
        self.skip = nnx.Param(jnp.ones(N))

    def per_head(self):
        return {"rate": -jnp.exp(self.rate[...]), "skip": self.skip[...]}

    def from_keys(self, x):
        return {"interval": jax.nn.softplus(self.interval(x).astype(jnp.float32))}

    def from_queries(self, x):
        return {"gate": self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def attend(self, q, k, v, *, real=None, causal, rate, skip, interval, gate):
        out = self.forward(q, self._keys(k, v, rate, interval), real, causal)
        return gated(out + skip * _at_queries(q, v, real), gate, v.dtype)

    def reference(self, q, k, v, *, real=None, causal, rate, skip, interval, gate):
        out = self.by_definition(q, self._keys(k, v, rate, interval), real, causal)
        return gated(out + skip * _at_queries(q, v, real), gate, v.dtype)

    def _keys(self, k, v, rate, interval):
        return {"k": k * interval[:, None].astype(k.dtype), "v": v, "decay": rate * interval}

    def scanned(self, q, k, v, decay):
        return scalar_decay(q, k, v, decay, chunk=self.chunk)[0]

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay) * state + jnp.outer(k, v)
        return q @ state, state

    def step(self, state, q, k, v, *, rate, skip, interval, gate):
        out, state = self.update(state, q, k * interval, v, rate * interval)
        return gated(out + skip * v, gate, v.dtype), state

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, min(self.chunk, S)
        return Cost(flops=4 * S * H * (H + C), memory=S * max(C, H, H * H / C), state=H * H)


def _at_queries(q, v, real):
    """The values at the queries' own positions (T, H), zeros where they are padding or before the first."""
    T, S = len(q), len(v)
    v = v if real is None else jnp.where(real[:, None], v, 0)
    return v[S - T :] if T <= S else jnp.pad(v, ((T - S, 0), (0, 0)))
