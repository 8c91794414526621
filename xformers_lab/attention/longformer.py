import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from xformers_lab.attention import Call, Complexity, Cost, MultiHead
from xformers_lab.attention._base.patterned import Patterned, near_block
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.chunks import largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.dense import dense, scores
from xformers_lab.attention._engine.pattern import All, Band, Causal, Global, Pattern, dilated_band
from xformers_lab.attention._engine.softmax import MASKED, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

Where = Literal["first", "marked"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """The bias of a row in front of which gathered keys stand, whose places in the row are (tokens,): it hides the
    later ones from a query where attention is causal. Places are float32, for what is a leaf of a bias is
    differentiated."""

    bias: PyTree | None
    places: jax.Array
    causal: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at, k_at):
        count = len(self.places)
        gathered, of_place = k_at < count, self.places[jnp.clip(k_at, 0, count - 1)].astype(jnp.int32)
        q_at, k_at = q_at - count, jnp.where(gathered, of_place, k_at - count)
        added = jnp.float32(0) if self.bias is None else self.bias(q_at, k_at)
        return jnp.where(gathered & (k_at > q_at), MASKED, added) if self.causal else added


def _check_marks(marks: int | None, tokens: int) -> None:
    """Raises Refused where there is no room for the positions that the task marks, or none are marked."""
    if not tokens:
        raise Refused("where=marked: tokens=0 leaves no room for a marked position; use tokens=1 or more")
    if marks == 0:
        raise Refused(
            "where=marked: no positions are marked here; use where=first, or a task that marks some (needle, text, "
            "retrieval, babi) and model=encoder or decoder"
        )
    if marks is not None and marks > tokens:
        raise Refused(f"where=marked: the task marks up to {marks} positions of a row; use tokens={marks}")


