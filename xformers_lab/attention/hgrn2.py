import math

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, rms
from xformers_lab.attention._engine.linear.gated import channel_decay, power_of_two
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Hgrn2(Recurrent):
    """HGRN2, a gated linear recurrence whose state is widened by an outer product (Qin et al., 2024, arXiv 2404.07904,
    section 3).

    S_t = diag(f_t) S_(t-1) + (1 - f_t) v_t^T, out_t = rms(silu(q_t) S_t): what a channel forgets is what it writes, f_t
    = b + (1 - b) sigmoid(k_t), with a learned lower bound b of every channel.

    Keys are logits of forget gates, so there is nothing that a position could turn.
    Deviations from the paper: a layer does not know how deep it lies, so all layers start from one bound, which is then
        learned freely, where the paper's start at 0 in the first layer and grow from layer to layer; heads are
        normalised without learned weights.

    Options:
        bound: the lower bound of forget gates at the start; 0: none, and none is learned
        chunk: positions whose products are computed together, rounded up to a power of two
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(time="O(T H (H + chunk))", memory="O(T (H + chunk))", decoding="one H x H matrix")

    def __init__(self, size: Size, *, bound: float = 0.5, chunk: int = 64, rngs: nnx.Rngs):
        if not 0 <= bound < 1:
            raise Refused(f"bound must be at least 0 and below 1, got {bound:g}")
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.chunk, shape = chunk, (size.heads, size.head)
        self.bound = nnx.Param(jnp.full(shape, math.log(bound / (1 - bound))), decays=False) if bound else None

    def turns(self) -> bool:
        return False

    def per_head(self):
        return {"bound": None if self.bound is None else self.bound[...]}

    def finished(self, mean):
        return rms(mean)

    def attend(self, q, k, v, *, valid=None, causal, bound):
        return self.forward(_silu(q), _keys(k, v, bound), valid, causal)

    def reference(self, q, k, v, *, valid=None, causal, bound):
        return self.by_definition(_silu(q), _keys(k, v, bound), valid, causal)

    def scanned(self, state, q, k, v, decay):
        return channel_decay(q, k, v, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, decay):
        state = jnp.exp(decay)[:, None] * state + jnp.outer(k, v)
        return q @ state, state

    def step(self, state, q, k, v, *, bound):
        return self.update(state, _silu(q), **_keys(k, v, bound))

    def steps(self, state, q, k, v, *, bound):
        return self.scanned(state, _silu(q), **_keys(k, v, bound))

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, power_of_two(min(self.chunk, S))
        return Cost(flops=4 * S * H * (H + C), memory=S * max(C, H), state=H * H)


def _silu(q):
    return jax.nn.silu(q.astype(jnp.float32))


def _keys(k, v, bound):
    """What the recurrence reads, of all positions (S, H) or of one, from the logits k of gates and those of bounds."""
    k = k.astype(jnp.float32)
    decay, written = jax.nn.log_sigmoid(k), jax.nn.sigmoid(-k)
    if bound is not None:
        decay = jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + decay)
        written = jax.nn.sigmoid(-bound) * written
    return {"k": written, "v": v, "decay": decay}
