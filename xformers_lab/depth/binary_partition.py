import bisect
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention._engine.softmax import masked_softmax, softmax_average
from xformers_lab.attention._engine.spans import reach, sees, windows
from xformers_lab.attention.full import Full
from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size

Rows = tuple[jax.Array, jax.Array]  # states of a token and of the spans that may end with it


class BinaryPartition(Fixed):
    """BP-Transformer: the spans of a binary partition have states of their own, which every layer updates beside those
    of the tokens (Ye et al., 2019, arXiv 1911.04070, section 3).

        token t:   out = sum_u softmax_u(q_t . (k_u + a_(u - t)) / sqrt(H)) v_u,    u: t itself and spans that tile the
                   other positions: going away from t on either side, k = nodes spans of 1 position, then k of 2, of 4,
                   and so on
        span g:    out = sum_s softmax_s(q_g . k_s / sqrt(H)) v_s,    s: the positions of the span

    Tokens and spans have the same projections, norms and feed-forward layer; spans are zeros below the first layer, so
    that it makes of them the mean of their tokens. a (H), shared by heads, are learned in every layer: one for t itself
    and one for each side, size of a span and number from t on, so that no position is needed: position=none.

    Causal: a token sees spans that end before it, and a span its own positions, so nothing that comes later. In an
    encoder T tokens have O(k log(T / k)) neighbours each; T spans in all look at O(T log T) positions. "computation"
    counts spans as tokens, about 2 for a layer. Decoding keeps keys and values of tokens and spans; with its last token
    a span is updated in every layer, which takes its length.
    Deviations from the paper: where the first span of a size is half covered, the other half has the vector of its own
    size and the next number; the root, which no token sees, has no state: a sequence is pooled from tokens.

    Options:
        nodes: spans of each size on each side, k in the paper
    """

    # A memory's rows are no positions of the tree.
    own_layers = False
    plain_step = False

    def __init__(self, size: Size, *, nodes: int = 4, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        if nodes < 1:
            raise Refused(f"nodes must be at least 1, got {nodes}")

        def layer(index: int, rngs: nnx.Rngs):
            block = make_block(index, rngs)
            why_not(block)
            block.attention = Tree(block.attention, nodes, rngs=rngs)
            return Layer(block)

        super().__init__(size, make_block=layer, period=period, rngs=rngs)
        self.nodes, self.dim = nodes, size.dim
        self.causal = [*self.periods, *self.rest][0].block.causal

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        (B, T, D), context = x.shape, self._within(context)
        counts = spans_of(T, self.nodes, self.causal)
        rows = jnp.concatenate([x, jnp.zeros((B, sum(counts), D), x.dtype)], 1)
        if context.valid is not None:
            context = dataclasses.replace(context, valid=with_spans(context.valid, counts))
        rows, _, aux = self.run(rows, {}, context, key=key)
        return rows[:, :T], aux | computation(aux.scalars["computation"] * (rows.shape[1] / T))

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Of all layers, and the first states of the spans that may end with a token, one of each size, (1, B, sizes,
        D)."""
        sizes = len(spans_of(length, self.nodes, True))
        return super().init_cache(B, length) | {"spans": jnp.zeros((1, B, sizes, self.dim), jnp.float32)}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        rows = x, cache["spans"][0].astype(x.dtype)
        (x, _), layers, _ = self.run_step(rows, cache["layers"], {}, self._within(context), at=at)
        return x, cache | {"layers": layers}

    def _within(self, context: Context) -> Context:
        """What layers are told: rows are no tokens, and places of rows no positions."""
        if context.source is not None:
            raise Refused("this depth has no place for cross-attention: use depth=fixed or model=decoder")
        for number in range(self.layers):
            position = context.position.of_layer(number)
            if position.turns or position.key_terms is not None or position.bias() is not None:
                raise Refused(
                    f"position={type(position).__name__.lower()} tells queries from keys by their places, and here "
                    "keys are spans, whose places this depth learns: use position=none, sinusoidal or learned"
                )
        return dataclasses.replace(context, position=None, tokens=None, marked=None)


def why_not(block: Any) -> None:
    """Raises Refused where a block's attention is not what tokens and spans do here."""
    attention = block.attention
    if type(attention) is not Full:
        raise Refused(
            f"attention={block.name}: this depth has tokens and spans look at one another along a tree, by a softmax "
            "over what they see of it: use attention=full, or attention=bp with depth=fixed"
        )
    if block.ffn is not None and block.ffn.looks_back:
        raise Refused(f"ffn={block.ffn_choice} looks back, and here spans stand behind the tokens: use ffn=mlp")
    for name, part in {
        "conv": attention.convs,
        "log_n": attention.log_scale,
        "value_residual": attention.first_values,
    }.items():
        if part is not None:
            raise Refused(f"{name} goes by positions, and here keys are spans, too: leave it out")


class Layer(nnx.Module):
    """A block on tokens and spans, side by side as rows (B, T + spans, D)."""

    def __init__(self, block: Any):
        self.block = block

    def __call__(
        self, x: jax.Array, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any], Aux]:
        return self.block(x, carries, context, key=key)

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return {}

    def init_cache(self, B: int, length: int) -> tuple[dict[str, jax.Array], ...]:
        return self.block.attention.init_cache(B, length, self.block.dtype)

    def step(
        self, x: Rows, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[Rows, Any, dict[str, Any]]:
        token, spans = x
        before = self.block.attention_norm.before
        y, known = self.block.attention.step_token(before(token, LayerContext()), cache, at)
        graph, variables = nnx.split(self)
        states = []
        for size in range(1, len(known)):

            def whole(state, kept, size=size):
                """The span's last token: its state is that of the layer, and its keys are seen from now on."""
                layer = nnx.merge(graph, variables)
                y = layer.block.attention_norm.before(state, LayerContext())
                y, kept = layer.block.attention.step_span(y, known[0], kept, at >> size, size)
                return layer._after(state, y, context), kept

            ends, state = (at + 1) % (1 << size) == 0, spans[:, size - 1]
            state, known[size] = lax.cond(ends, whole, lambda *unchanged: unchanged, state, known[size])
            states.append(state)
        spans = jnp.stack(states, 1) if states else spans
        return (self._after(token, y, context), spans), tuple(known), carries

    def _after(self, x: jax.Array, y: jax.Array, context: Context) -> jax.Array:
        """What attention gave of a row (B, D) and the feed-forward layer on it."""
        x = self.block.attention_norm.after(x, y, LayerContext())
        if self.block.ffn is None:
            return x
        y, _ = self.block.step_ffn(x, {}, context, None)
        return self.block.ffn_norm.after(x, y, LayerContext())


class Tree(nnx.Module):
    """In the place of a block's attention: tokens look at spans, and spans at their tokens.

    table (1 + 2 (nodes + 1) sizes, H): what is added to the keys that a token sees, by where they are.
    """

    marks, first_values = 0, None

    def __init__(self, full: Full, nodes: int, *, rngs: nnx.Rngs):
        sizes = full.size.length.bit_length() + 1
        draw = nnx.initializers.normal(0.02)
        self.full, self.nodes, self.size = full, nodes, full.size
        self.table = nnx.Param(draw(rngs.params(), (1 + 2 * (nodes + 1) * sizes, full.size.head)), decays=False)

    def carries(self) -> bool:
        return False

    def __call__(
        self, x: jax.Array, memory: None = None, *, valid: jax.Array | None = None, causal: bool = False, **options: Any
    ) -> tuple[jax.Array, None, Aux]:
        """x (B, T + spans, D) -> the same; `options`, whatever else a layer is called with, pass by."""
        T = tokens_of(x.shape[1], self.nodes, causal)
        q, k, v = self._heads(x)
        table = self.table[...].astype(x.dtype)
        one = functools.partial(_attend, T=T, nodes=self.nodes, causal=causal)
        one = jax.vmap(jax.checkpoint(one), (1, 1, 1, None, None), 1)  # the heads of a sequence
        out = jax.vmap(one, (0, 0, 0, None if valid is None else 0, None))(q, k, v, valid, table)
        return self.full.out(out.reshape(*x.shape[:2], -1)), None, Aux()

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of rows (B, R, D), (B, R, N, H) each."""
        q, k, v = self.full.contents(x, x, jnp.ones(x.shape[:2], bool))
        shared = self.size.heads // self.size.key_heads
        return q, jnp.repeat(k, shared, 2), jnp.repeat(v, shared, 2)

    # ---- decoding --------------------------------------------------------------------------------------------------

    def init_cache(self, B: int, length: int, dtype: Any) -> tuple[dict[str, jax.Array], ...]:
        """Keys and values of tokens, and of the spans of each size."""
        counts = [length, *spans_of(length, self.nodes, True)]
        zeros = [jnp.zeros((B, count, self.size.heads, self.size.head), dtype) for count in counts]
        return tuple({"k": rows, "v": rows} for rows in zeros)

    def step_token(self, y: jax.Array, cache: tuple, at: jax.Array) -> tuple[jax.Array, list]:
        """A token y (B, D), normalised, at position `at` () -> (B, D), and the cache with its keys and values."""
        q, k, v = (rows[:, 0] for rows in self._heads(y[:, None]))
        own = {"k": cache[0]["k"].at[:, at].set(k), "v": cache[0]["v"].at[:, at].set(v)}
        known = [own, *cache[1:]]
        keys, values, seen, kinds = [], [], [], []
        for size, rows in enumerate(known):
            count, before = rows["k"].shape[1], reach(self.nodes, at, size)[1]
            # On a size one more may be seen than there are nodes, and of tokens the one itself.
            width = min(count, self.nodes + 1 + (size == 0))
            start = jnp.clip(before - (self.nodes + 1), 0, count - width)
            index = start + jnp.arange(width)
            part = lambda array, start=start, width=width: lax.dynamic_slice_in_dim(array, start, width, 1)
            keys.append(part(rows["k"]))
            values.append(part(rows["v"]))
            seen.append(sees(self.nodes, at, index, size))
            kinds.append(_kind(self.nodes, at, index, size))
        keys, values = jnp.concatenate(keys, 1), jnp.concatenate(values, 1)
        s = jnp.einsum("bnh,bsnh->bns", q, keys, preferred_element_type=jnp.float32)
        added = jnp.einsum("bnh,ah->bna", q, self.table[...].astype(q.dtype), preferred_element_type=jnp.float32)
        s = (s + added[..., jnp.concatenate(kinds)]) * self.size.head**-0.5
        p = masked_softmax(s, jnp.concatenate(seen))
        out = jnp.einsum("bns,bsnh->bnh", p.astype(v.dtype), values)
        return self.full.out(out.reshape(len(y), -1)), known

    def step_span(
        self, y: jax.Array, tokens: dict, spans: dict, index: jax.Array, size: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The span y (B, D), normalised, which has the number `index` () of 2**size positions, all of whose tokens are
        known -> (B, D), and the keys and values of its size with its own."""
        q, k, v = (rows[:, 0] for rows in self._heads(y[:, None]))
        inside = lambda array: lax.dynamic_slice_in_dim(array, index << size, 1 << size, 1)
        s = jnp.einsum("bnh,bsnh->bns", q, inside(tokens["k"]), preferred_element_type=jnp.float32)
        p = jax.nn.softmax(s * self.size.head**-0.5, -1)
        out = jnp.einsum("bns,bsnh->bnh", p.astype(v.dtype), inside(tokens["v"]))
        spans = {"k": spans["k"].at[:, index].set(k), "v": spans["v"].at[:, index].set(v)}
        return self.full.out(out.reshape(len(y), -1)), spans


@functools.lru_cache(maxsize=256)
def spans_of(T: int, nodes: int, causal: bool) -> tuple[int, ...]:
    """How many spans of 2, 4, 8 and so on positions T tokens have, up to the largest that any of them sees."""
    largest = max(window.level for window in windows(nodes, T, T, causal)[1])
    return tuple((T + (1 << size) - 1) >> size for size in range(1, largest + 1))


@functools.lru_cache(maxsize=256)
def tokens_of(rows: int, nodes: int, causal: bool) -> int:
    """How many of so many rows are tokens."""
    return 1 + bisect.bisect_left(range(1, rows + 1), rows, key=lambda T: T + sum(spans_of(T, nodes, causal)))


def with_spans(valid: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Which tokens are valid (B, T) -> the same of tokens and spans: those that hold a valid token."""
    parts, last = [valid], valid
    for count in counts:
        last = jnp.pad(last, ((0, 0), (0, 2 * count - last.shape[1]))).reshape(len(valid), count, 2).any(-1)
        parts.append(last)
    return jnp.concatenate(parts, 1)


def _kind(nodes: int, at: Any, index: Any, size: int) -> jax.Array:
    """The row of the table for the spans of 2**size positions that queries see, by their index."""
    _, before, after, _ = reach(nodes, at, size)
    right = index >= after
    number = jnp.clip(jnp.where(right, index - after, before - 1 - index), 0, nodes)
    kind = 1 + (2 * size + right) * (nodes + 1) + number
    return jnp.where((index == at) & (size == 0), 0, kind)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    table: jax.Array,
    *,
    T: int,
    nodes: int,
    causal: bool,
) -> jax.Array:
    """One head of one sequence, tokens and spans of each size one after the other (T + spans, H) -> (T + spans, H)."""
    counts, H = [T, *spans_of(T, nodes, causal)], q.shape[1]
    first = [sum(counts[:size]) for size in range(len(counts))]
    out = [_of_tokens(q[:T], k, v, valid, table, first, counts, nodes, causal)]
    for size in range(1, len(counts)):
        count, width = counts[size], 1 << size
        inside = lambda rows, count=count, width=width: jnp.pad(
            rows[:T], [(0, count * width - T)] + [(0, 0)] * (rows.ndim - 1)
        ).reshape(count, width, *rows.shape[1:])
        own = q[first[size] : first[size] + count] * H**-0.5
        s = jnp.einsum("gh,gsh->gs", own, inside(k), preferred_element_type=jnp.float32)
        p = masked_softmax(s, inside(jnp.ones(len(q), bool) if valid is None else valid))
        out.append(jnp.einsum("gs,gsh->gh", p.astype(v.dtype), inside(v)))
    return jnp.concatenate(out)


def _of_tokens(q, k, v, valid, table, first, counts, nodes: int, causal: bool) -> jax.Array:
    """What tokens (T, H) see of tokens and spans: the queries of a block share windows of spans of every size."""
    T, H = q.shape
    block, shared = windows(nodes, T, T, causal)
    at = jnp.arange(T + -T % block).reshape(-1, block, 1)
    slabs, seen, kinds = [], [], []
    for window in shared:
        size, starts = window.level, window.starts
        rows = slice(first[size], first[size] + counts[size])
        take = lambda x, starts=starts, width=window.width: jax.vmap(
            lambda start: lax.dynamic_slice_in_dim(x, start, width)
        )(starts)
        slabs.append(take(jnp.concatenate([k[rows], v[rows]], 1)))
        index = (starts[:, None] + jnp.arange(window.width))[:, None]
        live = sees(nodes, at, index, size, left=window.left, right=window.right)
        seen.append(live if valid is None else live & take(valid[rows])[:, None])
        kinds.append(jnp.broadcast_to(_kind(nodes, at, index, size), live.shape))
    slab = jnp.concatenate(slabs, 1)
    queries = jnp.pad(q * H**-0.5, ((0, -T % block), (0, 0))).reshape(-1, block, H).astype(q.dtype)
    s = jnp.einsum("bqh,bkh->bqk", queries, slab[..., :H], preferred_element_type=jnp.float32)
    added = jnp.einsum("bqh,ah->bqa", queries, table, preferred_element_type=jnp.float32)
    s = s + jnp.take_along_axis(added, jnp.concatenate(kinds, 2), 2)
    return jax.vmap(softmax_average)(s, jnp.concatenate(seen, 2), slab[..., H:]).reshape(-1, H)[:T]
