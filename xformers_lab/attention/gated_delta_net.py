import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._engine.gated import delta_rule
from xformers_lab.attention._recurrent import gated
from xformers_lab.attention.delta_net import DeltaNet, direction
from xformers_lab.linear import Linear
from xformers_lab.size import Size


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (Yang et al., 2024, arXiv 2412.06464, equation 10).

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t k_t S_(t-1))^T, out_t = silu(W x_t) * rms(q_t S_t): DeltaNet that also
    forgets, a_t = exp(-A softplus(w' x_t + c)) with a learned rate A > 0 for every head.
    Kind: linearised
    Time O(T H (H + chunk) + T chunk^2); memory O(T (H + chunk)); decoding keeps one H x H matrix.
    Exact.
    One way: it reads from left to right, so it serves no encoder and no cross-attention
    Deviations from the paper: no short convolution before q, k and v.

    Options:
        chunk: positions whose corrections are solved for together
    """

    def __init__(self, size: Size, *, chunk: int = 64, rngs: nnx.Rngs):
        super().__init__(size, chunk=chunk, rngs=rngs)
        self.forget = Linear(size.dim, size.heads, dtype=size.dtype, rngs=rngs)
        self.rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (size.heads,), minval=0.05, maxval=1.0)))

    def from_keys(self, x):
        fade = jax.nn.softplus(self.forget(x).astype(jnp.float32))
        return super().from_keys(x) | {"decay": -jnp.exp(self.rate[...]) * fade}

    def attend(self, q, k, v, *, real=None, causal, beta, decay, gate):
        keys = {"k": direction(k), "v": v, "beta": beta, "decay": decay}
        return gated(self.forward(direction(q), keys, real, causal), gate, v.dtype)

    def reference(self, q, k, v, *, real=None, causal, beta, decay, gate):
        keys = {"k": direction(k), "v": v, "beta": beta, "decay": decay}
        return gated(self.by_definition(direction(q), keys, real, causal), gate, v.dtype)

    def scanned(self, q, k, v, beta, decay):
        return delta_rule(q, k, v, beta, decay, chunk=self.chunk)[0]

    def update(self, state, q, k, v, beta, decay):
        return super().update(jnp.exp(decay) * state, q, k, v, beta)

    def step(self, state, q, k, v, *, beta, decay, gate):
        out, state = self.update(state, direction(q), direction(k), v, beta, decay)
        return gated(out, gate, v.dtype), state
