import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, gate_of, gated
from xformers_lab.attention._engine.linear.gated import scalar_decay
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Retnet(Recurrent):
    """Retention (Sun et al., 2023, arXiv 2307.08621, equations 5 to 8).

    S_t = g S_(t-1) + k_t v_t^T, out_t = silu(W x_t) * rms(q_t S_t / sqrt(H)); every head has a g of its own.

    Deviations from the paper: values are as wide as keys, where the paper's are twice as wide; rotation by position is
        the model's position=rope; heads are normalised by their root mean square.

    Options:
        chunk: positions whose products are computed together
        slowest: g of the head that forgets least is 1 - 1 / slowest
        fastest: g of the head that forgets most is 1 - 1 / fastest
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(time="O(T H (H + chunk))", memory="O(T H + T H^2 / chunk)", decoding="one H x H matrix")

    def __init__(self, size: Size, *, chunk: int = 64, slowest: float = 512.0, fastest: float = 32.0, rngs: nnx.Rngs):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        if not 1 < fastest <= slowest:
            raise Refused(f"fastest must be above 1 and at most slowest, got {fastest} and {slowest}")
        super().__init__(size, rngs=rngs)
        self.gate = gate_of(size, rngs)
        self.chunk, self.slowest, self.fastest = chunk, slowest, fastest

    def per_head(self):
        span = jnp.exp(jnp.linspace(jnp.log(self.fastest), jnp.log(self.slowest), self.size.heads))
        return {"decay": jnp.log1p(-1 / span)}

    def from_queries(self, x):
        return {"gate": self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def finished(self, mean, *, gate):
        return gated(mean, gate)

    def attend(self, q, k, v, *, valid=None, causal, decay):
        return self.forward(q, self._keys(q, k, v, decay), valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, decay):
        return self.by_definition(q, self._keys(q, k, v, decay), valid, causal)

    def _keys(self, q, k, v, decay):
        return {"k": k * q.shape[-1] ** -0.5, "v": v, "decay": jnp.full(len(k), decay)}

    def scanned(self, state, q, k, v, decay):
        return scalar_decay(q, k, v, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay) * state + jnp.outer(k, v)
        return q @ state, state

    def step(self, state, q, k, v, *, decay):
        out, state = self.update(state, q, k * q.shape[-1] ** -0.5, v, decay)
        return out, state

    def steps(self, state, q, k, v, *, decay):
        return self.scanned(state, q, **self._keys(q, k, v, decay))

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, min(self.chunk, S)
        return Cost(flops=4 * S * H * (H + C), memory=S * max(C, H, H * H / C), state=H * H)
