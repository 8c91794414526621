import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, at_queries, centred, unit
from xformers_lab.attention._engine.linear.gated import power_of_two
from xformers_lab.attention._engine.linear.low_rank import low_rank
from xformers_lab.attention.rwkv import mixed, shifted
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

# The strongest decay is exp(-exp(-1/2)), about 0.55 at each position.
STRONGEST = math.exp(-0.5)


class Rwkv7(Recurrent):
    """RWKV-7's time mixing (Peng et al., 2025, arXiv 2503.14456, section 4).

    S_t = (diag(w_t) - (a_t * c_t) c_t^T) S_(t-1) + k_t v_t^T, out_t = g_t * (norm(q_t S_t) + (q_t . (u * k_t)) v_t): a
    delta rule that removes under one key, c = r * k at unit length, and writes under another, k * (1 + s * (a - 1)),
    with a decay w_t in (0.55, 1) and a rate a_t in (0, 1) for every channel; r, s and u are learned, for every channel.

    w_t, a_t and the gate g_t are computed from the input through a narrow layer each.
    Deviations from the paper: the token shift mixes projected keys and values and the logits of w and a, where the
        paper mixes what they, q and g are projected from; values are not mixed with the first layer's; the norm has no
        bias; initial decays and shares are the first layer's on every layer.

    Options:
        shift: one: learned shares of each channel are those of the position before; none: as they are
        rank: width of the layers that decays, rates and gates pass
        chunk: positions whose corrections are solved for together, rounded up to a power of two
    """

    refuses: ClassVar = {**Recurrent.refuses, "map": "it adds a value of the position itself behind its norm"}
    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H + chunk) + T chunk^2)",
        memory="O(T (H + chunk))",
        decoding="one H x H matrix, and 4 H numbers for the shift",
    )

    def __init__(
        self,
        size: Size,
        *,
        shift: Literal["one", "none"] = "one",
        rank: int = 32,
        chunk: int = 32,
        rngs: nnx.Rngs,
    ):
        if chunk < 1 or rank < 1:
            raise Refused(f"chunk and rank must be at least 1, got {chunk} and {rank}")
        super().__init__(size, rngs=rngs)
        self.shift, self.rank, self.chunk, D = shift, rank, chunk, size.heads * size.head
        narrow = lambda: Linear(size.dim, rank, use_bias=False, dtype=size.dtype, rngs=rngs)
        wide = lambda **options: Linear(rank, D, dtype=size.dtype, rngs=rngs, **options)
        self.forget_down, self.strength_down, self.gate_down = narrow(), narrow(), narrow()
        self.forget, self.strength, self.gate = wide(bias_init=_slow_to_fast), wide(), wide(use_bias=False)
        per_head = lambda x: nnx.Param(jnp.broadcast_to(x, D).reshape(size.heads, size.head), decays=False)
        self.removal, self.replacement, self.bonus, self.scale = (per_head(x) for x in (0.85, 1.0, -0.04, 1.0))
        if shift == "one":
            at = jnp.arange(D) / D
            self.share_k, self.share_v = per_head(at**0.7), per_head(at**0.7)
            self.share_forget, self.share_strength = per_head(at**0.9), per_head(at**0.9)

    def per_head(self):
        names = ("removal", "replacement", "bonus", "scale")
        shares = ("share_k", "share_v", "share_forget", "share_strength") if self.shift == "one" else ()
        share = tuple(getattr(self, name)[...] for name in shares) or None
        return {name: getattr(self, name)[...] for name in names} | {"share": share}

    def from_keys(self, x):
        forget = self.forget(jnp.tanh(self.forget_down(x)))
        return {"forget": self.heads_of(forget), "strength": self.heads_of(self.strength(self.strength_down(x)))}

    def from_queries(self, x):
        return {"gate": self.heads_of(self.gate(jax.nn.sigmoid(self.gate_down(x))))}

    def finished(self, mean, *, gate):
        return mean * gate.astype(jnp.float32)

    def attend(self, q, k, v, *, valid=None, causal, forget, strength, removal, replacement, bonus, scale, share):
        keys = self._shifted(k, v, forget, strength, valid, share)
        return self._whole(self.forward, q, keys, valid, causal, removal, replacement, bonus, scale)

    def reference(self, q, k, v, *, valid=None, causal, forget, strength, removal, replacement, bonus, scale, share):
        keys = self._shifted(k, v, forget, strength, valid, share)
        return self._whole(self.by_definition, q, keys, valid, causal, removal, replacement, bonus, scale)

    def _shifted(self, k, v, forget, strength, valid, share):
        arrays = tuple(x.astype(jnp.float32) for x in (k, v, forget, strength))
        arrays = arrays if valid is None else tuple(jnp.where(valid[:, None], x, 0) for x in arrays)
        return shifted(arrays, share)

    def _whole(self, run, q, shifted, valid, causal, removal, replacement, bonus, scale):
        q, keys = q.astype(jnp.float32), _keys(shifted, removal, replacement)
        own_k, own_v = (at_queries(q, keys[name], valid) for name in ("k", "v"))
        return scale * centred(run(q, keys, valid, causal)) + _own(q, own_k, own_v, bonus)

    def scanned(self, state, q, k, v, read, written, decay):
        return low_rank(q, k, v, read, written, decay, chunk=self.chunk, state=state)

    def update(self, state, q, k, v, read, written, decay):
        state = jnp.exp(decay)[:, None] * state + jnp.outer(written, read @ state) + jnp.outer(k, v)
        return q @ state, state

    def init_state(self, length: int, dtype=jnp.float32):
        state = {"memory": self.start()}
        last = tuple(jnp.zeros(self.size.head, jnp.float32) for _ in range(4))
        return state | ({"last": last} if self.shift == "one" else {})

    def step(self, state, q, k, v, *, forget, strength, removal, replacement, bonus, scale, share):
        q, *arrays = (x.astype(jnp.float32) for x in (q, k, v, forget, strength))
        last = {} if share is None else {"last": tuple(arrays)}
        if share is not None:
            arrays = [mixed(*each) for each in zip(arrays, state["last"], share, strict=True)]
        keys = _keys(arrays, removal, replacement)
        out, memory = self.update(state["memory"], q, **keys)
        return scale * centred(out) + _own(q, keys["k"], keys["v"], bonus), {"memory": memory} | last

    def steps(self, state, q, k, v, *, forget, strength, removal, replacement, bonus, scale, share):
        q, *arrays = (x.astype(jnp.float32) for x in (q, k, v, forget, strength))
        last = {} if share is None else {"last": tuple(x[-1] for x in arrays)}
        keys = _keys(shifted(arrays, share, state.get("last")), removal, replacement)
        out, memory = self.scanned(state["memory"], q, **keys)
        return scale * centred(out) + _own(q, keys["k"], keys["v"], bonus), {"memory": memory} | last

    def cost(self, T: int, S: int) -> Cost:
        H, C = self.size.head, power_of_two(min(self.chunk, S))
        inverse = 2 * C * C // 3  # of a chunk's triangle, by halves
        narrow = 12 * self.rank * H  # what decays, rates and gates are computed from
        shift = 4 * H if self.shift == "one" else 0
        return Cost(flops=S * (H * (14 * C + 8 * H) + inverse + narrow), memory=S * max(C, 2 * H), state=H * H + shift)


def _slow_to_fast(key, shape, dtype):
    """Biases of decays' logits: channels from one that hardly forgets to one that does within some ten positions."""
    at = jnp.arange(shape[0]) / max(1, shape[0] - 1)
    return (5 * at**0.85 - 6.5).astype(dtype)


def _keys(arrays, removal, replacement):
    """What the recurrence reads of keys, values and logits, of all positions (S, H) or of one (H,)."""
    k, v, forget, strength = arrays
    rate, removed = jax.nn.sigmoid(strength), unit(k * removal)
    return {
        "k": k * (1 + replacement * (rate - 1)),
        "v": v,
        "read": -removed,
        "written": rate * removed,
        "decay": -STRONGEST * jax.nn.sigmoid(forget),
    }


def _own(q, k, v, bonus):
    """What the position itself adds beside the memory."""
    return (q * bonus * k).sum(-1, keepdims=True) * v
