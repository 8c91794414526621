import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost, Stepwise
from xformers_lab.attention._base.patterned import near_block
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.by_content import batched, count, grouped, in_blocks, order_by, scores_at_once
from xformers_lab.attention._engine.dense import dense, scores
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.pattern import Band, Causal, Pattern
from xformers_lab.attention._engine.softmax import EMPTY, MASKED, hiding, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

# Rows compared with all centroids at once.
ROWS = 4096
# The code of a key that is not there: further from every query's than any window.
NOWHERE = 1 << 29


class Routing(Stepwise):
    """Routing attention by online k-means (Roy et al., 2020, arXiv 2003.05997, section 4 and algorithm 1).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys of the cluster of t, that of the centroid mu with the
    largest mu . q_t. Every cluster has as many keys, the `window` with the largest mu . k_s; causally, where these
    would depend on later keys, the newest `window` of those whose own nearest centroid it is. Keys, queries and
    centroids are brought to length 1 to be compared.

    Centroids are no parameters: training moves them to a moving average of the queries and keys that are nearest to
    each, one set for each head, from random directions on. The choice has no gradient. A query whose cluster holds no
    key yet gets zeros.

    With local=0.5 every second head routes, as in the paper: the first half of them see `window` keys around the query
    instead, or causally the newest `window`. With normalised=true scores are of queries and keys of mean 0 and variance
    1, as in the paper, too.

    Deviations from the paper: a query belongs to its nearest cluster alone, and not to those that list it among their
    nearest `window` queries, so that each is answered once and none looks at others; causally keys are not the queries,
    and chosen as said; unless asked for, scores are of queries and keys as they are, and all heads route; the average
    is of means and not of sums, and a cluster without members stays where it is.

    Options:
        clusters: how many; none: length / window, or about the root of the length where no window is given either
        window: keys of a cluster; none: length / clusters
        decay: how much of a centroid a training step keeps
        local: share of heads that see their neighbours and do not route, rounded down to whole heads
        normalised: whether queries and keys are normalised, without a gain, before anything is made of them
    """

    later_options: ClassVar = ("local", "normalised")

    kind = "sparse by content"
    exact = True
    accuracy = "within a cluster"
    complexity = Complexity(
        time="O(T (clusters + window) H)",
        memory="O(T H)",
        decoding="every key, value and its cluster",
        time_note=", T^1.5 with the defaults",
    )

    def __init__(
        self,
        size: Size,
        *,
        clusters: int | None = None,
        window: int | None = None,
        decay: float = 0.999,
        local: float = 0.0,
        normalised: bool = False,
        rngs: nnx.Rngs,
    ):
        for name, value in (("clusters", clusters), ("window", window)):
            if value is not None and value < 1:
                raise Refused(f"{name} must be at least 1, got {value}")
        if clusters is None:
            clusters = round(size.length**0.5) if window is None else -(-size.length // window)
        window = -(-size.length // clusters) if window is None else window
        if not 0 <= decay <= 1:
            raise Refused(f"decay must be between 0 and 1, got {decay:g}")
        if not 0 <= local < 1:
            raise Refused(f"local must be at least 0 and below 1, for some heads route, got {local:g}")
        super().__init__(size, rngs=rngs)
        self.clusters, self.window, self.decay = clusters, window, decay
        self.near_heads, self.normalised = int(local * size.heads), normalised
        # Those of heads that do not route stay where they are.
        self.centroids = nnx.Variable(_unit(jax.random.normal(rngs.params(), (size.heads, clusters, size.head))))

    def per_head(self):
        near = jnp.arange(self.size.heads) < self.near_heads
        return {"centroids": lax.stop_gradient(self.centroids[...]), "near": near}

    def attend_heads(self, call: Call):
        out = self._some_near(call) if self.near_heads else super().attend_heads(call)
        if call.key is not None:
            q, k, near = call.q, call.k, self.near_heads
            q, k = (_normalised(q), _normalised(k)) if self.normalised else (q, k)
            if near:
                q, k = q[:, :, near:], jnp.repeat(k, q.shape[2] // k.shape[2], 2)[:, :, near:]
            centroids = self.centroids[...]
            self.centroids[...] = centroids.at[near:].set(self._moved(q, k, call.valid, centroids[near:]))
        return out

    def _some_near(self, call: Call):
        """`attend_heads` where the first `near_heads` see their neighbours."""
        self.check_documents(call.documents)
        q, times, parts = call.q, call.q.shape[2] // call.k.shape[2], []
        k, v = (jnp.repeat(x, times, 2) for x in (call.k, self.summands(call)))
        routed, of_head = getattr(self, call.method), (self.per_head()["centroids"], call.bias)
        near = functools.partial(self._near, causal=call.causal, method=call.method)
        for heads, is_near in ((slice(self.near_heads), True), (slice(self.near_heads, None), False)):

            def one(q, k, v, _, valid, of_head, is_near=is_near):
                centroids, bias = of_head
                options = {"valid": valid, "bias": bias}
                if is_near:
                    return near(q, k, v, **options), None
                return routed(q, k, v, causal=call.causal, centroids=centroids, **options), None

            own = jax.tree.map(lambda leaf, heads=heads: leaf[heads], of_head)
            of = lambda x, heads=heads: x[:, :, heads]
            parts.append(over_heads(one, of(q), of(k), of(v), None, call.valid, own, plan=plan_of(self.size))[0])
        return jnp.concatenate(parts, 2), call.carry, Aux()

    def _near(self, q, k, v, *, valid, bias, causal: bool, method: str):
        q, k = (_normalised(q), _normalised(k)) if self.normalised else (q, k)
        pattern: Pattern = Band(self.window - 1) & Causal() if causal else Band(self.window // 2)
        if method == "reference":
            return dense(q, k, v, pattern=pattern, valid=valid, bias=bias)
        block = near_block(self.window, causal)
        return block_sparse(q, k, v, pattern=pattern, valid=valid, bias=bias, blocks=(block, block))

    def _moved(self, q, k, valid, centroids):
        """The centroids (N, clusters, H) after a training step on queries (B, T, N, H) and keys (B, S, K, H)."""
        valid = jnp.ones(k.shape[:2], bool) if valid is None else valid
        asked = valid if q.shape[1] == k.shape[1] else jnp.ones(q.shape[:2], bool)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
        rows = lambda x: lax.stop_gradient(x).swapaxes(1, 2).swapaxes(0, 1).reshape(x.shape[2], -1, x.shape[3])
        rows, there = jnp.concatenate([rows(q), rows(k)], 1), jnp.concatenate([asked.reshape(-1), valid.reshape(-1)])

        def head(arrays):
            rows, centroids = arrays

            def add(totals, of_head):
                x, there = of_head
                member = (_nearest(x, centroids)[:, None] == jnp.arange(self.clusters)) & there[:, None]
                member = member.astype(jnp.float32)
                return (totals[0] + member.T @ jnp.where(there[:, None], _unit(x), 0), totals[1] + member.sum(0)), None

            start = jnp.zeros_like(centroids), jnp.zeros(self.clusters)
            at_once = min(ROWS, len(rows))
            (total, members), _ = lax.scan(add, start, (in_blocks(rows, at_once), in_blocks(there, at_once, False)))
            mean = total / jnp.maximum(members, 1)[:, None]
            return jnp.where(members[:, None] > 0, self.decay * centroids + (1 - self.decay) * mean, centroids)

        return lax.map(head, (rows, centroids))

    def attend(self, q, k, v, *, valid=None, causal, centroids, bias=None):
        S = len(k)
        q, k = (_normalised(q), _normalised(k)) if self.normalised else (q, k)
        valid = jnp.ones(S, bool) if valid is None else valid
        route = self._newest if causal else self._best
        (keys, values, k_code, k_at), chosen, q_code = route(q, k, v, valid, centroids)
        at = jnp.arange(len(q)) + S - len(q)
        groups = grouped(chosen, len(keys), self._size(S))
        block, width = groups.block, min(self.window, S)

        def added(of_block):
            q_code, k_code, q_at, k_at = of_block
            apart = q_code - k_code[:, None]
            hidden = hiding((apart >= 0) & (apart < width))
            return hidden if bias is None else hidden + bias(q_at, k_at[:, None])

        sent = lambda x: groups.sent(x)[..., None]
        of_block = sent(q_code), k_code[block], sent(at), k_at[block]
        out, _ = batched(groups.sent(q * q.shape[1] ** -0.5), keys[block], values[block], added, of_block)
        return groups.returned(out)[:, 0].astype(v.dtype)

    def _size(self, S: int) -> int:
        """Queries in a group."""
        return max(8, min(self.window, S) // 2)

    def _best(self, q, k, v, valid, centroids):
        """Blocks of the best keys of every cluster; which block a query asks, and its code."""
        S, W = len(k), min(self.window, len(k))
        unit = _unit(lax.stop_gradient(k))

        def members(centroid):
            near, at = lax.top_k(jnp.where(valid, unit @ centroid, MASKED), W)
            return at, jnp.where(near > EMPTY, 0, NOWHERE)

        k_at, code = lax.map(members, _unit(centroids), batch_size=max(1, ROWS * self.clusters // S))
        chosen = _nearest(q, centroids)
        return (k[k_at], v[k_at], code, k_at), chosen, jnp.zeros_like(chosen)

    def _newest(self, q, k, v, valid, centroids):
        """The same causally. Keys are sorted by cluster and position and cut into blocks, of which a query asks the one
        that ends its window, together with the one before. A code is a place in this order, with gaps between clusters
        that no window reaches over."""
        T, S, W = len(q), len(k), min(self.window, len(k))
        asked, cluster = _nearest(q, centroids), jnp.where(valid, _nearest(k, centroids), self.clusters)
        order = order_by(cluster, self.clusters + 1)
        code = jnp.where(valid[order], cluster[order] * W + jnp.arange(S), NOWHERE)
        # The newest key of its cluster that a query may see, or where there is none, one of a cluster before.
        last = asked * S + jnp.maximum(jnp.arange(T) + S - T, -1)
        place = jnp.searchsorted((cluster * S)[order] + order, last, side="right") - 1
        chosen = jnp.where(place < 0, -(-S // W), place // W)

        def pairs(x, fill=0):
            blocks = in_blocks(x, W, fill)
            before = jnp.pad(blocks[:-1], [(1, 0)] + [(0, 0)] * (blocks.ndim - 1), constant_values=fill)
            return jnp.concatenate([before, blocks], 1)

        return (pairs(k[order]), pairs(v[order]), pairs(code, NOWHERE), pairs(order)), chosen, place + asked * W

    def reference(self, q, k, v, *, valid=None, causal, centroids, bias=None):
        T, S = len(q), len(k)
        q, k = (_normalised(q), _normalised(k)) if self.normalised else (q, k)
        valid = jnp.ones(S, bool) if valid is None else valid
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)
        near_q, near_k = (_unit(x) @ _unit(centroids).T for x in (q, k))  # (T, clusters), (S, clusters)
        cluster = near_q.argmax(1)
        if causal:
            same = (near_k.argmax(1) == cluster[:, None]) & (keys <= at) & valid
            seen = same & (jnp.cumsum(same[:, ::-1], 1)[:, ::-1] <= self.window)
        else:
            near = jnp.where(valid, near_k[:, :, None].T, MASKED)[0]  # (clusters, S)
            best = jnp.argsort(jnp.argsort(-near, 1, stable=True), 1) < self.window
            seen = best[cluster] & valid
        return softmax_average(scores(q, k, bias), seen, v)

    def cost(self, T: int, S: int) -> Cost:
        """For a pass without causality, whose blocks are the clusters; without what moves the centroids in training."""
        H, c, W, C = self.size.head, self.clusters, min(self.window, S), self._size(S)
        n = count(T, c, C)
        memory = max(n * W * H, n * C * H, scores_at_once(n, C, W), min(ROWS, T + S) * c)
        return Cost(flops=2 * (T + S) * c * H + 4 * n * C * W * H, memory=memory, state=S * (2 * H + 1) + 1)

    @staticmethod
    def limit(length: int):
        return {"clusters": 1, "window": length}

    def init_state(self, length: int, dtype=jnp.float32):
        rows = jnp.zeros((length, self.size.head), dtype)
        clusters = jnp.full(length, self.clusters, jnp.int32)
        return {"k": rows, "v": rows, "clusters": clusters, "seen": jnp.zeros((), jnp.int32)}

    def step(self, state, q, k, v, *, centroids, near, bias=None):
        q, k = (_normalised(q), _normalised(k)) if self.normalised else (q, k)
        at, (own, asked) = state["seen"], _nearest(jnp.stack([k, q]), centroids)
        keys, values, clusters = (state[name].at[at].set(x) for name, x in (("k", k), ("v", v), ("clusters", own)))
        same = clusters == asked
        seen = same & (jnp.cumsum(same[::-1])[::-1] <= self.window)
        if self.near_heads:
            places = jnp.arange(len(keys))
            seen = jnp.where(near, (places <= at) & (places > at - self.window), seen)
        s = jnp.dot(keys, q * q.shape[0] ** -0.5, preferred_element_type=jnp.float32)
        s = s if bias is None else s + bias(at[None, None], jnp.arange(len(keys))[None])[0]
        return softmax_average(s, seen, values), {"k": keys, "v": values, "clusters": clusters, "seen": at + 1}


def _unit(x):
    """Vectors of length 1 in float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def _normalised(x):
    """Vectors (..., H) of mean 0 and variance 1, without a gain, in x's type."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _nearest(x, centroids):
    """(T, H) -> (T,): which centroid is in the direction of a row."""
    unit = _unit(centroids)
    return lax.map(lambda x: jnp.argmax(unit @ x).astype(jnp.int32), lax.stop_gradient(_unit(x)), batch_size=ROWS)
