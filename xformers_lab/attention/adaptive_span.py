import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity
from xformers_lab.attention._engine.softmax import MASKED, masked_softmax, same_document
from xformers_lab.attention.local import Local
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size


class AdaptiveSpan(Local):
    """Adaptive attention span (Sukhbaatar et al., 2019, arXiv 1905.07799).

    out_t = sum_s m(t - s) exp(q_t . k_s / sqrt(H)) v_s / sum_s m(t - s) exp(q_t . k_s / sqrt(H)), with the soft mask
    m(x) = clip((ramp + z - |x|) / ramp, 0, 1). Every head learns its own z, and pays penalty times z for it.

    The loss gets penalty times the mean z of a layer's heads; the scalar "span" reports that mean.
    Deviations from the paper: z is span times a sigmoid where the paper clips z after every step; spans are not made to
    depend on the input.

    Options:
        span: the most keys a head may reach back (not causal: on each side)
        ramp: over how many keys beyond z the mask falls to zero
        start: z before training, as a part of span
        penalty: what a key of mean span adds to the loss
    """

    kind = "multi-head"
    exact = True
    accuracy = ""
    documents_apart = True
    complexity = Complexity(
        time="O(T span H)",
        memory="O(S H)",
        decoding="a ring of span + 1 keys and values",
        time_note=", whatever z has become",
    )

    def __init__(
        self,
        size: Size,
        *,
        span: int = 128,
        ramp: int = 32,
        start: float = 0.5,
        penalty: float = 2e-6,
        rngs: nnx.Rngs,
    ):
        if span < 1 or ramp < 1:
            raise Refused(f"span and ramp must be at least 1, got span={span} and ramp={ramp}")
        if not 0 < start < 1:
            raise Refused(f"start is a part of span, between 0 and 1 without these, got {start:g}")
        if penalty < 0:
            raise Refused(f"penalty must be at least 0, got {penalty:g}")
        super().__init__(size, window=span, rngs=rngs)
        self.ramp, self.penalty = ramp, penalty
        self.part = nnx.Param(jnp.full(size.heads, math.log(start / (1 - start))), decays=False)

    def per_head(self):
        return {"z": self.window * jax.nn.sigmoid(self.part[...])}

    def attend_heads(self, call: Call):
        out, carry, aux = super().attend_heads(call)
        span = self.per_head()["z"].mean()
        return out, carry, aux | Aux(losses={"span": self.penalty * span}, scalars={"span": span})

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, z):
        ramp = Ramp(z, bias, self.ramp)
        return super().attend(q, k, v, valid=valid, documents=documents, causal=causal, bias=ramp)

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, z):
        T, S = q.shape[0], k.shape[0]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        seen = (jnp.abs(at - keys) <= self.window) & ((keys <= at) | (not causal))
        seen = seen if documents is None else seen & same_document(documents, at, keys)
        s = jnp.dot(q, k.T, preferred_element_type=jnp.float32) / q.shape[1] ** 0.5
        p = masked_softmax(s if bias is None else s + bias(at, keys), seen if valid is None else seen & valid)
        p = p * jnp.clip((self.ramp + z - jnp.abs(at - keys)) / self.ramp, 0, 1)
        total = p.sum(1, keepdims=True)
        return jnp.dot(p / jnp.where(total > 0, total, 1), v).astype(v.dtype)

    @staticmethod
    def limit(length: int):
        return {"span": 2 * length}

    def attend_cached(self, q, keys, values, at, positions, seen, bias):
        ramp = Ramp(self.per_head()["z"], bias, self.ramp)
        return super().attend_cached(q, keys, values, at, positions, seen, ramp)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ramp:
    """Scores to add: the logarithm of the soft mask, and a further bias."""

    z: jax.Array
    bias: Any
    ramp: int = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at, k_at):
        mask = jnp.clip((self.ramp + self.z - jnp.abs(q_at - k_at)) / self.ramp, 0, 1)
        log = jnp.where(mask > 0, jnp.log(jnp.where(mask > 0, mask, 1)), MASKED)
        return log if self.bias is None else log + self.bias(q_at, k_at)
