from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.softmax import MASKED, masked_softmax
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

EXACT: dict[str, Any] = {"preferred_element_type": jnp.float32}
# Fewest queries of one cluster that are computed together.
BLOCK = 16


class Clustered(OneHead):
    """Clustered attention, and improved clustered attention (Vyas et al., 2020, arXiv 2007.04825).

    out_t = A_c v with A_c = softmax(q_c k^T / sqrt(H)) of the mean query q_c of t's cluster c. Improved: on the keys
    whose A_c is largest, A_c is replaced by their total times softmax(q_t k^T / sqrt(H)) over these keys. Queries are
    clustered by the signs of random projections, with k-means in Hamming distance.

    Deviations from the paper: projections are drawn once per head (the authors' code draws new ones in every call),
    k-means begins with queries at even distances, not the first ones, and a cluster that runs empty keeps its centre,
    where the code draws another. Padded queries join the nearest cluster, without a part in its centre and mean.

    Options:
        clusters: mean queries; at most the length counts
        bits: random projections whose signs are compared
        iterations: of k-means
        improved: keys per cluster for which each query has weights of its own; 0: plain clustered attention
    """

    kind = "memory compression"
    heads_together = True
    exact = False
    accuracy = "; exact where all keys are recomputed (improved = T), or where equal queries alone share a cluster"
    complexity = Complexity(
        time="O(T H (clusters + improved) + T clusters bits iterations)",
        memory="O(T max(clusters, H))",
    )
    refuses: ClassVar = {
        "causal": "a mean query mixes later ones in, and the queries of a cluster share one row of weights",
        "cross": "the clusters are those of the queries that came, and padding is known of the keys alone",
        "bias": "a mean query has no position",
    }

    def __init__(
        self,
        size: Size,
        *,
        clusters: int = 64,
        bits: int = 32,
        iterations: int = 10,
        improved: int = 32,
        rngs: nnx.Rngs,
    ):
        for name, value in (("clusters", clusters), ("bits", bits), ("iterations", iterations)):
            if value < 1:
                raise Refused(f"{name} must be at least 1, got {value}")
        if improved < 0:
            raise Refused(f"improved must be at least 0, got {improved}")
        super().__init__(size, rngs=rngs)
        self.clusters, self.bits, self.iterations, self.improved = clusters, bits, iterations, improved
        # The last row is an offset, so that signs tell queries of different lengths apart too.
        self.planes = nnx.Variable(jax.random.normal(rngs.params(), (size.heads, size.head + 1, bits)))

    def per_head(self):
        return {"planes": self.planes[...]}

    def attend(self, q, k, v, *, valid=None, planes):
        if q.shape[0] != k.shape[0]:
            raise Refused(
                f"clustered takes as many queries as keys, got {q.shape[0]} and {k.shape[0]}: "
                "a part of the queries would form other clusters"
            )
        member = _clusters(_signs(q, planes), valid, min(self.clusters, len(q)), self.iterations)
        keep = jax.checkpoint_policies.save_only_these_names("top")
        return jax.checkpoint(self._attend, policy=keep)(q, k, v, valid, member)

    def _attend(self, q, k, v, valid, member):
        """member (C, T) bool: which queries a cluster holds."""
        C = len(member)
        counted = (member if valid is None else member & valid).astype(jnp.float32)
        # Means in float32, so that half precision finds the same keys.
        mean = weighted(counted, q.astype(jnp.float32)) / jnp.maximum(counted.sum(1, keepdims=True), 1)
        s = products(mean * q.shape[1] ** -0.5, k.astype(jnp.float32))
        s = s if valid is None else jnp.where(valid, s, MASKED)
        p = masked_softmax(s)
        if not self.improved:
            return jnp.dot(weighted(p, v).T.astype(v.dtype), member.astype(v.dtype), **EXACT).T.astype(v.dtype)
        top = checkpoint_name(lax.top_k(lax.stop_gradient(s), min(self.improved, len(k)))[1], "top")
        chosen = jnp.zeros(p.shape, bool).at[np.arange(C)[:, None], top].set(True, unique_indices=True)
        rest, total = weighted(jnp.where(chosen, 0, p), v), jnp.where(chosen, p, 0).sum(1)
        return self._recomputed(q, k, v, valid, member, top, rest, total).astype(v.dtype)

    def _recomputed(self, q, k, v, valid, member, top, rest, total):
        """Queries in the order of their clusters, in blocks of one cluster each, against their cluster's top keys."""
        block, H = _block(len(q), len(member)), q.shape[1]
        owner, index, place = _layout(member, block)
        blocks = _moved(q, index, place).reshape(-1, block, H)
        near = jnp.concatenate([k, v], 1)[top][owner]  # (blocks, top, 2 H)
        s = jnp.einsum("gbh,gmh->gbm", blocks * H**-0.5, near[..., :H], **EXACT)
        seen = jnp.ones(top.shape, bool) if valid is None else valid[top]
        p = masked_softmax(s, seen[owner][:, None]) * total[owner][:, None, None]
        out = jnp.einsum("gbm,gmh->gbh", p.astype(v.dtype), near[..., H:], **EXACT) + rest[owner][:, None]
        return _moved(out.reshape(-1, H), place, index)

    def reference(self, q, k, v, *, valid=None, planes):
        T, H = q.shape
        if len(k) != T:
            raise Refused("clustered takes as many queries as keys")
        valid, C, bits = jnp.ones(T, bool) if valid is None else valid, min(self.clusters, T), _signs(q, planes) > 0
        number = jnp.cumsum(valid)
        wanted = np.arange(C) * jnp.maximum(number[-1], 1) // C + 1
        centres = bits[jnp.minimum((number < wanted[:, None]).sum(1), T - 1)]
        distance = lambda centres: (bits[:, None] != centres).sum(-1)
        for _ in range(self.iterations):
            member = (distance(centres).argmin(1)[:, None] == np.arange(C)) & valid[:, None]  # (T, C)
            ones = (member[..., None] & bits[:, None]).sum(0)
            majority = 2 * ones >= member.sum(0)[:, None]
            centres = jnp.where(member.any(0)[:, None], majority, centres)
        cluster = distance(centres).argmin(1)
        same = (cluster[:, None] == cluster) & valid  # (queries, members)
        mean = same @ q / jnp.maximum(same.sum(1, keepdims=True), 1)
        shared, own = mean @ k.T / H**0.5, q @ k.T / H**0.5
        weights = masked_softmax(shared, valid)
        if self.improved:
            order = jnp.argsort(-jnp.where(valid, lax.stop_gradient(shared), MASKED), 1, stable=True)
            rank = jnp.argsort(order, 1)
            top = (rank < self.improved) & valid
            total = jnp.where(top, weights, 0).sum(1, keepdims=True)
            weights = jnp.where(top, total * masked_softmax(own, top), weights)
        return (weights @ v).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, C, K = self.size.head, min(self.clusters, T), min(self.improved, S)
        search = 2 * T * H * self.bits + (4 * self.iterations + 2) * T * C * (self.bits + 1)
        block, blocks = _block(T, C), _count(T, C, _block(T, C))
        own = 4 * blocks * block * K * H if K else 2 * T * C * H
        memory = max(T * max(C, 2 * H), blocks * max(block * max(K, H), K * 2 * H))
        return Cost(flops=search + 2 * T * C * H + 4 * C * S * H + own, memory=memory, state=0)

    @staticmethod
    def limit(length: int):
        return {"improved": length}


