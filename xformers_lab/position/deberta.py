import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._rows import row


class Deberta(Position):
    """DeBERTa: disentangled attention, content to position and position to content (He et al., 2020, arXiv 2006.03654,
    equation 4).

    score = (q_t . k_s + q_t . W_k P_d(t-s) + k_s . W_q P_d(s-t)) / sqrt(3 H), with P one vector for each of 2 R
    distances, d(x) = clip(x + R, 0, 2 R - 1); with fewer terms, the root is of so many H.
    With buckets the distances are those of DeBERTa's second version: R = buckets, exact up to half of them, then ever
    wider, logarithmically, up to `reach`.
    Absolute positions just before the answers, the enhanced mask decoder, are depth=mask_decoder.
    Deviations from the paper: W_q and W_k are shared by all layers, as P is, which starts as standard normal. Decoding
    keeps 2 R numbers per key and head beside what the attention keeps, unless terms=content_to_position.

    Options:
        reach: distance from which on all keys on a side share a vector
        buckets: none: a vector for each distance; else vectors on each side, for logarithmic buckets
        terms: which of the two are added
    """

    turns = True
    key_terms = 0

    def __init__(
        self,
        size: Size,
        *,
        reach: int = 128,
        buckets: int | None = None,
        terms: Literal["both", "content_to_position", "position_to_content"] = "both",
        rngs: nnx.Rngs,
    ):
        if reach < 1:
            raise Refused(f"reach must be at least 1, got {reach}")
        if buckets is not None and not (buckets >= 4 and buckets % 2 == 0 and buckets // 2 < reach - 1):
            raise Refused(
                f"buckets must be even and at least 4, half of them below reach - 1 = {reach - 1}, got {buckets}"
            )
        super().__init__(size, rngs=rngs)
        self.reach, self.buckets = reach, buckets
        self.of_query, self.of_key = terms != "position_to_content", terms != "content_to_position"
        self.side = reach if buckets is None else buckets
        self.key_terms = 2 * self.side * self.of_key
        self.scale = ((1 + self.of_query + self.of_key) * size.head) ** -0.5
        self.table = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (2 * self.side, size.dim)), decays=False)
        project = lambda: Linear(size.dim, size.heads * size.head, use_bias=False, rngs=rngs)
        self.key = project() if self.of_query else None
        self.query = project() if self.of_key else None

    def rotate(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """Queries and keys times what makes sqrt(3 H) of the mechanism's sqrt(H)."""
        return x * (1 + self.of_query + self.of_key) ** -0.25

    def of_queries(self, q: jax.Array, at: jax.Array) -> jax.Array:
        return self._products(q, self.key)

    def of_keys(self, k: jax.Array, at: jax.Array) -> jax.Array:
        return self._products(jnp.repeat(k, self.size.heads // k.shape[2], 2), self.query)

    def _products(self, x: jax.Array, project: Linear | None) -> jax.Array:
        """(B, T, N, H) times every distance's vector -> (B, T, N, 2 R), or as many zeros as no one asks for."""
        if project is None:
            return jnp.zeros((*x.shape[:3], 0))
        vectors = project(self.table[...]).reshape(-1, self.size.heads, self.size.head).astype(x.dtype)
        return jnp.einsum("btnh,dnh->btnd", x, vectors, preferred_element_type=jnp.float32) * self.scale

    def compare(self, of_queries: jax.Array, of_keys: jax.Array, first: jax.Array) -> "Disentangled":
        return Disentangled(of_queries, of_keys, first, self.reach, self.buckets)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Disentangled:
    """Scores to add: a query's (T, 2 R) for the distance of the key, and a key's (S, 2 R) for that of the query."""

    queries: jax.Array
    keys: jax.Array
    first: jax.Array
    reach: int = dataclasses.field(metadata={"static": True})
    buckets: int | None = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        back, scores = q_at - k_at, jnp.zeros(jnp.broadcast_shapes(q_at.shape, k_at.shape))
        if self.queries.shape[-1]:
            scores += self.queries[row(q_at, self.first, self.queries), self.place(back)]
        if self.keys.shape[-1]:
            scores += self.keys[row(k_at, 0, self.keys), self.place(-back)]
        return scores

    def place(self, apart: jax.Array) -> jax.Array:
        """Which of the 2 R vectors is that of a distance."""
        if self.buckets is None:
            return jnp.clip(apart + self.reach, 0, 2 * self.reach - 1)
        return jnp.clip(bucket(apart, self.buckets, self.reach) + self.buckets, 0, 2 * self.buckets - 1)


def bucket(apart: jax.Array, buckets: int, reach: int) -> jax.Array:
    """The signed bucket of a distance: itself up to half of the buckets, then by its logarithm up to `reach`."""
    near = buckets // 2
    far = jnp.log(jnp.maximum(jnp.abs(apart), near) / near) / math.log((reach - 1) / near)
    far = (jnp.ceil(far * (near - 1)) + near).astype(jnp.int32)
    return jnp.where(jnp.abs(apart) <= near, apart, jnp.sign(apart) * far)
