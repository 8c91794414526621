import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import EPSILON, Recurrent, gate_of, interval_bias
from xformers_lab.attention._engine.linear.gated import scalar_decay
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Shared(Linear):
    """A projection to a few heads, each of which `copies` heads share: (..., D) -> (..., groups copies H)."""

    def __init__(self, size: Size, groups: int, copies: int, *, rngs: nnx.Rngs):
        super().__init__(size.dim, groups * size.head, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.groups, self.copies = groups, copies

    def __call__(self, inputs):
        y = super().__call__(inputs)
        heads = y.reshape(*y.shape[:-1], self.groups, -1)
        return jnp.repeat(heads, self.copies, -2).reshape(*y.shape[:-1], -1)


class Mamba2(Recurrent):
    """Mamba-2, the state space dual of linear attention (Dao and Gu, 2024, arXiv 2405.21060, section 5 and 7).

    S_t = exp(-A d_t) S_(t-1) + d_t k_t v_t^T, y_t = q_t S_t + D v_t, out_t = w rms(y_t * silu(W x_t)), where d_t =
    softplus(w' x_t + c) and q, k and v, each after silu, are the paper's C, B and x. Every head has a learned A > 0 and
    D and a v of its own; the heads of a group share q and k, and one root mean square.

    Deviations from the paper: no short convolution before the silu of q, k and v; values are as wide as the block, not
        twice that; the state is as wide as a head. kv_heads fewer than heads shares v too.

    Options:
        groups: how many different q and k there are, each for an equal share of the heads
        chunk: positions whose products are computed together
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(time="O(T H (H + chunk))", memory="O(T H + T H^2 / chunk)", decoding="one H x H matrix")

    def __init__(self, size: Size, *, groups: int = 1, chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        if groups < 1 or size.key_heads % groups:
            raise Refused(f"groups must divide the {size.key_heads} heads of values, got {groups}; 1 always does")
        super().__init__(size, rngs=rngs)
        N = size.heads
        self.query, self.key = (Shared(size, groups, heads // groups, rngs=rngs) for heads in (N, size.key_heads))
        self.gate, self.groups, self.chunk = gate_of(size, rngs), groups, chunk
        self.interval = Linear(size.dim, N, bias_init=interval_bias, dtype=size.dtype, rngs=rngs)
        self.rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (N,), minval=1.0, maxval=16.0)), decays=False)
        self.skip = nnx.Param(jnp.ones(N), decays=False)
        self.scale = nnx.Param(jnp.ones((N, size.head)), decays=False)

    def per_head(self):
        return {"rate": -jnp.exp(self.rate[...]), "skip": self.skip[...]}

    def from_keys(self, x):
        return {"interval": jax.nn.softplus(self.interval(x).astype(jnp.float32))}

    def from_queries(self, x):
        return {"gate": self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def summed(self, v):
        return jax.nn.silu(v)

    def finished(self, mean, *, gate):
        """Gated, then at unit root mean square over all channels of a group, times learned weights."""
        out = mean * jax.nn.silu(gate.astype(jnp.float32))
        of_group = out.reshape(*out.shape[:-2], self.groups, -1)
        of_group = of_group * jax.lax.rsqrt(jnp.square(of_group).mean(-1, keepdims=True) + EPSILON)
        return of_group.reshape(out.shape) * self.scale[...]

    def attend(self, q, k, v, *, valid=None, causal, rate, skip, interval):
        return self._mean(self.forward, q, k, v, valid, causal, rate, skip, interval)

    def reference(self, q, k, v, *, valid=None, causal, rate, skip, interval):
        return self._mean(self.by_definition, q, k, v, valid, causal, rate, skip, interval)

    def _mean(self, run, q, k, v, valid, causal, rate, skip, interval):
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        keys = {"k": k * interval[:, None].astype(k.dtype), "v": v, "decay": rate * interval}
        return run(q, keys, valid, causal) + skip * _at_queries(q, v, valid)

    def scanned(self, q, k, v, decay):
        return scalar_decay(q, k, v, decay, chunk=self.chunk)[0]

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay) * state + jnp.outer(k, v)
        return q @ state, state

    def step(self, state, q, k, v, *, rate, skip, interval):
        q, k = (jax.nn.silu(x.astype(jnp.float32)) for x in (q, k))
        out, state = self.update(state, q, k * interval, v, rate * interval)
        return out + skip * v, state

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, min(self.chunk, S)
        return Cost(flops=4 * S * H * (H + C), memory=S * max(C, H, H * H / C), state=H * H)


def _at_queries(q, v, valid):
    """The values at the queries' own positions (T, H), zeros where they are padding or before the first."""
    T, S = len(q), len(v)
    v = v if valid is None else jnp.where(valid[:, None], v, 0)
    return v[S - T :] if T <= S else jnp.pad(v, ((T - S, 0), (0, 0)))
