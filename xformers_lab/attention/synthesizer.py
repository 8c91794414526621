import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost, Stepwise
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._base.prepared import LogLength
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.pattern import All
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.query_blocks import BLOCK, by_blocks, masked
from xformers_lab.attention._engine.softmax import exponentials, masked_softmax, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Absent
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

TABLES = ("random", "fixed")
PREDICTED = ("dense", "factorised_dense")


class Synthesizer(Stepwise, Patterned):
    """Synthesizer (Tay et al., 2020, arXiv 2005.00743).

    out_t = sum_s softmax_s(B_ts) v_s, where B_ts is no product of a query and a key: B_t = W2 relu(W1 x_t) (dense), or
    a table of B itself, the same for every input (random).

    With kind=random and kind=fixed, one softmax serves the whole batch and padding is left out of its sums, which is
    exact while no padded score is 80 above every valid one of its query.

    Mixtures (section 3.2): B = sum_i a_i B^i of two or three kinds, the a being the softmax of a learned vector of the
    layer, all alike at the start. The paper's D + R is beside=random; R + V, with ordinary scores q_t . k_s / sqrt(H),
    is kind=random:dot=true; D + V is dot=true; and all three are beside=random:dot=true.

    Deviations from the paper: W1 and W2 have no biases; position=rope turns W1 x, or with dot=true queries and keys, of
        which W1 x is then no part (in the authors' code W1 is the projection of queries). The length is fixed when the
        model is built; shorter inputs use the first rows and columns, queries before the first key the first row.

    Options:
        kind: dense; random: a learned table; fixed: one that is drawn; factorised_dense and factorised_random
            factorised_dense: products of two predicted vectors of about sqrt(length) numbers
            factorised_random: a learned table of rank `rank`
        rank: columns of both factors of kind=factorised_random; none: 8
        beside: a table that is mixed with kind=dense or kind=factorised_dense
        dot: whether scores of queries and keys are mixed in
    """

    later_options: ClassVar = ("beside", "dot")

    kind = "prior"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O((T + S) H)",
        decoding="every value, with dot=true every key besides",
        memory_note=", O(T S) where random or fixed, whose tables are that large",
    )

    on_places = "its weights go"

    def __init__(
        self,
        size: Size,
        *,
        kind: Literal["dense", "random", "fixed", "factorised_dense", "factorised_random"] = "dense",
        rank: int | None = None,
        beside: Literal["none", "random", "fixed", "factorised_random"] = "none",
        dot: bool = False,
        rngs: nnx.Rngs,
    ):
        if rank is not None and rank < 1:
            raise Refused(f"rank must be at least 1, got {rank}")
        if rank is not None and "factorised_random" not in (kind, beside):
            raise Refused(f"rank is an option of kind=factorised_random, got kind={kind}")
        if beside != "none" and kind not in PREDICTED:
            raise Refused(
                f"beside={beside} is a table to mix with what is predicted, and kind={kind} is a table itself: use "
                f"kind=dense or factorised_dense, or dot=true in the place of beside={beside}"
            )
        rank = 8 if rank is None else rank
        super().__init__(size, All(), rngs=rngs)
        self.form, self.rank, self.dot = kind, rank, dot
        self.forms = (kind,) if beside == "none" else (kind, beside)
        self.mixed = dot or beside != "none"
        N, L, H = size.heads, size.length, size.head
        predicted = kind in PREDICTED
        if not dot:
            self.key = Absent(size.key_heads * H, size.dtype)
        if not dot and not predicted:
            self.query = Absent(N * H, size.dtype)
        draw = lambda rows, columns, scale: scale * jax.random.normal(rngs.params(), (N, rows, columns))
        near = math.ceil(math.sqrt(L))
        if kind == "dense":
            self.rows = nnx.Param(draw(L, H, H**-0.5), decays=True)
        elif kind == "factorised_dense":
            self.near = nnx.Param(draw(near, H, H**-0.5), decays=True)
            self.far = nnx.Param(draw(-(-L // near), H, H**-0.5), decays=True)
        table = next((form for form in self.forms if form not in PREDICTED), None)
        if table == "factorised_random":
            self.left = nnx.Param(draw(L, rank, rank**-0.25), decays=False)
            self.right = nnx.Param(draw(L, rank, rank**-0.25), decays=False)
        elif table is not None:
            self.table = (nnx.Param if table == "random" else nnx.Variable)(draw(L, L, 1.0), decays=False)
        hidden = lambda: Linear(size.dim, N * H, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.first = hidden() if dot and predicted else None
        if self.mixed:
            self.shares = nnx.Param(jnp.zeros(len(self.forms) + dot), decays=False)

    def prepare(self, *, log_n: LogLength = None, **others: Any) -> None:
        if log_n is not None and self.mixed:
            raise Refused(f"log_n={log_n} would scale one of the scores that synthesizer mixes: leave out log_n")
        super().prepare(log_n=log_n, **others)

    def per_head(self):
        names = [name for name in ("rows", "near", "far", "left", "right", "table") if hasattr(self, name)]
        own = {name: getattr(self, name)[...] for name in names}
        if self.mixed:
            shares = jax.nn.softmax(self.shares[...])
            own["shares"] = jnp.broadcast_to(shares, (self.size.heads, len(shares)))
        return {"own": own}

    def from_queries(self, x):
        """W1 x, where queries are something else."""
        return {"hidden": None if self.first is None else self.heads_of(self.first(x))}

    def attend_heads(self, call: Call):
        if call.method == "attend" and self.form in TABLES and not self.mixed:
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

    def attend(self, q, k, v, *, valid=None, causal, bias=None, own, hidden=None):
        T, S = q.shape[0], v.shape[0]
        self._check(S)
        if self.mixed:
            hidden = q if hidden is None else hidden
            rows = [self._at(form, hidden, own, lambda table: _last_rows(table[None], T, S)[0]) for form in self.forms]

            def mixture(block, at, keys):
                q, rows = block
                s = masked(self._mixture(q, rows, k[:keys], own, keys), at, valid, causal, bias)
                return weighted(masked_softmax(s), v[:keys]).astype(v.dtype)

            return by_blocks(mixture, (q, rows), S, causal)
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
        return self._scores(self.form, self._at(self.form, q, own, lambda table: table[at]), own, S)

    def _at(self, form: str, hidden, own, rows):
        """What a form's scores of some queries are made of: W1 x, or `rows` of its table or of a factor of it."""
        return hidden if form in PREDICTED else rows(own["left" if form == "factorised_random" else "table"])

    def _scores(self, form: str, row, own, S: int):
        """Scores (C, S) of one form, of some queries' `_at`."""
        exact: dict[str, Any] = {"preferred_element_type": jnp.float32}
        times = lambda q, rows: jnp.dot(q, rows.T.astype(q.dtype), **exact)
        if form == "dense":
            return times(jax.nn.relu(row), own["rows"][:S])
        if form == "factorised_dense":
            near, far = (times(jax.nn.relu(row), own[name]) for name in ("near", "far"))
            return (far[:, :, None] * near[:, None]).reshape(row.shape[0], -1)[:, :S]
        if form == "factorised_random":
            return times(row, own["right"][:S])
        return row[:, :S]

    def _mixture(self, q, rows, k, own, S: int):
        """Scores (C, S) of all forms by their shares; rows: of each form what `_at` gives."""
        parts = [self._scores(form, row, own, S) for form, row in zip(self.forms, rows, strict=True)]
        parts += [products(q * q.shape[-1] ** -0.5, k)] if self.dot else []
        return sum(share * part for share, part in zip(own["shares"], parts, strict=True))

    def reference(self, q, k, v, *, valid=None, causal, bias=None, own, hidden=None):
        T, S = q.shape[0], v.shape[0]
        self._check(S)
        t, s = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        hidden = jnp.maximum(q if hidden is None else hidden, 0).astype(jnp.float32)
        every = []
        for form in self.forms:
            if form == "dense":
                scores = jnp.einsum("th,sh->ts", hidden, own["rows"])[:, :S]
            elif form == "factorised_dense":
                near = jnp.einsum("th,ah->ta", hidden, own["near"])[:, s[0] % own["near"].shape[0]]
                scores = near * jnp.einsum("th,ah->ta", hidden, own["far"])[:, s[0] // own["near"].shape[0]]
            elif form == "factorised_random":
                scores = (own["left"] @ own["right"].T)[jnp.maximum(t, 0), s]
            else:
                scores = own["table"][jnp.maximum(t, 0), s]
            every.append(scores)
        if self.dot:
            every.append(jnp.einsum("th,sh->ts", q.astype(jnp.float32), k.astype(jnp.float32)) / math.sqrt(q.shape[1]))
        scores = jnp.einsum("i,its->ts", own["shares"], jnp.stack(every)) if self.mixed else every[0]
        scores = scores if bias is None else scores + bias(t, s)
        seen = s <= t if causal else s >= 0 * t
        return softmax_average(scores, seen if valid is None else seen & valid[None], v)

    def cost(self, T: int, S: int) -> Cost:
        H, state = self.size.head, S * self.size.head * (1 + self.dot) + 1
        factors = 2 * math.ceil(math.sqrt(self.size.length))
        if self.mixed:
            pair = {"dense": H, "factorised_random": self.rank}
            flops = 2 * T * S * (H + H * self.dot + sum(pair.get(form, 0) for form in self.forms))
            flops += 2 * T * factors * H * ("factorised_dense" in self.forms)
            rows = T if any(form in TABLES for form in self.forms) else min(T, BLOCK)
            return Cost(flops=flops, memory=max(rows * S, S * H), state=state)
        if self.form in TABLES:
            return Cost(flops=2 * T * S * (H + 1), memory=T * S, state=state)
        if self.form == "factorised_dense":
            return Cost(flops=2 * T * (S + factors) * H, memory=max(min(T, BLOCK) * S, S * H), state=state)
        full, width = super().cost(T, S), H if self.form == "dense" else self.rank
        return Cost(flops=full.flops * (H + width) / (2 * H), memory=full.memory, state=state)

    def init_state(self, length: int, dtype=jnp.float32):
        self._check(length)
        rows = jnp.zeros((length, self.size.head), dtype)
        return {"v": rows, "seen": jnp.zeros((), jnp.int32)} | ({"k": rows} if self.dot else {})

    def step(self, state, q, k, v, *, bias=None, own, hidden=None):
        at, every = state["seen"], jnp.arange(state["v"].shape[0])
        new = {"v": v} | ({"k": k} if self.dot else {})
        held = {name: state[name].at[at].set(row) for name, row in new.items()}
        if self.mixed:
            hidden = q if hidden is None else hidden
            rows = [self._at(form, hidden[None], own, lambda table: table[at[None]]) for form in self.forms]
            s = self._mixture(q[None], rows, held.get("k"), own, len(every))
        else:
            s = self._row(q[None], at[None], own, len(every))
        s = s if bias is None else s + bias(at[None, None], every[None])
        return softmax_average(s, every <= at, held["v"])[0], held | {"seen": at + 1}


def _last_rows(table, T: int, S: int):
    """(N, T, ...): the rows of positions S - T to S - 1; queries before the first key get the first row."""
    early = max(T - S, 0)
    rows = table[:, S - T + early : S]
    return jnp.concatenate([jnp.repeat(table[:, :1], early, 1), rows], 1) if early else rows
