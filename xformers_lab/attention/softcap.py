import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, OneHead
from xformers_lab.attention._base.by_kernel import by_kernel
from xformers_lab.attention._engine.pattern import All, Causal
from xformers_lab.attention._engine.query_blocks import largest, rows
from xformers_lab.attention._engine.softmax import masked_softmax, same_document
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size


class Softcap(OneHead):
    """Soft-capped attention scores (Gemma Team, 2024, arXiv 2408.00118, section 2).

    out_t = sum_s softmax_s(cap tanh(q_t . k_s / (cap sqrt(H)))) v_s. No score leaves (-cap, cap), so that training
    stays stable where scores would grow.

    A bias is added to the capped score.

    Options:
        cap: the size that no score reaches
    """

    kind = "full"
    documents_apart: ClassVar = True
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        memory_note="per block of queries",
    )

    def __init__(self, size: Size, *, cap: float = 50.0, rngs: nnx.Rngs):
        if cap <= 0:
            raise Refused(f"cap must be above 0, got {cap:g}")
        super().__init__(size, rngs=rngs)
        self.cap = cap

    def why_no_kernel(self):
        return None

    def attend_heads(self, call: Call):
        mean = by_kernel(self, call, [Causal() if call.causal else All()], softcap=self.cap)
        return super().attend_heads(call) if mean is None else (self.behind(mean, call), call.carry, Aux())

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None):
        return rows(
            q, k, v, functools.partial(_weights, self.cap), bias, valid=valid, documents=documents, causal=causal
        )

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None):
        T, S = q.shape[0], k.shape[0]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        s = jnp.dot(q, k.T, preferred_element_type=jnp.float32) / q.shape[1] ** 0.5
        s = self.cap * jnp.tanh(s / self.cap)
        seen = (keys <= at) | (not causal)
        seen = seen if documents is None else seen & same_document(documents, at, keys)
        p = masked_softmax(s if bias is None else s + bias(at, keys), seen if valid is None else seen & valid)
        return jnp.dot(p, v).astype(v.dtype)

    @staticmethod
    def limit(length: int):
        return {"cap": 1e4}

    def cost(self, T: int, S: int) -> Cost:
        H = self.size.head
        return Cost(flops=4 * T * S * H, memory=largest(T, S, H), state=2 * S * H)


def _weights(cap: float, s, seen, positions, bias):
    s = cap * jnp.tanh(s / cap)
    return masked_softmax(s if bias is None else s + bias(*positions), seen)
