from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent
from xformers_lab.attention._engine.blocks import in_blocks
from xformers_lab.attention._engine.linear.gated import aligned
from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.nn.token_shift import TokenShift


class Rwkv(Recurrent):
    """RWKV-4's time mixing (Peng et al., 2023, arXiv 2305.13048, section 3).

    out_t = sigmoid(q_t) * (sum_(s < t) exp(k_s - (t - 1 - s) w) v_s + exp(k_t + u) v_t) / (the sum of the weights),
    channel by channel, with a learned decay w > 0 and a learned bonus u of the position itself for every channel.

    Sums are kept relative to their largest weight, so no key overflows. Padding neither counts nor fades.
    With shift=input k, v and q are projected from mixes m x_t + (1 - m) x_(t-1) of the layer's inputs x, with a learned
    m (D) each, whose first values go by the layer, as in the paper; of which ffn=rwkv is the other half. Decoding then
    keeps one input of every layer beside the sums.
    Deviations from the paper: with shift=one, the default, the token shift mixes projected keys and values, with the
        first layer's initial shares on every layer; initial decays are the first layer's on every layer.

    Options:
        shift: one: learned shares of each channel of k and v are those of the position before; input: of what k, v and
            q are projected from; none: as they are
        chunk: positions that one turn of the loop within all chunks, or one between them, passes
    """

    refuses: ClassVar = {**Recurrent.refuses, "map": "every channel has weights of its own"}
    kind = "without attention"
    exact = True
    complexity = Complexity(
        time="O(T H)",
        memory="O(T H)",
        decoding="5 H numbers, 3 H without shift, or with one of inputs, of which a layer keeps D",
        time_note=", a loop of max(chunk, T / chunk) turns",
    )

    def __init__(self, size: Size, *, shift: Literal["one", "input", "none"] = "one", chunk: int = 64, rngs: nnx.Rngs):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.shift, self.chunk, D = shift, chunk, size.heads * size.head
        per_head = lambda x: nnx.Param(x.reshape(size.heads, size.head).astype(jnp.float32), decays=False)
        at = jnp.arange(D) / max(1, D - 1)
        self.decay = per_head(8 * at**0.7 - 5)
        self.bonus = per_head(jnp.log(0.3) + 0.5 * ((jnp.arange(D) + 1) % 3 - 1))
        if shift == "input":
            self.token_shift = TokenShift(size, {"query": (0.5, 0), "key": (1, 0), "value": (1, 0.3)})
        if shift == "one":
            self.share_k, self.share_v = per_head(jnp.arange(D) / D), per_head(jnp.arange(D) / D)

    def per_head(self):
        share = (self.share_k[...], self.share_v[...]) if self.shift == "one" else None
        return {"decay": jnp.exp(self.decay[...]), "bonus": self.bonus[...], "share": share}

    def attend(self, q, k, v, *, valid=None, causal, decay, bonus, share):
        self.one_way(causal)

        def forward(wide, decay, bonus, share):
            q, k, v = wide

            def run(q, k, v, there):
                k, v = shifted((k, v), share)
                return jax.nn.sigmoid(q) * self._means(self._empty(), k, v, there, decay, bonus)[0]

            return aligned(run, q, {"k": k, "v": v, "there": jnp.ones(len(k))}, valid)

        wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
        return jax.checkpoint(forward)(wide, decay, bonus, share).astype(v.dtype)

    def _empty(self):
        """The sums of no key."""
        none = jnp.zeros(self.size.head, jnp.float32)
        return none, none, jnp.full_like(none, MASKED)

    def _means(self, sums, k, v, there, decay, bonus):
        """The weighted means (S, H) of what every position sees, behind the sums before the first, and the sums behind
        the last; there (S,): 1, or 0 where it is padding."""
        S, C = len(k), min(self.chunk, len(k))
        k, v, there = (in_blocks(x, C) for x in (k, v, there[:, None]))
        passed = jnp.cumsum(there, 1)
        none = jnp.zeros_like(k[:, 0])

        def along(state, new):
            k, v, there = new
            return _merged(_faded(state, decay * there), _one(k, v, there)), state

        turns = tuple(x.swapaxes(0, 1) for x in (k, v, there))
        ends, inside = lax.scan(along, (none, none, jnp.full_like(none, MASKED)), turns)

        def between(state, new):
            end, passed = new
            return _merged(_faded(state, decay * passed), end), state

        sums, before = lax.scan(between, sums, (ends, passed[:, -1]))
        before = _faded(tuple(x[:, None] for x in before), decay * (passed - there))
        seen = _merged(before, tuple(x.swapaxes(0, 1) for x in inside))
        return _mean(_merged(seen, _one(k + bonus, v, there))).reshape(-1, k.shape[-1])[:S], sums

    def reference(self, q, k, v, *, valid=None, causal, decay, bonus, share):
        self.one_way(causal)
        T, S = len(q), len(k)
        valid = jnp.ones(S, bool) if valid is None else valid
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        k, v = shifted(tuple(jnp.where(valid[:, None], x, 0) for x in (k, v)), share)
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        number = jnp.cumsum(valid)
        apart = number[jnp.maximum(at - 1, 0)] - number  # valid keys behind s and before t
        logs = jnp.where((keys == at)[..., None], k + bonus, k - decay * apart[..., None])  # (T, S, H)
        seen = ((keys <= at) & valid)[..., None]
        logs = jnp.where(seen, logs, MASKED)
        weights = jnp.exp(logs - logs.max(1, keepdims=True)) * seen
        total = weights.sum(1)
        return (jax.nn.sigmoid(q) * (weights * v).sum(1) / jnp.where(total > 0, total, 1)).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H = self.size.head
        return Cost(flops=0, memory=S * H, state=(5 if self.shift == "one" else 3) * H)

    def init_state(self, length: int, dtype=jnp.float32):
        sums = self._empty()
        return {"sums": sums} | ({"last": sums[:2]} if self.shift == "one" else {})

    def step(self, state, q, k, v, *, decay, bonus, share):
        dtype = v.dtype
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        last = {"last": (k, v)} if share is not None else {}
        if share is not None:
            k, v = (mixed(*each) for each in zip((k, v), state["last"], share, strict=True))
        mean = _mean(_merged(state["sums"], _one(k + bonus, v, 1)))
        sums = _merged(_faded(state["sums"], decay), _one(k, v, 1))
        return (jax.nn.sigmoid(q) * mean).astype(dtype), {"sums": sums} | last

    def steps(self, state, q, k, v, *, decay, bonus, share):
        dtype = v.dtype
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        last = {"last": (k[-1], v[-1])} if share is not None else {}
        k, v = shifted((k, v), share, state.get("last"))
        mean, sums = self._means(state["sums"], k, v, jnp.ones(len(k)), decay, bonus)
        return (jax.nn.sigmoid(q) * mean).astype(dtype), {"sums": sums} | last


