import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import EPSILON, Recurrent, at_queries, gate_of, interval_bias
from xformers_lab.attention._engine.linear.gated import scalar_decay
from xformers_lab.attention.average import Same
from xformers_lab.errors import Refused
from xformers_lab.nn.initial_scale import scale_init
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
        twice that, unless expand says so; the state is as wide as a head. kv_heads fewer than heads shares v too.

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
        self.expand, self.chunk = expand, chunk
        self.interval = Linear(size.dim, N, bias_init=interval_bias, dtype=size.dtype, rngs=rngs)
        self.rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (N,), minval=1.0, maxval=16.0)), decays=False)
        self.skip = nnx.Param(jnp.ones(N), decays=False)
        self.scale = nnx.Param(jnp.ones((N, expand * size.head)), decays=False)
        linear = lambda *sizes: Linear(*sizes, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.more_value = linear(size.dim, size.key_heads * (expand - 1) * size.head) if expand > 1 else None
        self.inner_out = linear(N * expand * size.head, size.dim) if expand > 1 else None
        if expand > 1:
            self.out = Same()

    def refusals(self):
        wider = {"map": "its values are wider than the block"} if self.expand > 1 else {}
        return {**super().refusals(), **wider}

    def scale_init(self, share: float) -> None:
        super().scale_init(share)
        if self.more_value is not None and self.inner_out is not None:
            scale_init(share, self.more_value, self.inner_out)

    def per_head(self):
        return {"rate": -jnp.exp(self.rate[...]), "skip": self.skip[...]}

    def from_keys(self, x):
        more = None
        if self.more_value is not None:
            shape = (*x.shape[:2], self.size.key_heads, -1)
            more = jnp.repeat(self.more_value(x).reshape(shape), self.size.heads // self.size.key_heads, 2)
        return {"interval": jax.nn.softplus(self.interval(x).astype(jnp.float32)), "more_v": more}

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
        out = of_group.reshape(out.shape) * self.scale[...]
        if self.inner_out is None:
            return out
        return self.inner_out(out.reshape(*out.shape[:2], -1)).reshape(*out.shape[:3], -1)

    def attend(self, q, k, v, *, valid=None, causal, rate, skip, interval, more_v):
        return self._mean(self.forward, q, k, self._wide(v, more_v), valid, causal, rate, skip, interval)

    def reference(self, q, k, v, *, valid=None, causal, rate, skip, interval, more_v):
        return self._mean(self.by_definition, q, k, self._wide(v, more_v), valid, causal, rate, skip, interval)

    def _wide(self, v, more_v):
        """All channels of a head's values, (S, expand H) or of one position."""
        return v if more_v is None else jnp.concatenate([v, self.summed(more_v).astype(v.dtype)], -1)

    def _mean(self, run, q, k, v, valid, causal, rate, skip, interval):
        q, keys = self._asked(q, k, v, rate, interval)
        return run(q, keys, valid, causal) + skip * at_queries(q, v, valid)

    def _asked(self, q, k, v, rate, interval):
        """What the recurrence reads of queries and of keys."""
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        return q, {"k": k * interval[:, None].astype(k.dtype), "v": v, "decay": rate * interval}

    def scanned(self, state, q, k, v, decay):
        return scalar_decay(q, k, v, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay) * state + jnp.outer(k, v)
        return q @ state, state

    def start(self):
        return jnp.zeros((self.size.head, self.expand * self.size.head), jnp.float32)

    def step(self, state, q, k, v, *, rate, skip, interval, more_v):
        v = self._wide(v, more_v)
        q, k = (jax.nn.silu(x.astype(jnp.float32)) for x in (q, k))
        out, state = self.update(state, q, k * interval, v, rate * interval)
        return out + skip * v, state

    def steps(self, state, q, k, v, *, rate, skip, interval, more_v):
        q, keys = self._asked(q, k, self._wide(v, more_v), rate, interval)
        out, state = self.scanned(state, q, **keys)
        return out + skip * keys["v"], state

    def cost(self, T: int, S: int) -> Cost:
        H, C, E = self.size.head, min(self.chunk, S), self.expand
        flops = 2 * S * H * (C + E * (C + 2 * H))
        flops += 2 * S * H * H * self.size.heads * (2 * E - 1) if E > 1 else 0  # values beyond the block's, and back
        return Cost(flops=flops, memory=S * E * max(C / E, H, H * H / C), state=E * H * H)
