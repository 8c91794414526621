import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost
from xformers_lab.attention._base.projected import Projected
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.softmax import masked_softmax, same_document
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class Collaborative(Projected):
    """Collaborative multi-head attention (Cordonnier et al., 2020, arXiv 2006.16362).

    out_t = sum_s softmax_s((m_n * q_t) . k_s / sqrt(R)) v_s: all heads share one query and one key of R channels, and
    head n weights these channels by its learned vector m_n.

    With R = N H and m_n = sqrt(N) on the channels of head n, 0 elsewhere, it is multi-head attention.
    Deviations from the paper: scores are divided by sqrt(R), a factor that m could as well hold; m starts as standard
    normal. Rotary positions turn the weighted query and the shared key.

    Options:
        shared: R, the channels of the shared key; none: a quarter of all heads', at least one head's
    """

    kind = "multi-head"
    exact = True
    documents_apart = True
    complexity = Complexity(
        time="O(T S (R + H))",
        memory="O(S)",
        decoding="one key of R channels for all heads, and every head's values",
        time_note="a head",
        memory_note="per row of blocks",
    )

    def __init__(self, size: Size, *, shared: int | None = None, rngs: nnx.Rngs):
        R = max(size.head, size.heads * size.head // 8 * 2) if shared is None else shared
        if R < 1 or (shared is not None and R % 2):
            raise Refused(f"shared must be even and at least 2, got {shared}; the nearest is {max(2, R + R % 2)}")
        super().__init__(size, rngs=rngs)
        self.query, self.key, self.value = (
            Linear(size.dim, wide, use_bias=False, dtype=size.dtype, rngs=rngs)
            for wide in (R, R, size.key_heads * size.head)
        )
        self.mixing = nnx.Param(jax.random.normal(rngs.params(), (size.heads, R)), decays=True)

    def project(self, x, source, turn_q, turn_k):
        q = self.query(x)[:, :, None] * self.mixing[...].astype(x.dtype)
        v = self.value(source)
        return turn_q(q), turn_k(self.key(source)[:, :, None]), v.reshape(*v.shape[:2], -1, self.size.head)

    def why_no_kernel(self):
        return "its heads share one key, and have values of their own"

    def attend_heads(self, call: Call):
        function = getattr(self, call.method)

        def one(q, v, _, carry, of_sample, bias):
            k, valid, documents = of_sample
            return function(q, k, v, valid=valid, documents=documents, causal=call.causal, bias=bias), None

        of_sample, plan = (call.k[:, :, 0], call.valid, call.documents), plan_of(self.size)
        out, _ = over_heads(one, call.q, call.v, call.v, None, of_sample, call.bias, plan=plan)
        return out, call.carry, Aux()

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None):
        T, S = q.shape[0], k.shape[0]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        s = jnp.dot(q, k.T, preferred_element_type=jnp.float32) / q.shape[1] ** 0.5
        seen = (keys <= at) | (not causal)
        seen = seen if documents is None else seen & same_document(documents, at, keys)
        p = masked_softmax(s if bias is None else s + bias(at, keys), seen if valid is None else seen & valid)
        return jnp.dot(p, v).astype(v.dtype)

    @staticmethod
    def limit(length: int):
        return None

    def cost(self, T: int, S: int) -> Cost:
        size, R = self.size, self.mixing.shape[1]
        pairs = live_pairs(self.pattern, T, S, *self.blocks(T, S, causal=False))
        state = S * (R + size.key_heads * size.head) / size.heads
        return Cost(flops=2 * pairs * (R + size.head), memory=max(self.largest(T, S), S * R), state=state)
