import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.recurrent import interval_bias
from xformers_lab.attention._engine.linear.gated import delta_rule
from xformers_lab.attention.delta_net import DeltaNet, direction
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (Yang et al., 2024, arXiv 2412.06464, equation 10).

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t k_t S_(t-1))^T, out_t = silu(W x_t) * rms(q_t S_t): DeltaNet that also
    forgets, a_t = exp(-A softplus(w' x_t + c)) with a learned rate A > 0 for every head.

    Deviations from the paper: no short convolution before the silu of q, k and v; values are as wide as keys, where
        the paper's are twice as wide; heads are normalised without learned weights.

    Options:
        chunk: positions whose corrections are solved for together
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk) + T chunk^2)",
        memory="O(T (H + chunk))",
        decoding="one H x H matrix",
    )

    def __init__(self, size: Size, *, chunk: int = 64, rngs: nnx.Rngs):
        super().__init__(size, gate="silu", chunk=chunk, rngs=rngs)
        self.forget = Linear(size.dim, size.heads, bias_init=interval_bias, dtype=size.dtype, rngs=rngs)
        # Even up to 16, but never 0, whose logarithm no gradient would move.
        self.rate = nnx.Param(
            jnp.log(jax.random.uniform(rngs.params(), (size.heads,), minval=1e-3, maxval=16.0)), decays=False
        )

    def from_keys(self, x):
        fade = jax.nn.softplus(self.forget(x).astype(jnp.float32))
        return super().from_keys(x) | {"decay": -jnp.exp(self.rate[...]) * fade}

    def attend(self, q, k, v, *, valid=None, causal, beta, decay):
        keys = {"k": direction(k), "v": v, "beta": beta, "decay": decay}
        return self.forward(direction(q), keys, valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, beta, decay):
        keys = {"k": direction(k), "v": v, "beta": beta, "decay": decay}
        return self.by_definition(direction(q), keys, valid, causal)

    def scanned(self, state, q, k, v, beta, decay):
        return delta_rule(q, k, v, beta, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, beta, decay):
        return super().update(jnp.exp(decay) * state, q, k, v, beta)

    def step(self, state, q, k, v, *, beta, decay):
        return self.update(state, direction(q), direction(k), v, beta, decay)

    def steps(self, state, q, k, v, *, beta, decay):
        return self.scanned(state, direction(q), direction(k), v, beta, decay)
