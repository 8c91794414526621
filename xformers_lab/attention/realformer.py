import jax.numpy as jnp

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.query_blocks import by_blocks, masked, seen_from, widened
from xformers_lab.attention._engine.softmax import masked_softmax, same_document, softmax_average


class Realformer(OneHead):
    """RealFormer, residual attention (He et al., 2020, arXiv 2012.11747).

    A_l = q k^T / sqrt(H) + A_(l-1), out = softmax(A_l) v: the scores of every layer are added to those of the layer
    below, head by head.

    A score bias is added after the sum and not handed on, so that it counts once in every layer.
    Deviations from the paper: none.
    """

    kind = "prior"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(T S)",
        decoding="every key and value",
        memory_note=", for the scores are what layers hand on",
    )

    def init_carry(self, T: int, S: int):
        return jnp.zeros((T, S), jnp.float32)

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, carry):
        S = k.shape[0]

        def block(rows, at, keys):
            q, below = rows
            seen = seen_from(at, keys, valid, causal, documents)
            # What no query may see is handed on as zero: it is never used, and padding may hold anything.
            s = jnp.where(seen, products(q * q.shape[-1] ** -0.5, k[:keys]) + below[:, :keys], 0)
            out = weighted(masked_softmax(masked(s, at, valid, causal, bias, documents)), v[:keys])
            return out.astype(v.dtype), widened(s, S)

        return by_blocks(block, (q, carry), S, causal)

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, carry):
        T, S = q.shape[0], k.shape[0]
        seen = jnp.tri(T, S, S - T, dtype=bool) if causal else jnp.ones((T, S), bool)
        seen = seen if valid is None else seen & valid[None]
        if documents is not None:
            seen = seen & same_document(documents, jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None])
        carry = jnp.where(seen, scores(q, k) + carry, 0)
        return softmax_average(carry + (scores(q, k, bias) - scores(q, k)), seen, v), carry

    def cost(self, T: int, S: int) -> Cost:
        H = self.size.head
        return Cost(flops=4 * T * S * H, memory=T * S, state=2 * S * H)

    @staticmethod
    def limit(length: int):
        """The first layer has nothing below."""
        return {}