def shifted(arrays, shares, last=None):
    """Arrays (S, H), each mixed with itself one position before, by a share (H,) of its own; as they are without.

    last: what stood in front of each, (H,), where that is not zeros.
    """
    if shares is None:
        return arrays
    last = [jnp.zeros_like(x[0]) for x in arrays] if last is None else last
    before = (jnp.concatenate([first[None], x[:-1]]) for x, first in zip(arrays, last, strict=True))
    return tuple(mixed(*each) for each in zip(arrays, before, shares, strict=True))


def mixed(x, before, own):
    """`own` of x and 1 - own of what was before."""
    return own * x + (1 - own) * before


# Sums are (sum of weighted values, sum of weights, log), the first two to be multiplied by exp(log). A mean is their
# ratio, for which any log will do: where one is chosen, its derivative is not followed.


def _one(k, v, there):
    return v * there, jnp.ones_like(v) * there, jnp.where(there, k, MASKED)


def _faded(sums, decay):
    return sums[0], sums[1], sums[2] - decay


def _merged(one, other):
    log = lax.stop_gradient(jnp.maximum(one[2], other[2]))
    a, b = jnp.exp(one[2] - log), jnp.exp(other[2] - log)
    return one[0] * a + other[0] * b, one[1] * a + other[1] * b, log


def _mean(sums):
    return jnp.where(sums[1] > 0, sums[0] / jnp.where(sums[1] > 0, sums[1], 1), 0)
