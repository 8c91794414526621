"""All heads of a layer: projections, positions and caches around what a mechanism makes of queries, keys and values."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._base.attention import Attention
from xformers_lab.attention._base.cache import ShiftedBias, one_by_one, pushed
from xformers_lab.attention._base.call import Call, Method, shown
from xformers_lab.attention._base.prepared import (
    FirstValues,
    HeadNorm,
    HeadNorms,
    LogLength,
    LogScale,
    ShortConvs,
    ValueMix,
    counted,
)
from xformers_lab.attention._base.refusals import why_not_decode
from xformers_lab.attention._base.samples import apart, step_apart
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Absent
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size
from xformers_lab.nn.token_shift import TokenShift, one_before


class MultiHead(Attention):
    """A subclass defines `attend_heads(call)`, for all heads of a batch at once.

    Decoding keeps every key and value, newest last, and attends with one query. A mechanism that keeps something else
    says `keeps_keys = False` and defines `init_cache` and `decode_heads`.
    """

    projects: ClassVar[bool] = True
    decodes: ClassVar[bool] = True
    keeps_keys: ClassVar[bool] = True
    # Whether heads add up values of their own besides, of no position, as persistent vectors are.
    own_values: ClassVar[bool] = False
    # What goes by places in the row of keys, of a mechanism that cannot leave any of them empty in decoding.
    on_places: ClassVar[str] = ""
    # What stands between projections and mechanism, where `prepare` was asked for it.
    convs: ShortConvs | None = None
    head_norm: HeadNorm | None = None
    log_scale: LogScale | None = None
    # What a projection reads of the position before, in mixes `query`, `key` and `value`; a constructor sets it.
    token_shift: TokenShift | None = None

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "__call__" in vars(cls) and cls.projects:
            raise TypeError(f"{cls.__name__} defines __call__, a layer of its own: it must say projects = False")

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.query, self.key, self.value = (
            Linear(size.dim, heads * size.head, use_bias=False, dtype=size.dtype, rngs=rngs)
            for heads in (size.heads, size.key_heads, size.key_heads)
        )
        self.out = Linear(size.heads * size.head, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)

    @required
    def attend_heads(self, call: Call) -> tuple[jax.Array, Any, Aux]:
        """What all heads of a batch give.

        Returns:
            (B, T, N, H), the carry for the layer above, auxiliary results.

        Raises:
            Refused: The mechanism has no place for what is asked.
        """
        ...

    def summed(self, v) -> jax.Array:
        """What a mean adds up, made of each value (..., K, H) alone: the value itself, unless a mechanism says more."""
        return v

    def finish(self, mean, call: Call) -> jax.Array:
        """What heads give, made of their weighted means (B, T, N, H), whatever stands behind these. A call with
        `values` ends before it."""
        return mean

    def values_of(self, call: Call) -> jax.Array:
        """What the means of a call add up, (B, S, K or N, H)."""
        return self.summed(call.v)

    def with_values(self, call: Call, values) -> Call:
        """The call with other `values_of`; a mechanism that reads more off v than what it adds up keeps v."""
        return call.replace(v=values, values=values)

    def mix(
        self,
        q,
        k,
        v,
        *,
        x=None,
        x_q=None,
        valid=None,
        causal: bool = False,
        bias=None,
        carry=None,
        key=None,
        method: Method = "attend",
        documents=None,
        marked=None,
        pair_values=None,
    ) -> tuple[jax.Array, Any, Aux]:
        """`attend_heads` of a `Call` with these fields."""
        self.check_documents(documents)
        call = Call(q, k, v, x, x_q, valid, causal, bias, carry, key, method, documents, marked=marked)
        call = call.replace(pair_values=pair_values)
        return self.attend_heads(call)

    def __call__(
        self,
        x,
        memory=None,
        *,
        valid=None,
        causal=False,
        position=None,
        carry=None,
        key=None,
        documents=None,
        marked=None,
    ):
        source = x if memory is None else memory
        k, v = (self._of_rows(name, source, valid, documents) for name in ("key", "value"))
        v, carry, first = self._with_first(v, carry)
        options = {"valid": valid, "causal": causal, "position": position, "carry": carry, "key": key}
        options |= {"documents": documents, "marked": marked}
        out, carry, aux = self.attend_projected(x, k, v, source, **options)
        return out, carry if self.first_values is None else (carry, first), aux

    def _with_first(self, v, carry) -> tuple[jax.Array, Any, Any]:
        """Values with those of the first layer, the mechanism's own carry, and the first layer's for that above."""
        if self.first_values is None:
            return v, carry, None
        own, first = carry
        v, first = self.first_values(v, first)
        return v, own, first

    def no_values(self, B: int, T: int) -> Any:
        """What stands for the first layer's values below it."""
        shape = (B, T, self.size.key_heads, self.size.head)
        return jnp.zeros(shape, self.size.dtype), jnp.zeros((), jnp.int32)

    def attend_projected(
        self,
        x,
        k,
        v,
        source,
        *,
        valid=None,
        causal=False,
        position=None,
        carry=None,
        key=None,
        at: Any = None,
        documents=None,
        marked=None,
    ):
        """`__call__` of x (B, T, D) on keys and values that were projected before, (B, S, K, H), of source (B, S, D),
        keys before their norm. Where queries are convolved or read the position before, x is the last T rows of source.

        at (): the position of x's first row, where the rows that a mechanism sees are a part of the text; none: S - T.
        Keys before position 0 are not valid.
        """
        self.check_documents(documents)
        T, S, bias, pairs, run = x.shape[1], k.shape[1], None, None, self.attend_heads
        # A convolution or a shift of queries sees what stands in front of the first, in what a memory holds.
        reach = (0 if self.convs is None else self.convs.before) + (0 if self.token_shift is None else 1)
        before = max(0, min(S - T, reach))
        last = lambda rows: None if rows is None else rows[:, S - T - before :]
        q = self._of_rows("query", last(source) if before else x, last(valid), last(documents))[:, before:]
        q, k = self._normed(q, k)
        if self.log_scale is not None:
            q = self.log_scale(q, self.key_counts(T, S, valid, documents, causal))
        if position is not None:
            self.check_position(position)
            pairs = position.pair_values()
            passed = 0 if at is None else at - (S - T)  # positions that came before the first key
            q_at, k_at = jnp.arange(T) + S - T + passed, jnp.arange(S) + passed
            if position.key_terms is None:
                bias = position.bias()
                if bias is not None and at is not None:
                    bias = ShiftedBias(bias, jnp.full(self.size.heads, -passed))
            else:
                bias = self._compared(position, position.of_queries(q, q_at), position.of_keys(k, k_at), S - T)
                run = functools.partial(apart, self)
            q, k = position.share * position.rotate(q, q_at), position.rotate(k, k_at)
        rest: dict[str, Any] = {"documents": documents, "marked": marked, "pair_values": pairs}
        call = Call(q, k, v, source, x, valid, causal, bias, carry, key, **rest)
        out, carry, aux = run(shown(self, call))
        return self.out(out.reshape(*out.shape[:2], -1)), carry, aux

    def heads_of(self, y) -> jax.Array:
        """(..., heads H) -> (..., heads, H)."""
        return y.reshape(*y.shape[:-1], -1, self.size.head)

    def contents(self, x, states, known) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries of x (B, T, D), keys and values of states (B, S, D) that are known (B, S) bool, by heads and without
        a position: what is compared by content alone."""
        k, v = (self._of_rows(name, states, known, None) for name in ("key", "value"))
        q, k = self._normed(self._of_rows("query", x, None, None), k)
        if self.log_scale is not None:
            q = self.log_scale(q, counted(x.shape[1], states.shape[1], known, None, False)[..., None])
        return q, k, v

    def _of_rows(self, name: str, rows, valid, documents) -> jax.Array:
        """A projection of whole rows (B, S, D), shifted and convolved where that is asked for, by heads (B, S, heads,
        H)."""
        if self.token_shift is not None:
            rows = self.token_shift(name, rows, one_before(rows, valid=valid, documents=documents))
        y = getattr(self, name)(rows)
        return self.heads_of(y if self.convs is None else self.convs(name, y, valid, documents))

    def _of_next(self, x, tails, at) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """Queries, keys and values of one more token (B, D) at position `at` (), or of T from there on (B, T, D), and
        the tails of convolutions."""
        parts, before = [], x
        if self.token_shift is not None:
            before = tails["input"] if x.ndim == 2 else one_before(x, first=tails["input"])
            tails = tails | {"input": x if x.ndim == 2 else x[:, -1]}
        for name in ("query", "key", "value"):
            y = getattr(self, name)(x if self.token_shift is None else self.token_shift(name, x, before))
            if self.convs is not None:
                y, tails = self.convs.step(name, y, tails)
            parts.append(self.heads_of(y))
        q, k, v = parts
        q, k = self._normed(q, k)
        if self.log_scale is not None:
            rows = jnp.arange(x[0].size // x.shape[-1])
            count = self.next_counts(at + rows, tails["read"][:, None] + 1 + rows)
            q = self.log_scale(q, count if x.ndim == 3 else count[:, 0])
            tails = tails | {"read": tails["read"] + len(rows)}
        return q, k, v, tails

    def key_counts(self, T: int, S: int, valid, documents, causal: bool) -> jax.Array:
        """How many keys each of T queries at the end of S positions may see, (B or 1, T, N or 1)."""
        return counted(T, S, valid, documents, causal)[..., None]

    def next_counts(self, at, count) -> jax.Array:
        """The same of tokens at positions `at` (T,) of which each is the count-th (B, T) that is no padding, all before
        it being known, (B, T, N or 1)."""
        return count[..., None]

    def _normed(self, q, k) -> tuple[jax.Array, jax.Array]:
        """Queries and keys (..., heads, H) as the layer's norm of heads has them."""
        if self.head_norm is None:
            return q, k
        # What stands for a projection that is absent is no vector to normalise. A depth may have keys from elsewhere.
        k = k if isinstance(getattr(self, "key", None), Absent) else self.head_norm.of_keys(k)
        return q if isinstance(self.query, Absent) else self.head_norm.of_queries(q), k

    def prepare(
        self,
        *,
        conv: int | None = None,
        qk_norm: HeadNorms = "none",
        log_n: LogLength = None,
        value_residual: ValueMix = "none",
        causal: bool = False,
    ) -> None:
        if not self.projects:
            return super().prepare(conv=conv, qk_norm=qk_norm, log_n=log_n, value_residual=value_residual)
        if conv is not None:
            if not causal and conv % 2 == 0:
                raise Refused(f"conv={conv}: where both sides are seen it is an odd number: use conv={conv + 1}")
            projections = {name: getattr(self, name) for name in ("query", "key", "value")}
            there = [name for name, layer in projections.items() if not isinstance(layer, Absent)]
            if not there:
                super().prepare(conv=conv)
            size, K = self.size, self.size.key_heads
            channels = {"query": size.heads * size.head, "key": K * size.head, "value": K * size.head}
            self.convs = ShortConvs(conv, {name: channels[name] for name in there}, causal=causal)
        if qk_norm != "none":
            if not self.turns():
                super().prepare(qk_norm=qk_norm)
            self.head_norm = HeadNorm(self.size, qk_norm)
        if log_n is not None:
            if isinstance(self.query, Absent) or not self.accepts("bias"):
                super().prepare(log_n=log_n)
            self.log_scale = LogScale(self.size, log_n)
        if value_residual != "none":
            if isinstance(self.value, Absent):
                super().prepare(value_residual=value_residual)
            self.first_values = FirstValues(value_residual)

    def tails(self, B: int, dtype=jnp.float32):
        kept = {} if self.convs is None else self.convs.tails(B, dtype)
        if self.log_scale is not None:
            kept |= {"read": jnp.zeros(B, jnp.int32)}
        if self.token_shift is not None:
            kept |= {"input": jnp.zeros((B, self.size.dim), dtype)}
        return kept if self._keeps_tails() else None

    def _keeps_tails(self) -> bool:
        return any(part is not None for part in (self.convs, self.log_scale, self.token_shift))

    def _compared(self, position, of_queries, of_keys, first):
        """The bias of every sample, (B, N, ...), from what a position makes of queries (B, T, N, ...) and keys."""
        # A number like any other leaf of a bias, which are differentiated.
        first = jnp.full((len(of_queries), self.size.heads), first, jnp.float32)
        return position.compare(jnp.swapaxes(of_queries, 1, 2), jnp.swapaxes(of_keys, 1, 2), first)

    def turns(self) -> bool:
        return not (isinstance(self.query, Absent) and isinstance(self.key, Absent))

    def initial_carry(self, B: int, T: int, S: int):
        """The carry below the first layer: `init_carry(T, S)` of every head and sample, (B, N, ...)."""
        one = self.init_carry(T, S)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, self.size.heads, *leaf.shape)), one)

    @required
    def init_carry(self, T: int, S: int) -> Any:
        """The carry of one head below the first layer."""

    # ---- decoding ------------------------------------------------------------------------------------------------

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        """What a layer remembers of up to `length` tokens of B sequences."""
        rows = jnp.zeros((B, length, self.size.key_heads, self.size.head), dtype)
        return {"k": rows, "v": rows, "seen": jnp.zeros((), jnp.int32)}

    def begin(self, cache, empty):
        """An empty cache in front of whose first token `empty` () places hold nothing, as a memory that has read little
        yet leaves them -> the cache, and the position () of that token.

        What depends on distances alone numbers from 0. A mechanism that is tied to places counts the empty ones, and
        sees none of them; raises Refused where it cannot, and says in `on_places` why.
        """
        if self.on_places:
            raise Refused(
                f"{type(self).__name__.lower()} cannot decode behind a memory: {self.on_places} by places from the "
                "first key on, which a memory leaves empty at first; use memory=none or another attention"
            )
        return cache, jnp.zeros((), jnp.int32)

    def decode(self, x, cache, *, at, position=None, carry=None):
        """The cache is that of `init_cache`, or {"own": that, and what else there is}: with a position that compares
        tokens "of_keys" (B, length, N, key_terms), what the position says of keys; "tails", what convolutions, the
        scale of scores and a token shift keep.
        """
        self._check_decode()
        compares = position is not None and position.key_terms is not None
        if compares and "of_keys" not in cache:
            raise Refused(f"{type(position).__name__.lower()} needs `key_terms` of the model's blocks to decode")
        kept = cache if compares or self._keeps_tails() else {"own": cache}
        bias, pairs, run = None, None, self.decode_heads
        q, k, v, tails = self._of_next(x, kept.get("tails"), at)
        v, carry, first = self._with_first(v[:, None], carry)
        v = v[:, 0]
        if position is not None:
            self.check_position(position)
            pairs = position.pair_values()
            if position.key_terms is None:
                bias = position.bias()
            else:
                new = position.of_keys(k[:, None], at[None])[:, 0]
                kept = kept | {"of_keys": kept["of_keys"].at[:, at].set(new)}
                bias = self._compared(position, position.of_queries(q[:, None], at[None]), kept["of_keys"], at)
                run = functools.partial(step_apart, self)
            q, k = (position.rotate(y[:, None], at[None])[:, 0] for y in (q, k))
            q = position.share * q
        out, own, carry = run(kept["own"], Call(q, k, v, x, bias=bias, carry=carry, pair_values=pairs))
        carry = carry if self.first_values is None else (carry, first)
        return self.out(out.reshape(len(x), -1)), self._kept(kept, own, tails), carry

    def decode_several(self, x, cache, *, at, position=None):
        if not self.projects or (position is not None and position.key_terms is not None):
            return super().decode_several(x, cache, at=at, position=position)
        kept, bias, pairs = cache if self._keeps_tails() else {"own": cache}, None, None
        q, k, v, tails = self._of_next(x, kept.get("tails"), at)
        if position is not None:
            self.check_position(position)
            bias, pairs, places = position.bias(), position.pair_values(), at + jnp.arange(x.shape[1])
            q, k = position.share * position.rotate(q, places), position.rotate(k, places)
        out, own = self.decode_heads_several(kept["own"], Call(q, k, v, x, bias=bias, pair_values=pairs))
        return self.out(out.reshape(*x.shape[:2], -1)), self._kept(kept, own, tails)

    def _kept(self, before: dict, own, tails):
        """The cache of `decode` with new parts: as the mechanism has it, where nothing else was kept."""
        if before.keys() == {"own"}:
            return own
        return before | {"own": own} | ({} if tails is None else {"tails": tails})

    def decode_heads(self, cache, call: Call):
        """One more token of all heads of a batch: a `Call` without the axis of positions, whose carry is that of this
        token from the layer below -> out (B, N, H), the new cache, the carry for the layer above.

        Raises Refused where the mechanism cannot decode.
        """
        self._check_decode()
        cache, call = pushed(cache, call.as_row())
        if call.carry is None and self.carries():
            call = call.replace(carry=self.initial_carry(call.q.shape[0], 1, call.k.shape[1]))
        out, carry, _ = self.attend_heads(call)
        return out[:, 0], cache, carry

    def decode_heads_several(self, cache, call: Call):
        """T more tokens of all heads of a batch -> out (B, T, N, H) and the new cache: `decode_heads` of each in turn,
        or all of them at once where that comes to the same."""
        if self.keeps_keys and not why_not_decode(self) and cache["k"].shape[1] >= call.q.shape[1]:
            cache, call = pushed(cache, call)
            return self.attend_heads(call)[0], cache
        one = lambda cache, token, _: self.decode_heads(cache, call.replace(**token))[:2]
        return one_by_one(one, {"q": call.q, "k": call.k, "v": call.v, "x": call.x}, cache, 0)

    def rewound(self, before, after, taken, *, read: int):
        """Of keys and values that stand newest last; without short convolutions, which keep too little."""
        if (
            not self.keeps_keys
            or self.convs is not None
            or self.token_shift is not None
            or not before.keys() <= {"k", "v", "x", "seen"}
        ):
            return super().rewound(before, after, taken, read=read)

        def rows(old, new):
            every = jnp.concatenate([old, new[:, -read:]], 1)
            return jax.lax.dynamic_slice_in_dim(every, taken, old.shape[1], 1)

        held = {name: rows(before[name], after[name]) for name in before.keys() - {"seen"}}
        return held | {"seen": before["seen"] + taken}

    def _check_decode(self) -> None:
        if reason := why_not_decode(self):
            raise Refused(reason)
