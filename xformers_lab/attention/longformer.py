from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead
from xformers_lab.attention._base.patterned import Patterned, near_block
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.chunks import largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.pattern import All, Band, Causal, Global, Pattern, dilated_band
from xformers_lab.attention._engine.softmax import softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class GlobalTokens(Patterned):
    """A near pattern, and the first `tokens` positions, which see every key and are seen by every query.

    own: global queries have projections of their own, for themselves and for every key and value that they look at.
    pieces: besides, the keys and values of global positions are projected once more for one another, and once more for
    the other queries. All are projected from the block's input. `reach`: how far back the near pattern looks.
    """

    refuses: ClassVar = {"documents": "its global tokens are the first positions of the row"}

    def __init__(
        self, size: Size, near: Pattern, *, tokens: int, reach: int, own: bool, pieces: bool = False, rngs: nnx.Rngs
    ):
        if tokens < 0:
            raise Refused(f"tokens must be at least 0, got {tokens}")
        super().__init__(size, near | Global(tokens) if tokens else near, rngs=rngs)
        self.near, self.tokens, self.reach, self.kept = near, tokens, reach, tokens
        self.own, self.pieces = own and tokens > 0, pieces and own and tokens > 0
        project = lambda heads: Linear(size.dim, heads * size.head, use_bias=False, dtype=size.dtype, rngs=rngs)
        pair = lambda: {"k": project(size.key_heads), "v": project(size.key_heads)}
        if self.own:
            self.global_query, self.of_global = project(size.heads), nnx.Dict(pair())
        if self.pieces:
            self.among_global, self.to_global = nnx.Dict(pair()), nnx.Dict(pair())

    def why_no_kernel(self):
        return "its global queries have keys and values of their own" if self.own else None

    def refusals(self):
        reason = "global queries see values of another projection; projections=shared has a map"
        return {**super().refusals(), **({"map": reason} if self.own else {})}

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
        pairs, first = {name: linear(x) for name, linear in self.of_global.items()}, x[:, : self.tokens]
        if self.pieces:
            among = {name: linear(first) for name, linear in self.among_global.items()}
            pairs = {name: jnp.concatenate([among[name], rows[:, self.tokens :]], 1) for name, rows in pairs.items()}
            pairs |= {f"side_{name}": linear(first) for name, linear in self.to_global.items()}
        return {"of_key": {name: self._heads(rows, x) for name, rows in pairs.items()}}

    def _heads(self, y, x):
        """(..., heads H) -> (..., N, H) in x's type, keys and values repeated for the query heads that share them."""
        y = y.reshape(*y.shape[:-1], -1, self.size.head).astype(x.dtype)
        return jnp.repeat(y, self.size.heads // y.shape[-2], -2)

    def attend(self, q, k, v, *, valid=None, causal, bias=None, of_query, of_key):
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

    def reference(self, q, k, v, *, valid=None, causal, bias=None, of_query, of_key):
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
        if not self.own:
            return super().cost(T, S)
        D, H, blocks, tokens = self.size.dim, self.size.head, self.blocks(T, S, causal=False), min(self.tokens, S)
        pairs = live_pairs(self._near(causal=False), T, S, *blocks) + tokens * S
        projected = 2 * S + tokens * (5 if self.pieces else 1)
        memory = max(largest_array(self._near(causal=False), T, S, H, blocks), tokens * S)
        return Cost(
            flops=4 * H * pairs + 2 * D * H * projected,
            memory=memory,
            state=2 * (self.slots(S) + self.own * tokens) * H,
        )

    def slots(self, length: int) -> int:
        return min(length, self.tokens + self.reach + 1)

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
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
    Deviations from the paper: global tokens are the first positions of the sequence, not chosen by a task; a dilation
    is that of a layer, where the paper gives it to two heads of the higher ones. Rotary positions leave q' and k' as
    they are, as if all stood at position 0.

    Options:
        window: keys seen on each side of a query, besides itself
        tokens: first positions that see every key and are seen by every query
        dilation: distance between neighbouring keys of the window
        projections: own: global queries use projections of their own, as in the paper; shared: those of all others;
            none: own
    """

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
        super().__init__(size, near, tokens=tokens, reach=reach, own=own, rngs=rngs)
        self.window = window

    @staticmethod
    def limit(length: int):
        return {"window": length, "projections": "shared"}
