import functools

import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost, OneHead
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.query_blocks import by_blocks, masked, widened
from xformers_lab.attention._engine.softmax import masked_softmax, same_document
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class Lazyformer(OneHead):
    """LazyFormer, attention with lazy update (Ying et al., 2021, arXiv 2102.12702).

    out = P v with P = softmax(q k^T / sqrt(H)) in the first of every `share` layers, and the P of the layer below in
    the others.

    Deviations from the paper: layers that take P over own projections of queries and keys too, which they do not use,
        for all layers are one scanned program; the paper's other training tricks (wider layers, no dropout of P) are
        options of the model, not of the mechanism.

    Options:
        share: layers that share one P, the first of them computing it
    """

    kind = "prior"
    exact = True
    accuracy = "in the layers that compute P"
    documents_apart = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(T S)",
        decoding="every key and value",
        time_note=", half of it where P is taken over",
        memory_note=", for P is what layers hand on",
    )

    def __init__(self, size: Size, *, share: int = 2, rngs: nnx.Rngs):
        if share < 1:
            raise Refused(f"share must be at least 1, got {share}")
        super().__init__(size, rngs=rngs)
        self.share = share

    def init_carry(self, T: int, S: int):
        return jnp.zeros((T, S), self.size.dtype)

    def initial_carry(self, B: int, T: int, S: int):
        """P of every head, and how many layers there are below."""
        return super().initial_carry(B, T, S), jnp.zeros((), jnp.int32)

    def attend_heads(self, call: Call):
        (B, T), S, carry = call.q.shape[:2], call.k.shape[1], call.carry
        shared, below = self.initial_carry(B, T, S) if carry is None else carry
        attend_heads = super().attend_heads

        def taken_over(q, k, v, shared):
            apply = _plainly if call.method == "reference" else functools.partial(_by_blocks, causal=call.causal)
            one = lambda q, k, v, shared, of_sample, of_head: (apply(shared, v), shared)
            return over_heads(one, q, k, v, shared, None, None, plan=plan_of(self.size))

        def computed(q, k, v, shared):
            return attend_heads(call.replace(q=q, k=k, v=v, carry=shared))[:2]

        out, shared = lax.cond(below % self.share == 0, computed, taken_over, call.q, call.k, call.v, shared)
        return out, (shared, below + 1), Aux()

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, carry):
        S = k.shape[0]

        def block(q, at, keys):
            s = masked(products(q * q.shape[-1] ** -0.5, k[:keys]), at, valid, causal, bias, documents)
            p = masked_softmax(s).astype(carry.dtype)
            return weighted(p, v[:keys]).astype(v.dtype), widened(p, S)

        return by_blocks(block, q, S, causal)

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, carry):
        T, S = q.shape[0], k.shape[0]
        seen = jnp.tri(T, S, S - T, dtype=bool) if causal else jnp.ones((T, S), bool)
        seen = seen if valid is None else seen & valid[None]
        if documents is not None:
            seen = seen & same_document(documents, jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None])
        p = masked_softmax(scores(q, k, bias), seen)
        return _plainly(p, v), p.astype(carry.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H = self.size.head
        return Cost(flops=4 * T * S * H, memory=T * S, state=2 * S * H)

    @staticmethod
    def limit(length: int):
        return {"share": 1}


def _by_blocks(p, v, causal: bool):
    return by_blocks(lambda p, at, keys: weighted(p[:, :keys], v[:keys]).astype(v.dtype), p, len(v), causal)


def _plainly(p, v):
    return (p.astype(jnp.float32) @ v.astype(jnp.float32)).astype(v.dtype)
