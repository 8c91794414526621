import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import EPSILON, Widened, at_queries, gate_of, interval_bias
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


class Mamba2(Widened):
    """Mamba-2, the state space dual of linear attention (Dao and Gu, 2024, arXiv 2405.21060, section 5 and 7).

    S_t = exp(-A d_t) S_(t-1) + d_t k_t v_t^T, y_t = q_t S_t + D v_t, out_t = w rms(y_t * silu(W x_t)), where d_t =
    softplus(w' x_t + c) and q, k and v, each after silu, are the paper's C, B and x. Every head has a learned A > 0 and
    D and a v of its own; the heads of a group share q and k, and one root mean square.

    Deviations from the paper: the short convolution before the silu of q, k and v is the model's conv=4; values are as
        wide as the block, not twice that, unless expand says so; the state is as wide as a head. kv_heads fewer than
        heads shares v too.

    Options:
        groups: how many different q and k there are, each for an equal share of the heads
        expand: channels of the values, and of what the gate multiplies, for each of the block's; 2 in the paper
        chunk: positions whose products are computed together
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk))", memory="O(T H + T H^2 / chunk)", decoding="one H x expand H matrix"
    )

    def __init__(self, size: Size, *, groups: int = 1, expand: int = 1, chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        if expand < 1:
            raise Refused(f"expand must be at least 1, got {expand}")
        if groups < 1 or size.key_heads % groups:
            raise Refused(f"groups must divide the {size.key_heads} heads of values, got {groups}; 1 always does")
        super().__init__(size, rngs=rngs)
        N = size.heads
        self.query, self.key = (Shared(size, groups, heads // groups, rngs=rngs) for heads in (N, size.key_heads))
        self.gate, self.groups = gate_of(size, rngs, numbers=expand * size.head), groups
        self.chunk = chunk
        self.interval = Linear(size.dim, N, bias_init=interval_bias, dtype=size.dtype, rngs=rngs)
        self.rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (N,), minval=1.0, maxval=16.0)), decays=False)
        self.skip = nnx.Param(jnp.ones(N), decays=False)
        self.scale = nnx.Param(jnp.ones((N, expand * size.head)), decays=False)
        self.widen(expand, rngs)

    def per_head(self):
        return {"rate": -jnp.exp(self.rate[...]), "skip": self.skip[...]}

    def from_keys(self, x):
        interval = jax.nn.softplus(self.interval(x).astype(jnp.float32))
        return {"interval": interval, "more_v": self.more_values(x)}

    def from_queries(self, x):
        return {"gate": self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def summed(self, v):
        return jax.nn.silu(v)

    def finished(self, mean, *, gate):
        """Gated, then at unit root mean square over all channels of a group, times learned weights; wider values are
        brought back to the width of the block."""
        out = mean * jax.nn.silu(gate.astype(jnp.float32))
        of_group = out.reshape(*out.shape[:-2], self.groups, -1)
        of_group = of_group * jax.lax.rsqrt(jnp.square(of_group).mean(-1, keepdims=True) + EPSILON)
        return self.narrowed(of_group.reshape(out.shape) * self.scale[...])

    def attend(self, q, k, v, *, valid=None, causal, rate, skip, interval, more_v):
        q, keys = self.asked(q, k, v, rate, interval, more_v)
        return self.forward(q, keys, valid, causal) + self.beside(q, keys["v"], valid, skip)

    def reference(self, q, k, v, *, valid=None, causal, rate, skip, interval, more_v):
        q, keys = self.asked(q, k, v, rate, interval, more_v)
        return self.by_definition(q, keys, valid, causal) + self.beside(q, keys["v"], valid, skip)

    def asked(self, q, k, v, rate, interval, more_v):
        """What the recurrence reads of queries and of keys, of all positions or of one."""
        q, k, v = jax.nn.silu(q), jax.nn.silu(k), self.wide(v, more_v)
        return q, {"k": k * interval[..., None].astype(k.dtype), "v": v, "decay": rate * interval}

    def beside(self, q, v, valid, skip):
        """What is added to the recurrence: the values at the positions of queries q."""
        return skip * at_queries(q, v, valid)

    def scanned(self, state, q, k, v, decay):
        return scalar_decay(q, k, v, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay) * state + jnp.outer(k, v)
        return q @ state, state

    def step(self, state, q, k, v, *, rate, skip, interval, more_v):
        q, keys = self.asked(q.astype(jnp.float32), k.astype(jnp.float32), v, rate, interval, more_v)
        out, state = self.update(state, q, **keys)
        return out + skip * keys["v"], state

    def steps(self, state, q, k, v, *, rate, skip, interval, more_v):
        q, keys = self.asked(q, k, v, rate, interval, more_v)
        out, state = self.scanned(state, q, **keys)
        return out + skip * keys["v"], state

    def cost(self, T: int, S: int) -> Cost:
        H, C, E = self.size.head, min(self.chunk, S), self.expand
        flops = 2 * S * H * (C + E * (C + 2 * H))
        flops += self.flops_of_width(S)
        return Cost(flops=flops, memory=S * E * max(C / E, H, H * H / C), state=E * H * H)