def _signs(q, planes):
    """(T, bits) of -1 and 1, in float32 so that half precision clusters alike."""
    q = lax.stop_gradient(q).astype(jnp.float32)
    return jnp.where(jnp.dot(q, planes[:-1], precision=lax.Precision.HIGHEST) + planes[-1] > 0, 1.0, -1.0)


def _clusters(signs, valid, C: int, iterations: int):
    """k-means: (T, bits) -> (C, T) bool, which queries are nearest to which centre.

    The dot product of two rows of signs is the number of bits less twice their Hamming distance. Stretched by C and
    lowered by the centre's number, it is largest at one centre of each query, the first of the nearest.
    """
    T = len(signs)
    there = jnp.ones(T, bool) if valid is None else valid
    spread = jnp.arange(C) * jnp.maximum(there.sum(), 1) // C + 1
    centres = signs[jnp.minimum(jnp.searchsorted(jnp.cumsum(there), spread), T - 1)]
    rows = jnp.concatenate([signs, jnp.ones((T, 1))], 1)
    columns, number = rows.T, jnp.arange(C, dtype=jnp.float32)[:, None]

    def members(centres):
        near = jnp.dot(jnp.concatenate([centres * C, -number], 1), columns, precision=lax.Precision.HIGHEST)
        return near == near.max(0)

    def step(centres, _):
        sums = jnp.dot(jnp.where(there, members(centres), False).astype(jnp.float32), rows)
        return jnp.where(sums[:, -1:] > 0, jnp.where(sums[:, :-1] >= 0, 1.0, -1.0), centres), None

    return members(lax.scan(step, centres, length=iterations)[0])


def _block(T: int, C: int) -> int:
    """Queries per block: as many as a cluster has on average."""
    return max(BLOCK, -(-T // C))


def _count(T: int, C: int, block: int) -> int:
    """The most blocks that T queries in C clusters fill."""
    return (T + C * (block - 1)) // block


def _layout(member, block: int):
    """Where queries lie when each cluster of member (C, T) begins a new block.

    -> the cluster of each block, the query at each place (T: none), and the place of each query.
    """
    C, T = member.shape
    cluster, sizes = member.argmax(0), member.sum(1)
    blocks = (sizes + block - 1) // block
    last, end = jnp.cumsum(blocks), jnp.cumsum(sizes)
    number = jnp.arange(_count(T, C, block))
    owner = jnp.minimum((last <= number[:, None]).sum(1), C - 1)
    order = jnp.argsort(cluster)
    within = ((number - (last - blocks)[owner]) * block)[:, None] + jnp.arange(block)  # place in the cluster
    there = (within < sizes[owner, None]) & (number < last[-1])[:, None]
    index = jnp.where(there, order[jnp.clip((end - sizes)[owner, None] + within, 0, T - 1)], T).reshape(-1)
    own = cluster[order]
    places = (last - blocks)[own] * block + jnp.arange(T) - (end - sizes)[own]
    return owner, index, jnp.zeros_like(places).at[order].set(places, unique_indices=True)


@jax.custom_vjp
def _moved(x, index, back):
    """x[index], zeros where the index is beyond x. `back` says where each row of x goes: the gradient is a gather too,
    where differentiation would add up rows one by one."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


_moved.defvjp(
    lambda x, index, back: (_moved(x, index, back), (index, back)),
    lambda residuals, grad: (_moved(grad, *reversed(residuals)), None, None),
)
