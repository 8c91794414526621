"""All heads of a layer: projections, positions and caches around what a mechanism makes of queries, keys and values."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._base.attention import Attention
from xformers_lab.attention._base.cache import ShiftedBias, one_by_one, pushed
from xformers_lab.attention._base.call import Call, Method, shown
from xformers_lab.attention._base.refusals import why_not_decode
from xformers_lab.attention._base.samples import apart, step_apart
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Absent
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size


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
    ) -> tuple[jax.Array, Any, Aux]:
        """`attend_heads` of a `Call` with these fields."""
        self.check_documents(documents)
        return self.attend_heads(Call(q, k, v, x, x_q, valid, causal, bias, carry, key, method, documents))

    def __call__(
        self, x, memory=None, *, valid=None, causal=False, position=None, carry=None, key=None, documents=None
    ):
        source = x if memory is None else memory
        k, v = self.heads_of(self.key(source)), self.heads_of(self.value(source))
        options = {"valid": valid, "causal": causal, "position": position, "carry": carry, "key": key}
        options["documents"] = documents
        return self.attend_projected(x, k, v, source, **options)

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
    ):
        """`__call__` of x (B, T, D) on keys and values that were projected before, (B, S, K, H), of source (B, S, D).

        at (): the position of x's first row, where the rows that a mechanism sees are a part of the text; none: S - T.
        Keys before position 0 are not valid.
        """
        self.check_documents(documents)
        q, bias, run = self.heads_of(self.query(x)), None, self.attend_heads
        T, S = q.shape[1], k.shape[1]
        if position is not None:
            self.check_position(position)
            before = 0 if at is None else at - (S - T)  # positions that came before the first key
            q_at, k_at = jnp.arange(T) + S - T + before, jnp.arange(S) + before
            if position.key_terms is None:
                bias = position.bias()
                if bias is not None and at is not None:
                    bias = ShiftedBias(bias, jnp.full(self.size.heads, -before))
            else:
                bias = self._compared(position, position.of_queries(q, q_at), position.of_keys(k, k_at), S - T)
                run = functools.partial(apart, self)
            q, k = position.share * position.rotate(q, q_at), position.rotate(k, k_at)
        call = Call(q, k, v, source, x, valid, causal, bias, carry, key, documents=documents)
        out, carry, aux = run(shown(self, call))
        return self.out(out.reshape(*out.shape[:2], -1)), carry, aux

    def heads_of(self, y) -> jax.Array:
        """(..., heads H) -> (..., heads, H)."""
        return y.reshape(*y.shape[:-1], -1, self.size.head)

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
        """The cache is that of `init_cache`, or with a position that compares tokens {"own": that, "of_keys": (B,
        length, N, key_terms), what the position says of keys}.
        """
        self._check_decode()
        q, k, v = (self.heads_of(project(x)) for project in (self.query, self.key, self.value))
        own, of_keys, bias, run = cache, None, None, self.decode_heads
        if position is not None:
            self.check_position(position)
            if position.key_terms is None:
                bias = position.bias()
            else:
                if "of_keys" not in cache:
                    name = type(position).__name__.lower()
                    raise Refused(f"{name} needs `key_terms` of the model's blocks to decode")
                new = position.of_keys(k[:, None], at[None])[:, 0]
                own, of_keys = cache["own"], cache["of_keys"].at[:, at].set(new)
                bias = self._compared(position, position.of_queries(q[:, None], at[None]), of_keys, at)
                run = functools.partial(step_apart, self)
            q, k = (position.rotate(y[:, None], at[None])[:, 0] for y in (q, k))
            q = position.share * q
        out, own, carry = run(own, Call(q, k, v, x, bias=bias, carry=carry))
        out = self.out(out.reshape(len(x), -1))
        return out, own if of_keys is None else {"own": own, "of_keys": of_keys}, carry

    def decode_several(self, x, cache, *, at, position=None):
        if not self.projects or (position is not None and position.key_terms is not None):
            return super().decode_several(x, cache, at=at, position=position)
        q, k, v = (self.heads_of(project(x)) for project in (self.query, self.key, self.value))
        bias = None
        if position is not None:
            self.check_position(position)
            bias, places = position.bias(), at + jnp.arange(x.shape[1])
            q, k = position.share * position.rotate(q, places), position.rotate(k, places)
        out, cache = self.decode_heads_several(cache, Call(q, k, v, x, bias=bias))
        return self.out(out.reshape(*x.shape[:2], -1)), cache

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
        if self.keeps_keys and not why_not_decode(type(self)) and cache["k"].shape[1] >= call.q.shape[1]:
            cache, call = pushed(cache, call)
            return self.attend_heads(call)[0], cache
        one = lambda cache, token, _: self.decode_heads(cache, call.replace(**token))[:2]
        return one_by_one(one, {"q": call.q, "k": call.k, "v": call.v, "x": call.x}, cache, 0)

    def _check_decode(self) -> None:
        if reason := why_not_decode(type(self)):
            raise Refused(reason)
