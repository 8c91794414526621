from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead, why_not
from xformers_lab.attention._base.recurrent import Recurrent, interval_bias
from xformers_lab.attention._base.refusals import why_not_one_way
from xformers_lab.attention._engine.linear.selective import by_definition, one_more, selective_scan
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Absent, Same
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.short_conv import ShortConv
from xformers_lab.nn.size import Size


class Mamba(MultiHead):
    """Mamba, a selective state space (Gu and Dao, 2023, arXiv 2312.00752, section 3).

    u_t = silu(conv(W x)_t), s_t = exp(d_t A) * s_(t-1) + (d_t u_t) b_t^T, y_t = s_t c_t + D * u_t, out_t = W' (y_t *
    silu(V x_t)): every channel of an inner width has `state` numbers that decay at learned rates A < 0, in intervals
    d_t = softplus(R r_t + e) that the input sets; r_t, b_t and c_t are linear in u_t.

    Decays are those of a zero-order hold, what is written is d_t b_t, as in the paper's own code. Padding neither
    writes nor forgets.
    Deviations from the paper: none; it has no heads, so heads and kv_heads change nothing.

    Options:
        expand: inner channels, for each of D
        conv: positions that the convolution in front of the recurrence sees; 0: none
        state: numbers that each inner channel remembers
        rank: width that intervals are computed from; none: D / 16, rounded up
        chunk: positions whose states exist at the same time
    """

    refuses: ClassVar = {
        **Recurrent.refuses,
        "bias": "it has no scores",
        "map": "every inner channel has weights of its own",
    }
    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T D (D + state))",
        memory="O(T D + chunk D state)",
        decoding="state and conv - 1 numbers of every inner channel, for all heads",
        time_note=" for all heads, a loop of T / chunk turns",
        memory_note=" for all heads",
    )
    keeps_keys = False

    def __init__(
        self,
        size: Size,
        *,
        expand: int = 2,
        conv: int = 4,
        state: int = 16,
        rank: int | None = None,
        chunk: int = 32,
        rngs: nnx.Rngs,
    ):
        rank = -(-size.dim // 16) if rank is None else rank
        if min(expand, state, rank, chunk) < 1:
            raise Refused(f"expand, state, rank and chunk must be at least 1, got {expand}, {state}, {rank}, {chunk}")
        super().__init__(size, rngs=rngs)
        self.query, self.out = Absent(size.dim, size.dtype), Same()
        self.key, self.value = (Absent(size.key_heads * size.head, size.dtype) for _ in range(2))
        self.inner, self.rank, self.state, self.chunk = expand * size.dim, rank, state, chunk
        linear = lambda *sizes, **options: Linear(*sizes, use_bias=False, dtype=size.dtype, rngs=rngs, **options)
        self.inner_value, self.gate = (linear(size.dim, self.inner) for _ in range(2))
        start = lambda *args: nnx.initializers.uniform(2 * conv**-0.5)(*args) - conv**-0.5
        self.conv = ShortConv(self.inner, conv, kernel_init=start, rngs=rngs) if conv else None
        self.conv_bias = nnx.Param(jnp.zeros(self.inner), decays=False) if conv else None
        self.select = linear(self.inner, rank + 2 * state)
        self.interval = Linear(rank, self.inner, bias_init=interval_bias, dtype=size.dtype, rngs=rngs)
        rates = jnp.log(jnp.arange(1.0, state + 1))
        self.rate = nnx.Param(jnp.broadcast_to(rates, (self.inner, state)), decays=False)
        self.skip = nnx.Param(jnp.ones(self.inner), decays=False)
        self.inner_out = linear(self.inner, size.dim)

    def scale_init(self, share: float) -> None:
        scale_init(share, self.inner_value, self.inner_out)

    def attend_heads(self, call: Call):
        if not call.causal:
            raise Refused(why_not_one_way(type(self)))
        if call.bias is not None:
            raise Refused(why_not(self, "bias"))
        assert call.x is not None
        wide, valid = self.inner_value(call.x), call.valid
        u = self._activated(wide if self.conv is None else self.conv(wide, valid=valid))
        u = u if valid is None else jnp.where(valid[..., None], u, 0)
        interval, b, c = self._selected(u)
        interval = interval if valid is None else jnp.where(valid[..., None], interval, 0)
        arrays = (u.astype(jnp.float32), interval, b, c, -jnp.exp(self.rate[...]))
        y = by_definition(*arrays) if call.method == "reference" else selective_scan(*arrays, chunk=self.chunk)[0]
        y += self.skip[...] * u
        T, S = call.q.shape[1], y.shape[1]
        y = jnp.pad(y[:, max(S - T, 0) :], ((0, 0), (max(T - S, 0), 0), (0, 0)))
        return self._finished(y, call.queries_input).astype(call.v.dtype).reshape(call.q.shape), call.carry, Aux()

    def decode_heads(self, cache, call: Call):
        if call.bias is not None:
            raise Refused(why_not(self, "bias"))
        assert call.x is not None
        y, cache = self.inner_value(call.x), dict(cache)
        if self.conv is not None:
            y, cache["tail"] = self.conv.step(cache["tail"], y)
        u = self._activated(y)
        arrays = (u.astype(jnp.float32), *self._selected(u))
        cache["state"], y = one_more(cache["state"], *arrays, rate=-jnp.exp(self.rate[...]))
        out = self._finished(y + self.skip[...] * u, call.x).astype(call.v.dtype)
        return out.reshape(call.q.shape), cache, call.carry

    def decode_heads_several(self, cache, call: Call):
        if call.bias is not None:
            raise Refused(why_not(self, "bias"))
        assert call.x is not None
        y, cache = self.inner_value(call.x), dict(cache)
        if self.conv is not None:
            y, cache["tail"] = self.conv.step_several(cache["tail"], y)
        u = self._activated(y)
        arrays = (u.astype(jnp.float32), *self._selected(u), -jnp.exp(self.rate[...]))
        y, cache["state"] = selective_scan(*arrays, chunk=self.chunk, state=cache["state"])
        out = self._finished(y + self.skip[...] * u, call.x).astype(call.v.dtype)
        return out.reshape(call.q.shape), cache

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        tail = {} if self.conv is None else {"tail": self.conv.init_tail(B, dtype)}
        return {"state": jnp.zeros((B, self.inner, self.state), jnp.float32)} | tail

    def _activated(self, y):
        bias = 0 if self.conv_bias is None else self.conv_bias[...].astype(y.dtype)
        return jax.nn.silu(y + bias)

    def _selected(self, u):
        """u (..., I) -> intervals (..., I), b and c (..., state), in float32."""
        low, b, c = jnp.split(self.select(u), [self.rank, self.rank + self.state], -1)
        interval = jax.nn.softplus(self.interval(low).astype(jnp.float32))
        return interval, b.astype(jnp.float32), c.astype(jnp.float32)

    def _finished(self, y, x):
        """y (..., I), gated by the input at its positions, back in the width of the model."""
        gate = self.gate(x)
        return self.inner_out((y * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype))

    def cost(self, T: int, S: int) -> Cost:
        D, I, N, n = self.size.dim, self.inner, self.size.heads, self.state
        flops = 2 * I * (S * (D + 2 * self.rank + 2 * n) + 2 * T * D)
        tail = 0 if self.conv is None else self.conv.before * I
        return Cost(flops=flops / N, memory=max(S, min(self.chunk, S) * n) * I / N, state=(I * n + tail) / N)
