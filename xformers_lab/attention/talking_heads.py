import functools

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead
from xformers_lab.attention._engine.heads import over_samples
from xformers_lab.attention._engine.query_blocks import ROWS, largest, rows
from xformers_lab.attention._engine.softmax import masked_softmax, same_document
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class TalkingHeads(MultiHead):
    """Talking-heads attention (Shazeer et al., 2020, arXiv 2003.02436).

    out_m = sum_l A_lm softmax(sum_n B_nl q_n k_n^T / sqrt(H)) v_m: learned N x N matrices mix the scores of the heads
    before the softmax (B) and its weights after it (A).

    A bias is added to the mixed scores, those that the softmax sees.
    Deviations from the paper: scores, softmaxes and values have equally many heads; the mixing starts near the
    identity.

    Options:
        spread: standard deviation of the mixing matrices around the identity, before training
    """

    kind = "multi-head"
    exact = True
    documents_apart = True
    complexity = Complexity(
        time="O(T S (H + N))",
        memory="O(S)",
        decoding="every key and value",
        time_note="a head",
        memory_note="per block of queries",
    )

    def __init__(self, size: Size, *, spread: float = 0.1, rngs: nnx.Rngs):
        if spread < 0:
            raise Refused(f"spread is a standard deviation, got {spread:g}")
        super().__init__(size, rngs=rngs)
        near = lambda: jnp.eye(size.heads) + spread * jax.random.normal(rngs.params(), (size.heads,) * 2)
        self.before, self.after = nnx.Param(near(), decays=True), nnx.Param(near(), decays=True)

    def attend_heads(self, call: Call):
        k, v = (jnp.repeat(y, call.q.shape[2] // y.shape[2], 2) for y in (call.k, call.v))
        q, k, v = (jnp.swapaxes(y, 1, 2) for y in (call.q, k, v))
        leaves = {"before": self.before[...], "after": self.after[...], "bias": call.bias}
        function = _reference if call.method == "reference" else functools.partial(_attend, self.at_once)

        def one(q, k, v, of_sample):
            valid, documents = of_sample
            return function(q, k, v, leaves, valid=valid, documents=documents, causal=call.causal)

        out = over_samples(one, q, k, v, (call.valid, call.documents), plan=plan_of(self.size))
        return jnp.swapaxes(out, 1, 2), call.carry, Aux()

    @property
    def at_once(self) -> int:
        """Queries per block: all heads' scores together are as large as one head's would be."""
        return max(16, ROWS // self.size.heads)

    @staticmethod
    def limit(length: int):
        return {"spread": 0.0}

    def cost(self, T: int, S: int) -> Cost:
        N, H = self.size.heads, self.size.head
        return Cost(flops=4 * T * S * (H + N), memory=largest(T, S, H, self.at_once), state=2 * S * H)


def _attend(at_once: int, q, k, v, leaves, **options):
    return rows(q, k, v, _weights, leaves, at_once=at_once, **options)


def _weights(s, seen, positions, leaves):
    """(N, C, S) scores -> weights; products of wide matrices mix the heads."""
    mixed = lambda matrix, s: (matrix.T @ s.reshape(len(s), -1)).reshape(s.shape)
    s, bias = mixed(leaves["before"], s), leaves["bias"]
    if bias is not None:
        s = s + jax.vmap(lambda bias: bias(*positions))(bias)
    return mixed(leaves["after"], masked_softmax(s, seen))


def _reference(q, k, v, leaves, *, valid, documents, causal: bool):
    T, S = q.shape[1], k.shape[1]
    at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
    s = jnp.einsum("nth,nsh->nts", q, k, preferred_element_type=jnp.float32) / q.shape[2] ** 0.5
    s = jnp.einsum("nl,nts->lts", leaves["before"], s)
    if leaves["bias"] is not None:
        s += jax.vmap(lambda bias: bias(at, keys))(leaves["bias"])
    seen = (keys <= at) | (not causal)
    seen = seen if documents is None else seen & same_document(documents, at, keys)
    p = masked_softmax(s, seen if valid is None else seen & valid)
    p = jnp.einsum("lm,lts->mts", leaves["after"], p)
    return jnp.einsum("mts,msh->mth", p, v).astype(v.dtype)
