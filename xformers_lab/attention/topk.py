import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.query_blocks import BLOCK, by_blocks, masked
from xformers_lab.attention._engine.softmax import MASKED, masked_softmax, same_document, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Topk(OneHead):
    """Explicit sparse attention to the highest scores (Zhao et al., 2019, arXiv 1912.11637; Gupta et al., 2021, arXiv
    2106.06899).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys whose score is at least the `keys`-th highest of
    those that query t may see. Keys of the same score as that one all count, so no order of positions breaks a tie.

    Queries are taken by blocks, as Gupta et al. do.
    Deviations from the papers: keys that tie for the last place all count, where Gupta et al. take one of them.

    Options:
        keys: how many keys a query attends to
    """

    kind = "sparse by content"
    exact = True
    accuracy = "over the chosen keys, whose choice has no gradient"
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        time_note=", for every score is computed and only then compared",
        memory_note="per block of queries",
    )

    def __init__(self, size: Size, *, keys: int = 32, rngs: nnx.Rngs):
        if keys < 1:
            raise Refused(f"keys must be at least 1, got {keys}")
        super().__init__(size, rngs=rngs)
        self.keys = keys

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None):
        def row(q, at, keys: int):
            # Scaled last, so that the choice does not depend on how a half precision rounds.
            s = masked(products(q, k[:keys]) * q.shape[1] ** -0.5, at, valid, causal, bias, documents)
            # A minimum, not the last column, for which XLA:CPU sorts whole rows.
            highest = lax.top_k(lax.stop_gradient(s), min(self.keys, keys))[0]
            s = jnp.where(_reaches(s, highest.min(1, keepdims=True)), s, MASKED)
            return weighted(masked_softmax(s), v[:keys])

        return by_blocks(row, q, k.shape[0], causal).astype(v.dtype)

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None):
        T, S = q.shape[0], k.shape[0]
        seen = jnp.tril(jnp.ones((T, S), bool), S - T) if causal else jnp.ones((T, S), bool)
        seen = seen if valid is None else seen & valid
        if documents is not None:
            seen = seen & same_document(documents, jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None])
        s = scores(q, k, bias)
        least = jnp.sort(jnp.where(seen, s, MASKED), 1)[:, -min(self.keys, S)]
        return softmax_average(s, seen & _reaches(s, least[:, None]), v)

    def cost(self, T: int, S: int) -> Cost:
        H = self.size.head
        return Cost(flops=4 * T * S * H, memory=S * max(H, min(T, BLOCK)), state=2 * S * H)

    @staticmethod
    def limit(length: int):
        return {"keys": length}


def _reaches(s, least):
    """Whether scores are as high as the lowest that counts, to rounding: XLA may compute scores twice, fused with what
    comes next, and the choice and its use then round differently."""
    return s >= lax.stop_gradient(least - 1e-5 * (1 + abs(least)))
