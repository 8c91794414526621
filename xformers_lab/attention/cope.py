from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost, OneHead, why_not_one_way
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.query_blocks import BLOCK, by_blocks, pairs, seen_from
from xformers_lab.attention._engine.softmax import MASKED, masked_softmax, same_document, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Cope(OneHead):
    """Attention with contextual positions (CoPE: Golovneva et al., 2024, arXiv 2405.18719, section 4).

    out_t = sum_(s <= t) softmax_s(q_t . (k_s + e[p_ts])) v_s, p_ts = min(P - 1, sum_(s <= r <= t) sigmoid(q_t . k_r)):
    keys are counted back from the query, each as much as its gate says, so that a position may be that of the last
    sentence, say. e has a learned vector for each of P whole counts, the same in all heads, and is interpolated between
    them; it begins with zeros. All scores are divided by sqrt(H).

    It is on this shelf and not on that of positions because p takes the scores of all pairs. Keys that are padding or
    of another document count nothing. A bias is added to the scores, and not to what gates are made of.
    Deviations from the paper: queries are divided by sqrt(H) in gates too, which is where the score is.

    Options:
        positions: P, of which the last stands for all that lies beyond
    """

    kind = "prior"
    exact = True
    complexity = Complexity(
        time="O(T S H + T P H)",
        time_note=", 5/8 of it where S >= 1024",
        memory="O(S)",
        decoding="every key and value",
        memory_note="per block of queries",
    )
    refuses: ClassVar = {"bidirectional": "its positions are counted back from the query, so it serves no encoder"}

    def __init__(self, size: Size, *, positions: int = 64, rngs: nnx.Rngs):
        if positions < 2:
            raise Refused(f"positions must be at least 2, between which counts lie, got {positions}")
        super().__init__(size, rngs=rngs)
        self.positions = positions
        self.table = nnx.Param(jnp.zeros((positions, size.head)), decays=False)

    def per_head(self):
        table = self.table[...]
        return {"table": jnp.broadcast_to(table, (self.size.heads, *table.shape))}

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, table):
        self._one_way(causal)

        def row(q, at, keys: int):
            q = q * q.shape[1] ** -0.5
            s = products(q, k[:keys])
            seen = seen_from(at, keys, valid, True, documents)
            count = _counted(s, seen, len(table))
            of_place, below = products(q, table.astype(q.dtype)), jnp.floor(count)
            at_count = lambda place: jnp.take_along_axis(of_place, place.astype(jnp.int32), 1)
            above = jnp.minimum(below + 1, len(table) - 1)
            s += at_count(below) + (count - below) * (at_count(above) - at_count(below))
            s = s if bias is None else s + bias(at, jnp.arange(keys)[None])
            return weighted(masked_softmax(jnp.where(seen, s, MASKED)), v[:keys])

        return by_blocks(row, q, k.shape[0], causal).astype(v.dtype)

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, table):
        self._one_way(causal)
        T, S = q.shape[0], k.shape[0]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        seen = keys <= at
        seen = seen if documents is None else seen & same_document(documents, at, keys)
        seen = seen if valid is None else seen & valid
        count = _counted(scores(q, k), seen, len(table))

        @jax.checkpoint
        def one(total, place):
            """What a place adds to the scores: its share of its vector, for counts less than one away from it."""
            number, vector = place
            below = jnp.floor(count)
            share = jnp.where(below == number, 1 - (count - below), jnp.where(below + 1 == number, count - below, 0))
            return total + share * (q.astype(jnp.float32) @ vector)[:, None] / q.shape[1] ** 0.5, None

        of_places = lax.scan(one, jnp.zeros((T, S)), (jnp.arange(len(table)), table))[0]
        return softmax_average(scores(q, k, bias) + of_places, seen, v)

    def _one_way(self, causal: bool) -> None:
        if not causal:
            raise Refused(why_not_one_way(type(self)))

    def cost(self, T: int, S: int) -> Cost:
        H, P = self.size.head, self.positions
        memory = max(S, P) * max(H, min(T, BLOCK))
        flops = 4 * H * pairs(T, S, causal=True) + 2 * T * P * H
        return Cost(flops=flops, memory=memory, state=2 * S * H)


def _counted(s, seen, positions: int):
    """(C, S): the gates of scores from each key up to the query, at most the last of the positions.

    Both forms add them up in one order: at a whole number the slope of what lies between two vectors changes, and sums
    that are rounded otherwise would have gradients of different sides.
    """
    gates = jnp.where(seen, jax.nn.sigmoid(s), 0)
    return jnp.minimum(lax.cumsum(gates, 1, reverse=True), positions - 1)