class GlobalTokens(Patterned):
    """A near pattern, and global positions, which see every key and are seen by every query: the first `tokens`, or
    where="marked" those that the task marks, of which a row has `tokens` at most; of more it takes the first.

    Marked positions are known when the program runs, not when it is compiled. Their keys and values are gathered and
    stand in front of the row, in whose place they are hidden, so that one softmax is over near keys and global ones; a
    query that comes before a marked position does not see it where attention is causal. Their queries are gathered too.

    own: global queries have projections of their own, for themselves and for every key and value that they look at.
    pieces: besides, the keys and values of global positions are projected once more for one another, and once more for
    the other queries. All are projected from the block's input. `reach`: how far back the near pattern looks.
    """

    refuses: ClassVar = {"documents": "its global tokens are those of a row, not of each document"}

    def __init__(
        self,
        size: Size,
        near: Pattern,
        *,
        tokens: int,
        reach: int,
        own: bool,
        pieces: bool = False,
        where: Where = "first",
        rngs: nnx.Rngs,
    ):
        if tokens < 0:
            raise Refused(f"tokens must be at least 0, got {tokens}")
        if where == "marked":
            _check_marks(size.marks, tokens)
            self.marks = tokens
        super().__init__(size, near | Global(tokens) if tokens and not self.marks else near, rngs=rngs)
        self.near, self.tokens, self.reach, self.kept = near, tokens, reach, tokens
        self.own, self.pieces = own and tokens > 0, pieces and own and tokens > 0
        project = lambda heads: Linear(size.dim, heads * size.head, use_bias=False, dtype=size.dtype, rngs=rngs)
        pair = lambda: {"k": project(size.key_heads), "v": project(size.key_heads)}
        if self.own:
            self.global_query, self.of_global = project(size.heads), nnx.Dict(pair())
        if self.pieces:
            self.among_global, self.to_global = nnx.Dict(pair()), nnx.Dict(pair())

    def why_no_kernel(self):
        if self.marks:
            return "which of its positions are global is known when the program runs"
        return "its global queries have keys and values of their own" if self.own else None

    def drawn(self, causal: bool, head: int = 0):
        return None if self.marks else super().drawn(causal, head)

    def refusals(self):
        no_map = "global queries see values of another projection; projections=shared has a map"
        no_decoding = "a batch says which tokens are marked, and a text that grows has none; where=first decodes"
        decided = ({"map": no_map} if self.own else {}) | ({"decoding": no_decoding} if self.marks else {})
        return {**super().refusals(), **decided}

    def scale_init(self, share: float) -> None:
        super().scale_init(share)
        more = [self.of_global] if self.own else []
        more += [self.among_global, self.to_global] if self.pieces else []
        scale_init(share, *(pair["v"] for pair in more))

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        block = near_block(self.reach, causal)
        return (block, block) if min(T, S) > block else super().blocks(T, S, causal)

    def of_tokens(self, call: Call):
        """Only the queries that stand at global positions, at least one row, are projected once more."""
        if self.own and self.marks:
            return self._of_marked(call)
        if self.own:
            first, count = self._asking(call.q.shape[1], call.k.shape[1])
            x_q = call.queries_input
            assert x_q is not None
            call = call.replace(x_q=x_q[:, first : first + max(count, 1)])
        return super().of_tokens(call)

    def _asking(self, T: int, S: int) -> tuple[int, int]:
        """Which queries stand at global positions: from the first, so many."""
        first = max(0, T - S)
        return first, max(0, min(T, T - S + self.tokens) - first)

    def from_queries(self, x):
        return {"of_query": {"q": self._heads(self.global_query(x), x)} if self.own else {}}

    def from_keys(self, x):
        """What global queries look at, k and v; what the others see of global positions, side_k and side_v."""
        if not self.own:
            return {"of_key": {}}
        pairs = {name: linear(x) for name, linear in self.of_global.items()}
        if self.pieces:
            among, side = self._pieces(x[:, : self.tokens])
            pairs = {name: jnp.concatenate([among[name], rows[:, self.tokens :]], 1) for name, rows in pairs.items()}
            pairs |= side
        return {"of_key": {name: self._heads(rows, x) for name, rows in pairs.items()}}

    def _pieces(self, x) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Keys and values of global positions (B, tokens, D): for one another, k and v, and for the others, side_k and
        side_v."""
        among = {name: linear(x) for name, linear in self.among_global.items()}
        return among, {f"side_{name}": linear(x) for name, linear in self.to_global.items()}

    def _of_marked(self, call: Call):
        """`of_tokens` where global positions are marked: their rows are gathered before they are projected."""
        x, x_q, marked = call.x, call.queries_input, call.marked
        assert x is not None and x_q is not None and marked is not None
        places = jax.vmap(self._places)(marked)  # (B, tokens)
        first = x.shape[1] - x_q.shape[1]
        gathered = lambda rows, at: jnp.take_along_axis(rows, jnp.clip(at, 0, rows.shape[1] - 1)[..., None], 1)
        keys = {name: linear(x) for name, linear in self.of_global.items()}
        if self.pieces:
            among, side = self._pieces(gathered(x, places))
            put = jax.vmap(lambda rows, at, new: rows.at[at].set(new, mode="drop"))
            keys = {name: put(rows, places, among[name]) for name, rows in keys.items()} | side
        queries = self._heads(self.global_query(gathered(x_q, places - first)), x_q)
        of_heads = {"of_query": {"q": queries}, "of_key": {name: self._heads(rows, x) for name, rows in keys.items()}}
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), of_heads)

    def _places(self, marked):
        """marked (S,) -> (tokens,): where the first of them stand, S for those that there are not."""
        S = marked.shape[0]
        return jnp.nonzero(marked, size=self.tokens, fill_value=S)[0].astype(jnp.int32)

    def _heads(self, y, x):
        """(..., heads H) -> (..., N, H) in x's type, keys and values repeated for the query heads that share them."""
        y = y.reshape(*y.shape[:-1], -1, self.size.head).astype(x.dtype)
        return jnp.repeat(y, self.size.heads // y.shape[-2], -2)

    def attend(self, q, k, v, *, valid=None, marked=None, causal, bias=None, of_query, of_key):
        if self.marks:
            return self._attend_marked(q, k, v, valid, marked, causal, bias, of_query, of_key)
        if not self.own:
            return super().attend(q, k, v, valid=valid, causal=causal, bias=bias)
        T, S = q.shape[0], k.shape[0]
        k, v = self._side(k, v, of_key)
        options = {"pattern": self._near(causal), "valid": valid, "bias": bias, "blocks": self.blocks(T, S, causal)}
        out = jnp.asarray(block_sparse(q, k, v, **options))
        first, count = self._asking(T, S)
        if count == 0:
            return out
        at = jnp.arange(count)[:, None] + max(0, S - T)
        last = max(0, S - T) + count if causal else S
        keys = jnp.arange(last)[None]
        exact: dict[str, Any] = {"preferred_element_type": jnp.float32}
        s = jnp.dot(of_query["q"] * q.shape[1] ** -0.5, of_key["k"][:last].T, **exact)
        s = s if bias is None else s + bias(at, keys)
        seen = jnp.logical_or(keys <= at, not causal)
        seen = seen if valid is None else seen & valid[None, :last]
        return jnp.concatenate([out[:first], softmax_average(s, seen, of_key["v"][:last]), out[first + count :]])

    def _attend_marked(self, q, k, v, valid, marked, causal, bias, of_query, of_key):
        T, S = q.shape[0], k.shape[0]
        places = self._places(marked)
        of_place = lambda rows: rows.at[places].get(mode="fill", fill_value=0)
        valid = jnp.ones(S, bool) if valid is None else valid
        front = (of_key["side_k"], of_key["side_v"]) if self.pieces else (of_place(k), of_place(v))
        keys, values = (jnp.concatenate(pair).astype(v.dtype) for pair in zip(front, (k, v), strict=True))
        seen = jnp.concatenate([of_place(valid), valid.at[places].set(False, mode="drop")])
        moved = Gathered(bias, places.astype(jnp.float32), causal) if causal or bias is not None else None
        options = {"pattern": self._near(causal), "valid": seen, "bias": moved}
        out = jnp.asarray(block_sparse(q, keys, values, **options, blocks=self.blocks(T, S + self.tokens, causal)))
        rows = jnp.where(places < S, places - (S - T), T)  # behind the last query: nowhere
        rows = jnp.where(rows < 0, T, rows)
        asked = of_query["q"] if self.own else q.at[rows].get(mode="fill", fill_value=0)
        k, v = (of_key["k"], of_key["v"]) if self.own else (k, v)
        s = jnp.dot(asked * q.shape[1] ** -0.5, k.T, preferred_element_type=jnp.float32)
        at, all_keys = places[:, None], jnp.arange(S)[None]
        s = s if bias is None else s + bias(at, all_keys)
        return out.at[rows].set(softmax_average(s, ((all_keys <= at) | (not causal)) & valid, v), mode="drop")

    def _reference_marked(self, q, k, v, valid, marked, causal, bias, of_query, of_key):
        T, S = q.shape[0], k.shape[0]
        chosen = marked & (jnp.cumsum(marked) <= self.tokens)
        valid = jnp.ones(S, bool) if valid is None else valid
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        asking = (at >= 0) & chosen[jnp.maximum(at, 0)]
        past = ((keys <= at) | (not causal)) & valid
        rank = jnp.cumsum(chosen) - 1  # which of the marked positions one is
        full_q, full_k, full_v = q, k, v
        if self.own:
            full_q = jnp.where(asking, of_query["q"][rank[jnp.maximum(at[:, 0], 0)]], 0)
            full_k, full_v = of_key["k"], of_key["v"]
        if self.pieces:
            k, v = (jnp.where(chosen[:, None], of_key[f"side_{name}"][rank], x) for name, x in (("k", k), ("v", v)))
        near = softmax_average(scores(q, k, bias), (self.near(at, keys) | chosen) & past, v)
        return jnp.where(asking, softmax_average(scores(full_q, full_k, bias), past, full_v), near)

    def reference(self, q, k, v, *, valid=None, marked=None, causal, bias=None, of_query, of_key):
        if self.marks:
            return self._reference_marked(q, k, v, valid, marked, causal, bias, of_query, of_key)
        if not self.own:
            return super().reference(q, k, v, valid=valid, causal=causal, bias=bias)
        T, S, rows = q.shape[0], k.shape[0], of_query["q"].shape[0]
        options, at = {"valid": valid, "bias": bias}, jnp.arange(S - T, S)[:, None]
        out = dense(q, *self._side(k, v, of_key), pattern=self._near(causal), **options)
        asked = jnp.zeros_like(q).at[max(0, T - S) + jnp.arange(rows)].set(of_query["q"])
        of_global = dense(asked, of_key["k"], of_key["v"], pattern=Causal() if causal else All(), **options)
        return jnp.where((at >= 0) & (at < self.tokens), of_global, out)

    def _near(self, causal: bool) -> Pattern:
        """What the other queries see."""
        pattern = self.near | Global(self.tokens, queries=False)
        return pattern & Causal() if causal else pattern

    def _side(self, k, v, of_key):
        """Keys and values with those of the global positions as the other queries see them."""
        if not self.pieces:
            return k, v
        return (jnp.concatenate([of_key[name], x[len(of_key[name]) :]]) for name, x in (("side_k", k), ("side_v", v)))

    def cost(self, T: int, S: int) -> Cost:
        if not self.own and not self.marks:
            return super().cost(T, S)
        D, H, keys, tokens = self.size.dim, self.size.head, S + self.marks, min(self.tokens, S)
        blocks = self.blocks(T, keys, causal=False)
        pairs = live_pairs(self._near(causal=False), T, keys, *blocks) + (self.marks or tokens) * S
        projected = self.own * (2 * S + tokens * (5 if self.pieces else 1))
        memory = max(largest_array(self._near(causal=False), T, keys, H, blocks), tokens * S)
        state = 0 if self.marks else 2 * (self.slots(S) + self.own * tokens) * H
        return Cost(flops=4 * H * pairs + 2 * D * H * projected, memory=memory, state=state)

    def slots(self, length: int) -> int:
        return min(length, self.tokens + self.reach + 1)

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        self._check_decode()
        cache = super().init_cache(B, length, dtype)
        if not self.own:
            return cache
        rows = jnp.zeros((B, self.size.key_heads, min(self.tokens, length), self.size.head), dtype)
        return cache | {"global_k": rows, "global_v": rows}

    decode_heads_several = MultiHead.decode_heads_several

    def decode_heads(self, cache, call: Call):
        """Keys and values for global queries are kept of the first positions alone: no global query comes later."""
        if not self.own:
            return super().decode_heads(cache, call)
        x = call.x
        assert x is not None
        project = lambda linear: self.heads_of(linear(x))
        rows = cache["global_k"].shape[2]
        at, positions = cache["seen"], jnp.arange(rows)
        first, slot = at < rows, jnp.minimum(at, rows - 1)
        among = self.among_global if self.pieces else self.of_global
        if self.pieces:
            pairs = {"k": call.k, "v": call.v}
            call = call.replace(
                **{name: jnp.where(first, project(self.to_global[name]), new) for name, new in pairs.items()}
            )
        keep = lambda name: jnp.where(first, project(among[name]), cache[f"global_{name}"][:, :, slot])
        of_global = {name: cache[f"global_{name}"].at[:, :, slot].set(keep(name)) for name in "kv"}
        ring = {name: rows for name, rows in cache.items() if not name.startswith("global_")}
        out, ring, carry = super().decode_heads(ring, call)
        filled = (positions <= at) & (positions >= cache["empty"])
        seen = jnp.broadcast_to(filled, (call.q.shape[1], rows))
        pair, query = (of_global["k"], of_global["v"]), project(self.global_query)
        global_out = self.attend_cached(query, *pair, at, positions, seen, call.bias)
        kept = {f"global_{name}": rows for name, rows in of_global.items()}
        return jnp.where(first, global_out, out), ring | kept, carry


class Longformer(GlobalTokens):
    """Longformer: a sliding window and global tokens (Beltagy et al., 2020, arXiv 2004.05150, section 3).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= window dilation with (t - s) mod dilation = 0, and
    over s < tokens; the first `tokens` positions see every key, by q', k' and v' of their own projections.

    The published window counts both sides together; here it is one side.
    With where=marked the task chooses them, as in the paper: those that it marks take the place of s < tokens.

    Deviations from the paper: a dilation is that of a layer, where the paper gives it to two heads of the higher ones.
    Rotary positions leave q' and k' as they are, as if all stood at position 0.

    Options:
        window: keys seen on each side of a query, besides itself
        tokens: positions that see every key and are seen by every query; with where=marked at most
        dilation: distance between neighbouring keys of the window
        projections: own: global queries use projections of their own, as in the paper; shared: those of all others;
            none: own
        where: first: the first positions; marked: those that the task marks, which does not decode
    """

    later_options: ClassVar = ("where",)

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T (window + tokens) H)",
        memory="O(S (H + tokens))",
        decoding="a ring of window dilation + 1 keys and values, and the global tokens'",
        time_note=", with projections=own also two more projections of every position",
    )

    def __init__(
        self,
        size: Size,
        *,
        window: int = 128,
        tokens: int = 1,
        dilation: int = 1,
        projections: Literal["own", "shared"] | None = None,
        where: Where = "first",
        rngs: nnx.Rngs,
    ):
        if window < 1:
            raise Refused(f"window must be at least 1, got {window}")
        if dilation < 1:
            raise Refused(f"dilation must be at least 1, got {dilation}")
        if projections == "own" and not tokens:
            raise Refused("projections=own are those of global tokens, and tokens=0 leaves none")
        near = Band(window) if dilation == 1 else dilated_band(window, dilation)
        reach, own = window * dilation, projections != "shared"
        super().__init__(size, near, tokens=tokens, reach=reach, own=own, where=where, rngs=rngs)
        self.window = window

    @staticmethod
    def limit(length: int):
        return {"window": length, "projections": "shared"}
