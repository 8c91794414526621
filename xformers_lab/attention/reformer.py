import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost, Stepwise
from xformers_lab.attention._engine.by_content import batched, in_blocks, merged, order_by, scores_at_once
from xformers_lab.attention._engine.softmax import hiding, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Absent
from xformers_lab.nn.size import Size

# Taken from a token's score with itself, so that it counts where there is nothing else.
ALONE = 1e5
# The code of a position that is not there: far from every other.
NOWHERE = 1 << 29


class Reformer(Stepwise):
    """LSH attention of the Reformer (Kitaev et al., 2020, arXiv 2001.04451, section 2).

    out_t = sum_s softmax_s(q_t . q_s / |q_s|) v_s over the other tokens that fall into the bucket of t in one of the
    rounds, h(q) = argmax [q R, -q R] with a random R of its own in each, and are near it there: tokens sorted by bucket
    and position are cut into chunks, which see themselves and the one before. Keys are the queries, made of length 1. A
    token sees itself only where it sees nothing else.

    Padding is in no bucket, and sees nothing.
    Deviations from the paper: causally a token sees those of its bucket that are at most `chunk` places before it, for
    where chunks begin depends on later tokens; tokens of different buckets see each other with across=chunk alone; from
    16 buckets on a bucket is a pair of two smaller hashes, as in the authors' code; R is drawn once, when the model is
    made. Rounds are chunked apart, where the code strings them together.

    Options:
        across: bucket: only tokens of its bucket are seen, as in the paper's equations; chunk: all of the two chunks,
            before the first of which comes the last, as in the authors' code, which is not causal
        rounds: hashes, each with buckets of its own
        chunk: tokens in a chunk
        buckets: at least so many in each round; none: 2 length / chunk, 1: no hashing
    """

    kind = "sparse by content"
    exact = True
    accuracy = (
        "over the union of what the rounds see: each round's softmax counts a key once per round that sees it (N_ij of "
        "the paper), and rounds are merged by their log-sum-exps"
    )
    complexity = Complexity(
        time="O(T rounds (chunk + sqrt buckets) H + T rounds log T)",
        memory="O(T rounds H)",
        decoding="every key and value and their buckets",
    )
    refuses: ClassVar = {"cross": "queries are the keys"}

    def __init__(
        self,
        size: Size,
        *,
        across: Literal["bucket", "chunk"] = "bucket",
        rounds: int = 4,
        chunk: int = 64,
        buckets: int | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value in (("rounds", rounds), ("chunk", chunk), ("buckets", 1 if buckets is None else buckets)):
            if value < 1:
                raise Refused(f"{name} must be at least 1, got {value}")
        super().__init__(size, rngs=rngs)
        self.key = Absent(size.key_heads * size.head, size.dtype)
        self.across, self.rounds, self.chunk = across, rounds, chunk
        self.factors = _factors(math.ceil(2 * size.length / chunk) if buckets is None else buckets)
        shape = (size.heads, rounds, size.head, sum(self.factors) // 2)
        self.rotations = nnx.Variable(jax.random.normal(rngs.params(), shape))

    def per_head(self):
        return {"rotations": self.rotations[...]}

    def _buckets(self, q, rotations):
        """(T, H) -> (rounds, T), numbers below `_number()`."""
        turned = jnp.einsum("th,rhf->rtf", lax.stop_gradient(q).astype(jnp.float32), rotations)
        bucket, start = jnp.zeros(turned.shape[:2], jnp.int32), 0
        for factor in self.factors:
            part = turned[..., start : start + factor // 2]
            bucket = bucket * factor + jnp.argmax(jnp.concatenate([part, -part], -1), -1)
            start += factor // 2
        return bucket

    def _number(self) -> int:
        return math.prod(self.factors)

    def refusals(self):
        chunks = {"causal": "which tokens share a chunk depends on later ones"} if self.across == "chunk" else {}
        return {**super().refusals(), **chunks}

    def _check(self, causal: bool) -> None:
        if causal and (reason := self.refusals().get("causal")):
            raise Refused(
                f"reformer:across={self.across} cannot be causal: {reason}; use across=bucket or model=encoder"
            )

    def attend(self, q, k, v, *, valid=None, causal, rotations, bias=None):
        if len(q) != len(k):
            raise Refused(f"reformer has one projection for queries and keys, so {len(q)} of {len(k)} cannot ask")
        self._check(causal)
        T, C, R = len(q), min(self.chunk, len(q)), self.rounds
        buckets = self._buckets(q, rotations)
        buckets = buckets if valid is None else jnp.where(valid, buckets, self._number())
        order = jax.vmap(lambda bucket: order_by(bucket, self._number() + 1))(buckets)
        place = jax.vmap(lambda order: jnp.zeros(T, jnp.int32).at[order].set(jnp.arange(T)))(order)
        # i sees j where code i - code j is 0 to `width`: the code holds the bucket and the place in the order.
        # Across buckets it holds the chunk alone, and chunks are a ring of those that are no padding.
        width = C if causal else 1
        codes = place + (C + 1) * buckets if causal else place // C + 2 * buckets * (self.across == "bucket")
        last = None if self.across == "bucket" else (T - 1 if valid is None else jnp.maximum(valid.sum() - 1, 0)) // C
        codes = codes if valid is None else jnp.where(valid, codes, NOWHERE)
        codes = jnp.stack([jnp.roll(codes, -r, 0).T for r in range(R)])  # (R, T, R), the round's own code first
        blocks = jax.vmap(lambda order: in_blocks(order, C, T))(order)  # (R, n, C)

        def sorted_by_round(x, fill=0):
            return x.at[blocks].get(mode="fill", fill_value=fill)

        def with_previous(x, fill=0):
            """(R, n, C, ...) -> (R n, 2 C, ...)"""
            first = jnp.full_like(x[:, :1], fill)
            if last is not None:
                first = jnp.where(last > 0, lax.dynamic_slice_in_dim(x, last, 1, 1), first)
            before = jnp.concatenate([first, x[:, :-1]], 1)
            return jnp.concatenate([before, x], 2).reshape(-1, 2 * C, *x.shape[3:])

        flat = lambda x: x.reshape(-1, *x.shape[2:])
        codes = jax.vmap(lambda codes, blocks: codes.at[blocks].get(mode="fill", fill_value=NOWHERE))(codes, blocks)
        sorted_q = sorted_by_round(q)
        of_block = (
            (flat(jnp.where(codes == NOWHERE, -NOWHERE, codes)), with_previous(codes, NOWHERE)),
            (flat(blocks), with_previous(blocks, T)),
        )

        def added(of_block):
            (q_code, k_code), (q_at, k_at) = of_block
            q_at, k_at = q_at[:, :, None], k_at[:, None]
            apart = (q_code[:, :, None, r] - k_code[:, None, :, r] for r in range(R))
            if last is None:
                near = [(x >= 0) & (x <= width) for x in apart]
            else:
                near = [(x % (last + 1) <= 1) & (abs(x) < NOWHERE // 2) for x in apart]
            hidden = hiding(near[0]) - ALONE * (q_at == k_at)
            if R > 1:  # what is seen in several rounds counts once
                hidden = hidden - jnp.log(jnp.maximum(sum(x.astype(jnp.float32) for x in near), 1))
            return hidden if bias is None else hidden + bias(q_at, k_at)

        keys, values = with_previous(_unit(sorted_q)), with_previous(sorted_by_round(v))
        out, lse = batched(flat(sorted_q), keys, values, added, of_block)
        back = lambda x: jax.vmap(lambda x, place: x[place])(x.reshape(R, -1, *x.shape[2:]), place)
        return merged(back(out), back(lse), 0).astype(v.dtype)

    def reference(self, q, k, v, *, valid=None, causal, rotations, bias=None):
        T, at = len(q), jnp.arange(len(q))
        if len(k) != T:
            raise Refused("reformer takes as many queries as keys")
        self._check(causal)
        valid = jnp.ones(T, bool) if valid is None else valid
        seen = jnp.zeros((T, T), bool)
        for bucket in jnp.where(valid, self._buckets(q, rotations), self._number()):
            first = (bucket[:, None] > bucket) | ((bucket[:, None] == bucket) & (at[:, None] > at))
            place = first.sum(1)  # in the order by bucket and position
            same, chunk = bucket[:, None] == bucket, place // self.chunk
            if causal:
                near = (place <= place[:, None]) & (place[:, None] - place <= self.chunk)
            else:
                near = (chunk == chunk[:, None]) | (chunk + 1 == chunk[:, None])
            if self.across == "chunk":
                ring = jnp.maximum(-(-valid.sum() // self.chunk), 1)
                same, near = True, (chunk[:, None] - chunk) % ring <= 1
            seen |= same & near & valid & valid[:, None]
        own = jnp.eye(T, dtype=bool)
        seen &= ~own
        seen |= own & ~seen.any(1, keepdims=True) & valid
        s = jnp.dot(q, _unit(q).T, preferred_element_type=jnp.float32)
        return softmax_average(s if bias is None else s + bias(at[:, None], at[None]), seen, v)

    def cost(self, T: int, S: int) -> Cost:
        H, R, C = self.size.head, self.rounds, min(self.chunk, S)
        n = R * -(-T // C)
        flops = R * T * H * sum(self.factors) + 8 * n * C * C * H
        memory = max(2 * n * C * max(H, R), scores_at_once(n, C, 2 * C))
        return Cost(flops=flops, memory=memory, state=S * (2 * H + R) + 1)

    def init_state(self, length: int, dtype=jnp.float32):
        self._check(causal=True)
        rows = jnp.zeros((length, self.size.head), dtype)
        buckets = jnp.full((self.rounds, length), self._number(), jnp.int32)
        return {"k": rows, "v": rows, "buckets": buckets, "seen": jnp.zeros((), jnp.int32)}

    def step(self, state, q, k, v, *, rotations, bias=None):
        at, bucket = state["seen"], self._buckets(q[None], rotations)
        keys, values = (state[name].at[at].set(new) for name, new in (("k", _unit(q)), ("v", v)))
        buckets = state["buckets"].at[:, at].set(bucket[:, 0])
        same = buckets == bucket
        newer = jnp.cumsum(same[:, ::-1], 1)[:, ::-1] - same  # in the bucket
        position = jnp.arange(keys.shape[0])
        others = (same & (newer <= self.chunk)).any(0) & (position != at)
        seen = others | ((position == at) & ~others.any())
        s = jnp.dot(keys, q, preferred_element_type=jnp.float32)
        s = s if bias is None else s + bias(at[None, None], position[None])[0]
        return softmax_average(s, seen, values), {"k": keys, "v": values, "buckets": buckets, "seen": at + 1}


def _factors(buckets: int) -> tuple[int, ...]:
    """Even numbers whose product is at least `buckets`: one, or from 16 on two that are nearly equal; none for 1."""
    if buckets < 16:
        return () if buckets == 1 else (buckets + buckets % 2,)
    first = 2 * round(buckets**0.5 / 2)
    return first, 2 * math.ceil(buckets / first / 2)


def _unit(x):
    """Rows of length 1; zeros stay zeros."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + 1e-12)).astype(x.dtype)
