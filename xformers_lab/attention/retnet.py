from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Widened, gate_of, gated
from xformers_lab.attention._engine.linear.gated import scalar_decay
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Retnet(Widened):
    """Retention (Sun et al., 2023, arXiv 2307.08621, equations 5 to 8).

    S_t = g S_(t-1) + k_t v_t^T, out_t = silu(W x_t) * rms(q_t S_t / sqrt(H)); every head has a g of its own.

    Deviations from the paper: values are as wide as keys unless expand says so, where the paper's are twice as wide;
        rotation by position is the model's position=rope; heads are normalised by their root mean square.

    Options:
        chunk: positions whose products are computed together
        slowest: g of the head that forgets least is 1 - 1 / slowest
        fastest: g of the head that forgets most is 1 - 1 / fastest
        expand: channels of the values, and of what the gate multiplies, for each of the block's; 2 in the paper
        gain: whether normalised heads are multiplied by learned weights of their channels, the same in all heads
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk))", memory="O(T H + T H^2 / chunk)", decoding="one H x expand H matrix"
    )
    later_options: ClassVar = ("expand", "gain")

    def __init__(
        self,
        size: Size,
        *,
        chunk: int = 64,
        slowest: float = 512.0,
        fastest: float = 32.0,
        expand: int = 1,
        gain: bool = False,
        rngs: nnx.Rngs,
    ):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        if not 1 < fastest <= slowest:
            raise Refused(f"fastest must be above 1 and at most slowest, got {fastest} and {slowest}")
        if expand < 1:
            raise Refused(f"expand must be at least 1, got {expand}")
        super().__init__(size, rngs=rngs)
        width = expand * size.head
        self.gate = gate_of(size, rngs, numbers=width)
        self.gain = nnx.Param(jnp.ones(width), decays=False) if gain else None
        self.chunk, self.slowest, self.fastest = chunk, slowest, fastest
        self.widen(expand, rngs)

    def per_head(self):
        span = jnp.exp(jnp.linspace(jnp.log(self.fastest), jnp.log(self.slowest), self.size.heads))
        return {"decay": jnp.log1p(-1 / span)}

    def from_keys(self, x):
        return {"more_v": self.more_values(x)}

    def from_queries(self, x):
        return {"gate": self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def finished(self, mean, *, gate):
        out = gated(mean, gate)
        return self.narrowed(out if self.gain is None else out * self.gain[...])

    def attend(self, q, k, v, *, valid=None, causal, decay, more_v):
        return self.forward(q, self._keys(q, k, v, decay, more_v), valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, decay, more_v):
        return self.by_definition(q, self._keys(q, k, v, decay, more_v), valid, causal)

    def _keys(self, q, k, v, decay, more_v):
        return {"k": k * q.shape[-1] ** -0.5, "v": self.wide(v, more_v), "decay": jnp.full(len(k), decay)}

    def scanned(self, state, q, k, v, decay):
        return scalar_decay(q, k, v, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay) * state + jnp.outer(k, v)
        return q @ state, state

    def step(self, state, q, k, v, *, decay, more_v):
        return self.update(state, q, k * q.shape[-1] ** -0.5, self.wide(v, more_v), decay)

    def steps(self, state, q, k, v, *, decay, more_v):
        return self.scanned(state, q, **self._keys(q, k, v, decay, more_v))

    def cost(self, T: int, S: int) -> Cost:
        H, C, E = self.size.head, min(self.chunk, S), self.expand
        flops = 2 * S * H * (C + E * (C + 2 * H)) + self.flops_of_width(S)
        return Cost(flops=flops, memory=S * E * max(C / E, H, H * H / C), state=E * H * H)
