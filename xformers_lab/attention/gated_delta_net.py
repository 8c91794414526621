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

    Deviations from the paper: the short convolution before the silu of q, k and v is the model's conv=4; values are as
        wide as keys unless expand says so, where the paper's are twice as wide; heads are normalised without learned
        weights unless gain says so.

    Options:
        gain: whether normalised heads are multiplied by learned weights of their channels, the same in all heads
        expand: channels of the values, and of what the gate multiplies, for each of the block's; 2 in the paper
        chunk: positions whose corrections are solved for together
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk) + T chunk^2)",
        memory="O(T (H + chunk))",
        decoding="one H x expand H matrix",
    )

    def __init__(self, size: Size, *, gain: bool = False, expand: int = 1, chunk: int = 64, rngs: nnx.Rngs):
        super().__init__(size, gate="silu", gain=gain, expand=expand, chunk=chunk, rngs=rngs)
        self.forget = Linear(size.dim, size.heads, bias_init=interval_bias, dtype=size.dtype, rngs=rngs)
        # Even up to 16, but never 0, whose logarithm no gradient would move.
        self.rate = nnx.Param(
            jnp.log(jax.random.uniform(rngs.params(), (size.heads,), minval=1e-3, maxval=16.0)), decays=False
        )

    def from_keys(self, x):
        fade = jax.nn.softplus(self.forget(x).astype(jnp.float32))
        return super().from_keys(x) | {"decay": -jnp.exp(self.rate[...]) * fade}

    def attend(self, q, k, v, *, valid=None, causal, beta, decay, more_v):
        return self.forward(*self.asked(q, k, v, beta, decay, more_v), valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, beta, decay, more_v):
        return self.by_definition(*self.asked(q, k, v, beta, decay, more_v), valid, causal)

    def asked(self, q, k, v, beta, decay, more_v):
        """What the recurrence reads of queries and of keys, of all positions or of one."""
        return direction(q), {"k": direction(k), "v": self.wide(v, more_v), "beta": beta, "decay": decay}

    def scanned(self, state, q, k, v, beta, decay):
        return delta_rule(q, k, v, beta, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, beta, decay):
        return super().update(jnp.exp(decay) * state, q, k, v, beta)

    def step(self, state, q, k, v, *, beta, decay, more_v):
        q, keys = self.asked(q, k, v, beta, decay, more_v)
        return self.update(state, q, **keys)

    def steps(self, state, q, k, v, *, beta, decay, more_v):
        q, keys = self.asked(q, k, v, beta, decay, more_v)
        return self.scanned(state, q, **keys)
