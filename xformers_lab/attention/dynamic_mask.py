import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, KeepsKeys
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.pattern import All
from xformers_lab.attention._engine.softmax import MASKED, same_document
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogMask:
    """Scores to add: the logarithm of the mask, of queries that begin `first` positions into the sequence."""

    gate: jax.Array  # (T,)
    near: jax.Array  # (2 reach + 1,), from the farthest key ahead of the query on
    other: Any
    first: int = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at, k_at):
        reach = len(self.near) // 2
        apart = self.near[jnp.clip(q_at - k_at, -reach, reach) + reach]
        added = jax.nn.log_sigmoid(self.gate[jnp.clip(q_at - self.first, 0, len(self.gate) - 1)] + apart)
        return added if self.other is None else added + self.other(q_at, k_at)


class DynamicMask(KeepsKeys, Patterned):
    """Dynamic mask attention of the Mask Attention Network (Fan et al., 2021, arXiv 2103.13597, section 3).

    out_t = sum_s p_t(s) v_s,  p_t(s) = M_ts exp(q_t . k_s / sqrt(H)) / sum_r M_tr exp(q_t . k_r / sqrt(H)),
    M_ts = sigmoid(x_t . w + P_(t-s) + U_n) of head n: a soft window that the query's token widens or narrows.

    As log M is added to the scores, no mask of T x S is built. A layer of the paper has a sub-layer of this before one
    of self-attention; here layers can take turns, attention=dynamic_mask+full.

    Deviations from the paper: each of the two then has a feed-forward sub-layer of its own; distances beyond `reach`
    count as that far.

    Options:
        reach: the farthest distance with a P of its own, on each side
    """

    kind = "prior"
    exact = True
    accuracy = ": the mask is on the weights of every key"
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        memory_note="per row of blocks, the T x S scores are never stored",
    )

    def __init__(self, size: Size, *, reach: int = 64, rngs: nnx.Rngs):
        if reach < 1:
            raise Refused(f"reach must be at least 1, got {reach}")
        super().__init__(size, All(), rngs=rngs)
        self.reach = reach
        self.gate = Linear(size.dim, 1, use_bias=False, dtype=size.dtype, rngs=rngs)
        small = lambda *shape: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape), decays=False)
        self.apart, self.of_head = small(2 * reach + 1), small(size.heads)

    def per_head(self):
        return {"near": self.apart[...] + self.of_head[...][:, None]}

    def from_queries(self, x):
        gate = self.gate(x).astype(jnp.float32)
        return {"of_query": jnp.broadcast_to(gate, (*gate.shape[:2], self.size.heads))}

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, near, of_query):
        T, S = q.shape[0], k.shape[0]
        added, blocks = LogMask(of_query, near, bias, S - T), self.blocks(T, S, causal)
        masks = {"pattern": self.seen(causal), "valid": valid, "documents": documents}
        return jnp.asarray(block_sparse(q, k, v, **masks, bias=added, blocks=blocks))

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, near, of_query):
        T, S = q.shape[0], k.shape[0]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        seen = jnp.broadcast_to((keys <= at) | (not causal), (T, S))
        seen = seen if valid is None else seen & valid
        seen = seen if documents is None else seen & same_document(documents, at, keys)
        distance = jnp.clip(at - keys, -self.reach, self.reach)
        mask = jax.nn.sigmoid(of_query[:, None] + near[distance + self.reach])
        s = jnp.where(seen, scores(q, k, bias), MASKED)
        weights = jnp.where(seen, mask * jnp.exp(s - jax.lax.stop_gradient(s.max(1, keepdims=True))), 0)
        total = weights.sum(1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
        return jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(v.dtype)
