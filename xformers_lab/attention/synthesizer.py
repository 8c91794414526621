import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost, Stepwise
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.pattern import All
from xformers_lab.attention._engine.products import weighted
from xformers_lab.attention._engine.query_blocks import BLOCK, by_blocks, masked
from xformers_lab.attention._engine.softmax import exponentials, masked_softmax, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Absent
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size

TABLES = ("random", "fixed")


class Synthesizer(Stepwise, Patterned):
    """Synthesizer (Tay et al., 2020, arXiv 2005.00743).

    out_t = sum_s softmax_s(B_ts) v_s, where B_ts is no product of a query and a key: B_t = W2 relu(W1 x_t) (dense), or
    a table of B itself, the same for every input (random).

    With kind=random and kind=fixed, one softmax serves the whole batch and padding is left out of its sums, which is
    exact while no padded score is 80 above every valid one of its query.
    Deviations from the paper: W1 and W2 have no biases; position=rope turns W1 x. The length is fixed when the model is
        built; shorter inputs use the first rows and columns, queries before the first key the first row.

    Options:
        kind: dense; random: a learned table; fixed: one that is drawn; factorised_dense and factorised_random
            factorised_dense: products of two predicted vectors of about sqrt(length) numbers
            factorised_random: a learned table of rank `rank`
        rank: columns of both factors of kind=factorised_random; none: 8
    """

    kind = "prior"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O((T + S) H)",
        decoding="every value",
        memory_note=", O(T S) for kind=random and kind=fixed, whose tables are that large",
    )

    on_places = "its weights go"

    def __init__(
        self,
        size: Size,
        *,
        kind: Literal["dense", "random", "fixed", "factorised_dense", "factorised_random"] = "dense",
        rank: int | None = None,
        rngs: nnx.Rngs,
    ):
        if rank is not None and rank < 1:
            raise Refused(f"rank must be at least 1, got {rank}")
        if rank is not None and kind != "factorised_random":
            raise Refused(f"rank is an option of kind=factorised_random, got kind={kind}")
        rank = 8 if rank is None else rank
        super().__init__(size, All(), rngs=rngs)
        self.form, self.rank = kind, rank
        N, L, H = size.heads, size.length, size.head
        self.key = Absent(size.key_heads * H, size.dtype)
        if kind in (*TABLES, "factorised_random"):
            self.query = Absent(N * H, size.dtype)
        draw = lambda rows, columns, scale: scale * jax.random.normal(rngs.params(), (N, rows, columns))
        near = math.ceil(math.sqrt(L))
        if kind == "dense":
            self.rows = nnx.Param(draw(L, H, H**-0.5), decays=True)
        elif kind == "factorised_dense":
            self.near = nnx.Param(draw(near, H, H**-0.5), decays=True)
            self.far = nnx.Param(draw(-(-L // near), H, H**-0.5), decays=True)
        elif kind == "factorised_random":
            self.left = nnx.Param(draw(L, rank, rank**-0.25), decays=False)
            self.right = nnx.Param(draw(L, rank, rank**-0.25), decays=False)
        else:
            self.table = (nnx.Param if kind == "random" else nnx.Variable)(draw(L, L, 1.0), decays=False)

    def per_head(self):
        names = [name for name in ("rows", "near", "far", "left", "right", "table") if hasattr(self, name)]
        return {"own": {name: getattr(self, name)[...] for name in names}}

    def attend_heads(self, call: Call):
        if call.method == "attend" and self.form in TABLES:
            return self._shared(call.q.shape[1], call.v, call.valid, call.causal, call.bias), call.carry, Aux()
        return super().attend_heads(call)

    def _shared(self, T: int, v, valid, causal: bool, bias):
        """A table's softmax, once for all samples: (B, T, N, H)."""
        (B, S, K, H), N = v.shape, self.size.heads
        self._check(S)
        v = v if valid is None else jnp.where(valid[:, :, None, None], v, 0)
        wide = jnp.repeat(v, N // K, 2).transpose(2, 1, 0, 3).reshape(N, S, B * H)
        there = jnp.ones((S, B), v.dtype) if valid is None else valid.T.astype(v.dtype)

        def head(arrays):
            table, wide, bias = arrays
            wide = jnp.concatenate([wide, there], 1)

            def block(s, at, keys):
                s = masked(s[:, :keys], at, None, causal, bias)
                out = weighted(exponentials(s)[0], wide[:keys])
                out, total = out[:, : B * H].reshape(-1, B, H), out[:, B * H :]
                return (out / jnp.where(total > 0, total, 1)[:, :, None]).astype(v.dtype)

            return by_blocks(block, table, S, causal)

        return lax.map(head, (_last_rows(self.table[...], T, S)[:, :, :S], wide, bias)).transpose(2, 1, 0, 3)

    def _check(self, S: int) -> None:
        if self.size.length < S:
            raise Refused(f"synthesizer is built for {self.size.length} positions, got {S}: build it for more")

    def attend(self, q, k, v, *, valid=None, causal, bias=None, own):
        T, S = q.shape[0], v.shape[0]
        self._check(S)
        if self.form == "factorised_dense":

            def block(q, at, keys):
                s = masked(self._row(q, at[:, 0], own, keys), at, valid, causal, bias)
                return weighted(masked_softmax(s), v[:keys]).astype(v.dtype)

            return by_blocks(block, q, S, causal)
        # The rows of W2, or one factor of the table, take the place of keys.
        if self.form == "dense":
            q, k = jax.nn.relu(q), own["rows"][:S].astype(q.dtype)
        else:
            q, k = _last_rows(own["left"][None], T, S)[0], own["right"][:S]
        q = (q * q.shape[-1] ** 0.5).astype(k.dtype)
        blocks = self.blocks(T, S, causal)
        return block_sparse(q, k, v, pattern=self.seen(causal), valid=valid, bias=bias, blocks=blocks)

    def _row(self, q, at, own, S: int):
        """Scores (C, S) of some queries at positions `at`."""
        exact: dict[str, Any] = {"preferred_element_type": jnp.float32}
        times = lambda q, rows: jnp.dot(q, rows.T.astype(q.dtype), **exact)
        if self.form == "dense":
            return times(jax.nn.relu(q), own["rows"][:S])
        if self.form == "factorised_dense":
            near, far = (times(jax.nn.relu(q), own[name]) for name in ("near", "far"))
            return (far[:, :, None] * near[:, None]).reshape(q.shape[0], -1)[:, :S]
        if self.form == "factorised_random":
            return times(own["left"][at], own["right"][:S])
        return own["table"][at, :S]

    def reference(self, q, k, v, *, valid=None, causal, bias=None, own):
        T, S = q.shape[0], v.shape[0]
        self._check(S)
        t, s = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        hidden = jnp.maximum(q, 0).astype(jnp.float32)
        if self.form == "dense":
            scores = jnp.einsum("th,sh->ts", hidden, own["rows"])[:, :S]
        elif self.form == "factorised_dense":
            near = jnp.einsum("th,ah->ta", hidden, own["near"])[:, s[0] % own["near"].shape[0]]
            scores = near * jnp.einsum("th,ah->ta", hidden, own["far"])[:, s[0] // own["near"].shape[0]]
        elif self.form == "factorised_random":
            scores = (own["left"] @ own["right"].T)[jnp.maximum(t, 0), s]
        else:
            scores = own["table"][jnp.maximum(t, 0), s]
        scores = scores if bias is None else scores + bias(t, s)
        seen = s <= t if causal else s >= 0 * t
        return softmax_average(scores, seen if valid is None else seen & valid[None], v)

    def cost(self, T: int, S: int) -> Cost:
        H, state = self.size.head, S * self.size.head + 1
        if self.form in TABLES:
            return Cost(flops=2 * T * S * (H + 1), memory=T * S, state=state)
        if self.form == "factorised_dense":
            factors = 2 * math.ceil(math.sqrt(self.size.length))
            return Cost(flops=2 * T * (S + factors) * H, memory=max(min(T, BLOCK) * S, S * H), state=state)
        full, width = super().cost(T, S), H if self.form == "dense" else self.rank
        return Cost(flops=full.flops * (H + width) / (2 * H), memory=full.memory, state=state)

    def init_state(self, length: int, dtype=jnp.float32):
        self._check(length)
        return {"v": jnp.zeros((length, self.size.head), dtype), "seen": jnp.zeros((), jnp.int32)}

    def step(self, state, q, k, v, *, bias=None, own):
        at, keys = state["seen"], jnp.arange(state["v"].shape[0])
        values = state["v"].at[at].set(v)
        s = self._row(q[None], at[None], own, len(keys))
        s = s if bias is None else s + bias(at[None, None], keys[None])
        return softmax_average(s, keys <= at, values)[0], {"v": values, "seen": at + 1}


def _last_rows(table, T: int, S: int):
    """(N, T, ...): the rows of positions S - T to S - 1; queries before the first key get the first row."""
    early = max(T - S, 0)
    rows = table[:, S - T + early : S]
    return jnp.concatenate([jnp.repeat(table[:, :1], early, 1), rows], 1) if early else rows
