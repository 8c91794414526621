"""The shelf of attention mechanisms, and the contract each of them keeps.

A mechanism is one file with one class, a subclass of `Attention`, that says what one head of one sequence does:

    attend(q, k, v, *, real, causal, bias=None)      (T, H) (S, H) (S, H) -> (T, H), the fast form
    reference(q, k, v, *, real, causal, bias=None)   the same by definition, O(T S), obviously right
    cost(T, S)                                       declared matmul FLOPs, memory and state, checked against counts

The signature of `attend` is the declaration. One that cannot be causal has no `causal`; one that has no scores to bias
has no `bias`; one that draws random numbers takes `key`; one that needs the block's input takes `x` (S, D); one that
shares something with the same mechanism in the layer below takes `carry` and returns (out, carry), and defines
`init_carry(T, S)`. Whatever else it takes it names itself: `per_head()` gives arrays for each head (parameters, say),
`from_keys(x)` and `from_queries(x)` give arrays for each head of each position, computed from the block's input (gates,
step sizes). The lab adds heads, batch, grouped key/value heads, projections and devices, and refuses what a signature
cannot do.

Causal is aligned at the end: query t stands at position S - T + t. real (S,) bool marks keys that are no padding (a
mechanism that writes `real=None` gets None where nothing is padded); a query that may see no key gets zeros. bias,
where given, is called with broadcasting query and key positions, (T', 1) and (1, S').

A mechanism that is not per head, or adds auxiliary scalars, overrides `mix` on (B, T, N, H); one without these
projections overrides `__call__` on (B, T, D).

Decoding works by itself wherever a mechanism only depends on distances: keys and values are kept, and `attend` is
called with one query. `init_state` and `step` say it better for one head, `init_cache` and `mix_step` for a layer. What
is tied to places in the row of keys says in `begin` how it decodes behind places that are empty.

Before it first runs a placement may ask it to make its values smaller, `damp(share)`: one whose values pass other first
weights than those of the layers `value` and `out` says which.

The docstring is the page of the catalogue; its lines `Kind: ...` (one of KINDS), `Time O(...)`, `decoding keeps ...`,
and where they apply `Not causal: reason`, `Not causal with option=value: reason`, `One way: reason`, `Not cross:
reason`, `No bias: reason` and `No decoding: reason` are read.
"""

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._engine.absent import Absent
from xformers_lab.attention._heads import over_heads
from xformers_lab.attention._samples import apart, step_apart
from xformers_lab.damping import damp
from xformers_lab.linear import Linear
from xformers_lab.size import Size

# What the lab can hand to `attend`; every other parameter must be named by `per_head`.
GIVEN = ("real", "causal", "bias", "carry", "x", "key")
# The families of the survey (Lin et al., 2021, section 4) and what came since.
KINDS = (
    "full",
    "sparse by position",
    "sparse by content",
    "linearised",
    "memory compression",
    "low rank",
    "prior",
    "multi-head",
    "without attention",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one head declares for T queries and S keys: matmul FLOPs of the forward pass, elements of the largest
    intermediate array, and elements of the state that decoding keeps."""

    flops: float
    memory: float
    state: float


class Attention(nnx.Module):
    """Projections around one mechanism; a subclass adds `attend`, `reference` and `cost`."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.size = size
        self.query, self.key, self.value = (
            Linear(size.dim, heads * size.head, use_bias=False, dtype=size.dtype, rngs=rngs)
            for heads in (size.heads, size.key_heads, size.key_heads)
        )
        self.out = Linear(size.heads * size.head, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)

    def damp(self, share: float) -> None:
        """Multiplies by `share` the first weights that values pass, `value` and `out`, and none of scores."""
        damp(share, *(getattr(self, name) for name in ("value", "out") if hasattr(self, name)))

    def __call__(self, x, memory=None, *, real=None, causal=False, position=None, carry=None, key=None):
        """(B, T, D) and optional keys' source (B, S, D) -> (B, T, D), the carry for the layer above, auxiliary scalars.

        real (B, S) bool or None where nothing is padded. position gives `rotate(x, at)` and `share`, and `bias()` or
        what makes a bias of every sample (see position/__init__.py), with which samples are run apart.
        """
        source = x if memory is None else memory
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.size.head)
        given = {"real": real, "causal": causal, "position": position, "carry": carry, "key": key}
        return self.look_at(x, heads(self.key(source)), heads(self.value(source)), source, **given)

    def look_at(self, x, k, v, source, *, real=None, causal=False, position=None, carry=None, key=None, at: Any = None):
        """`__call__` of x (B, T, D) on keys and values that were projected before, (B, S, K, H), of source (B, S, D).

        at (): the position of x's first row, where the rows that a mechanism sees are a part of the text; none: S - T.
        Keys before position 0 are not real.
        """
        q = self.query(x).reshape(*x.shape[:2], -1, self.size.head)
        bias, T, S, mix = None, q.shape[1], k.shape[1], self.mix
        if position is not None:
            self.check_position(position)
            before = 0 if at is None else at - (S - T)  # positions that came before the first key
            q_at, k_at = jnp.arange(T) + S - T + before, jnp.arange(S) + before
            if position.kept is None:
                bias = position.bias()
                if bias is not None and at is not None:
                    bias = Behind(bias, jnp.full(self.size.heads, -before))
            else:
                bias = self._compared(position, position.of_queries(q, q_at), position.of_keys(k, k_at), S - T)
                mix = functools.partial(apart, self)
            q, k = position.share * position.rotate(q, q_at), position.rotate(k, k_at)
        given = {"real": real, "causal": causal, "bias": bias, "carry": carry, "key": key}
        out, carry, aux = mix(q, k, v, x=source, x_q=x, **given)
        return self.out(out.reshape(*out.shape[:2], -1)), carry, aux

    def mix(
        self, q, k, v, *, x=None, x_q=None, real=None, causal=False, bias=None, carry=None, key=None, method="attend"
    ):
        """All heads of a batch: q (B, T, N, H), k and v (B, S, K, H) -> (B, T, N, H), the carry, auxiliary scalars.

        x (B, S, D) is the block's input that keys and values came from, x_q (B, T, D) the queries' (default: the last T
        of x). bias is a pytree whose leaves have a leading axis N; key is given in training alone; method is "attend"
        or "reference". Scalars named "loss/..." are added to the loss. Raises ValueError where the mechanism's
        signature has no place for what is asked.
        """
        takes = self.takes(method)
        if causal and "causal" not in takes:
            raise ValueError(why_not(type(self), "causal"))
        if bias is not None and "bias" not in takes:
            raise ValueError(why_not(self, "bias"))
        if "carry" in takes and carry is None:
            carry = self.initial_carry(q.shape[0], q.shape[1], k.shape[1])
        if real is None and not self.optional(method, "real"):
            real = jnp.ones(k.shape[:2], bool)
        keys = None if key is None or "key" not in takes else jax.random.split(key, q.shape[2])
        fixed = {"causal": causal} if "causal" in takes else {}
        function = getattr(self, method)
        tokens = self._of_tokens(x, x_q, q.shape[1])

        def one(q, k, v, of_pair, of_sample, of_head):
            carry, tokens = of_pair
            given = {"carry": carry} | tokens | of_sample | of_head
            out = function(q, k, v, **fixed, **{name: value for name, value in given.items() if name in takes})
            return out if "carry" in takes else (out, None)

        of_sample = {"real": real} | ({"x": x} if "x" in takes else {})
        of_head = {"bias": bias, "key": keys} | self.per_head()
        out, above = over_heads(one, q, k, v, (carry if "carry" in takes else None, tokens), of_sample, of_head)
        return out, above if "carry" in takes else carry, {}

    def _compared(self, position, of_queries, of_keys, first):
        """The bias of every sample, (B, N, ...), from what a position makes of queries (B, T, N, ...) and keys."""
        # A number like any other leaf of a bias, which are differentiated.
        first = jnp.full((len(of_queries), self.size.heads), first, jnp.float32)
        return position.compare(jnp.swapaxes(of_queries, 1, 2), jnp.swapaxes(of_keys, 1, 2), first)

    def _of_tokens(self, x, x_q, T: int) -> dict[str, Any]:
        """What `from_keys` and `from_queries` give, heads before positions: (B, N, S, ...) and (B, N, T, ...)."""
        found = {}
        if type(self).from_keys is not Attention.from_keys:
            found |= self.from_keys(x)
        if type(self).from_queries is not Attention.from_queries:
            found |= self.from_queries(x[:, -T:] if x_q is None else x_q)
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), found)

    @classmethod
    def takes(cls, method: str = "attend") -> frozenset[str]:
        """The keyword arguments a method declares."""
        return frozenset(inspect.signature(getattr(cls, method)).parameters) - {"self", "q", "k", "v"}

    def turns(self) -> bool:
        """Whether there are queries or keys for a position to turn or compare: not both projections are `Absent`."""
        return not (isinstance(self.query, Absent) and isinstance(self.key, Absent))

    def check_position(self, position) -> None:
        """Raises ValueError where a position would tell this mechanism nothing."""
        if not self.turns() and (position.rotates() or position.kept is not None):
            raise ValueError(
                f"{type(self).__name__.lower()} makes neither queries nor keys, which this position would turn or "
                "compare; use position=learned, sinusoidal or none"
            )

    @classmethod
    def carries(cls) -> bool:
        """Whether layers share something: attend takes `carry`, or a mix of its own does and `init_carry` is there."""
        return "carry" in cls.takes() or cls.init_carry is not Attention.init_carry

    @classmethod
    def optional(cls, method: str, name: str) -> bool:
        """Whether a method declares a default for an argument: it then also does without."""
        return inspect.signature(getattr(cls, method)).parameters[name].default is not inspect.Parameter.empty

    def per_head(self) -> dict[str, Any]:
        """Arrays with a leading axis N, passed to `attend` under their names, one head at a time."""
        return {}

    def from_keys(self, x) -> dict[str, Any]:
        """(B, S, D), what the keys are projected from -> arrays (B, S, N, ...), passed to `attend` as (S, ...)."""
        return {}

    def from_queries(self, x) -> dict[str, Any]:
        """(B, T, D), what the queries are projected from -> arrays (B, T, N, ...), passed to `attend` as (T, ...)."""
        return {}

    def initial_carry(self, B: int, T: int, S: int):
        """The carry below the first layer: `init_carry(T, S)` of every head and sample, (B, N, ...)."""
        one = self.init_carry(T, S)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, self.size.heads, *leaf.shape)), one)

    def init_carry(self, T: int, S: int):
        raise NotImplementedError(f"{type(self).__name__} takes a carry: define init_carry(T, S) for one head")

    def attend(self, q, k, v, *, real):
        raise NotImplementedError(f"{type(self).__name__} must define attend (or override mix or __call__)")

    def reference(self, q, k, v, *, real):
        raise NotImplementedError(f"{type(self).__name__} must define reference")

    def cost(self, T: int, S: int) -> Cost:
        raise NotImplementedError(f"{type(self).__name__} must define cost(T, S)")

    def not_causal(self) -> str:
        """Why a mechanism with these options cannot be causal, as its docstring says; "" where it can."""
        return stated(type(self), "Not causal") or next(
            (
                stated(type(self), f"Not causal with {option}={value}")
                for option, value in re.findall(r"^Not causal with (\w+)=(\w+):", inspect.getdoc(self) or "", re.M)
                if str(getattr(self, option, None)) == value
            ),
            "",
        )

    def drawn(self, causal: bool, head: int = 0) -> Callable | None:
        """What `xlab show` draws of a head: a function of broadcasting integer arrays of query and key positions that
        gives booleans, made of what runs; None where no fixed pattern says what a query sees."""
        return None

    @staticmethod
    def limit(length: int) -> dict[str, Any] | None:
        """Options with which the mechanism is full softmax attention at this length, within `limit_error`; None where
        there are none. The conformance kit holds it to that."""
        return None

    # What goes by places in the row of keys, of a mechanism that cannot leave any of them empty in decoding.
    on_places: ClassVar[str] = ""

    # How far from full attention `limit` may be, relative to the largest output: 0 where only rounding is left.
    limit_error = 0.0

    # ---- decoding, one token at a time -------------------------------------------------------------------------

    def init_state(self, length: int, dtype=jnp.float32):
        """What one head of one sequence remembers of up to `length` tokens, with `step`."""
        raise NotImplementedError(f"{type(self).__name__} has a step: define init_state(length, dtype)")

    def step(self, state, q, k, v):
        """One more token of one head: q, k, v (H,) -> out (H,) and the new state; equal to the last row of `attend` on
        all tokens so far. It may take, by name, `bias`, `x` (D,), and what `per_head`, `from_keys` and `from_queries`
        name, each for this token. A mechanism defines it where keys and values are not what it keeps, or where it is
        tied to absolute positions."""
        raise NotImplementedError(f"{type(self).__name__} defines no step")

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        """What a layer remembers of up to `length` tokens of B sequences: every head's `init_state` where the mechanism
        has a `step`, else every key and value (and x, where attend looks at it), newest last."""
        if type(self).step is not Attention.step:
            wide = lambda leaf: jnp.broadcast_to(leaf, (B, self.size.heads, *leaf.shape))
            return jax.tree.map(wide, self.init_state(length, dtype))
        rows = jnp.zeros((B, length, self.size.key_heads, self.size.head), dtype)
        cache = {"k": rows, "v": rows, "seen": jnp.zeros((), jnp.int32)}
        if "x" in self.takes() or type(self).from_keys is not Attention.from_keys:
            cache["x"] = jnp.zeros((B, length, self.size.dim), dtype)
        return cache

    def begin(self, cache, empty):
        """An empty cache in front of whose first token `empty` () places hold nothing, as a memory that has read little
        yet leaves them -> the cache, and the position () of that token.

        What depends on distances alone numbers from 0. A mechanism that is tied to places counts the empty ones, and
        sees none of them; raises ValueError where it cannot, and says in `on_places` why.
        """
        if self.on_places:
            raise ValueError(
                f"{type(self).__name__.lower()} cannot decode behind a memory: {self.on_places} by places from the "
                "first key on, which a memory leaves empty at first; use memory=none or another attention"
            )
        return cache, jnp.zeros((), jnp.int32)

    def decode(self, x, cache, *, at, position=None, carry=None):
        """One more token through the whole layer: x (B, D) at position `at` () -> (B, D), the new cache, the carry.

        The cache is that of `init_cache`, or with a position that compares tokens {"own": that, "of_keys": (B, length,
        N, kept), what the position says of keys}.
        Raises ValueError where the mechanism cannot decode.
        """
        if reason := why_not_decode(type(self)):
            raise ValueError(reason)
        heads = lambda y: y.reshape(len(x), -1, self.size.head)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        own, of_keys, bias, step = cache, None, None, self.mix_step
        if position is not None:
            self.check_position(position)
            if position.kept is None:
                bias = position.bias()
            else:
                if "of_keys" not in cache:
                    raise ValueError(f"{type(position).__name__.lower()} needs `kept` of the model's blocks to decode")
                own, of_keys = (
                    cache["own"],
                    cache["of_keys"].at[:, at].set(position.of_keys(k[:, None], at[None])[:, 0]),
                )
                bias = self._compared(position, position.of_queries(q[:, None], at[None]), of_keys, at)
                step = functools.partial(step_apart, self)
            q, k = (position.rotate(y[:, None], at[None])[:, 0] for y in (q, k))
            q = position.share * q
        out, own, carry = step(own, q, k, v, x=x, bias=bias, carry=carry)
        out = self.out(out.reshape(len(x), -1))
        return out, own if of_keys is None else {"own": own, "of_keys": of_keys}, carry

    def mix_step(self, cache, q, k, v, *, x=None, bias=None, carry=None):
        """One more token of all heads of a batch: q (B, N, H), k and v (B, K, H), x (B, D), carry that of this token
        from the layer below -> out (B, N, H), the new cache, the carry for the layer above.

        Raises ValueError where the mechanism cannot decode.
        """
        if reason := why_not_decode(type(self)):
            raise ValueError(reason)
        if type(self).step is not Attention.step:
            return *self._steps(cache, q, k, v, x, bias), carry
        x = None if x is None else x[:, None]
        cache = self._pushed(cache, k[:, None], v[:, None], x)
        if carry is None and self.carries():
            carry = self.initial_carry(q.shape[0], 1, cache["k"].shape[1])
        given = {"real": self._known(cache), "bias": self._late(bias, cache), "x": cache.get("x"), "x_q": x}
        out, carry, _ = self.mix(q[:, None], cache["k"], cache["v"], causal=True, carry=carry, **given)
        return out[:, 0], cache, carry

    def decode_several(self, x, cache, *, at, position=None):
        """`decode` of T tokens, x (B, T, D) at positions from `at` () on -> (B, T, D) and the new cache; of mechanisms
        that carry nothing."""
        if type(self).decode is not Attention.decode or (position is not None and position.kept is not None):
            one = lambda cache, x, at: self.decode(x, cache, at=at, position=position)[:2]
            return one_by_one(one, x, cache, at)
        heads = lambda y: y.reshape(*x.shape[:2], -1, self.size.head)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        bias = None
        if position is not None:
            self.check_position(position)
            bias, places = position.bias(), at + jnp.arange(x.shape[1])
            q, k = position.share * position.rotate(q, places), position.rotate(k, places)
        out, cache = self.mix_steps(cache, q, k, v, x=x, bias=bias)
        return self.out(out.reshape(*x.shape[:2], -1)), cache

    def mix_steps(self, cache, q, k, v, *, x=None, bias=None):
        """T more tokens of all heads of a batch, q (B, T, N, H), k and v (B, T, K, H), x (B, T, D) -> out (B, T, N, H)
        and the new cache: `mix_step` of each in turn, or all of them at once where that comes to the same."""
        T, kept = q.shape[1], cache["k"].shape[1] if self._keeps_all() else 0
        if kept < T:
            one = lambda cache, new, _: self.mix_step(cache, *new[:3], x=new[3], bias=bias)[:2]
            return one_by_one(one, (q, k, v, x), cache, 0)
        cache = self._pushed(cache, k, v, x)
        given = {"real": self._known(cache), "bias": self._late(bias, cache), "x": cache.get("x"), "x_q": x}
        return self.mix(q, cache["k"], cache["v"], causal=True, **given)[0], cache

    def _keeps_all(self) -> bool:
        """Whether decoding keeps keys and values, newest last, and asks `mix` with them."""
        own = type(self).step is not Attention.step or type(self).mix_step is not Attention.mix_step
        return not own and not why_not_decode(type(self))

    def _pushed(self, cache, k, v, x):
        """The cache with T more keys, values and inputs, (B, T, ...)."""
        T, new = k.shape[1], {"k": k, "v": v, "x": x}
        return {
            name: rows + T if name == "seen" else jnp.concatenate([rows[:, T:], new[name]], 1)
            for name, rows in cache.items()
        }

    def _known(self, cache):
        """Which rows of the cache hold a token, (B, length)."""
        length = cache["k"].shape[1]
        return jnp.broadcast_to(jnp.arange(length) >= length - cache["seen"], cache["k"].shape[:2])

    def _late(self, bias, cache):
        """A bias of rows that hold the newest last, whatever its position."""
        if bias is None:
            return None
        return Behind(bias, jnp.full(self.size.heads, cache["k"].shape[1] - cache["seen"]))

    def _steps(self, cache, q, k, v, x, bias):
        """`step` of every head of every sample."""
        takes = self.takes("step")
        if bias is not None and "bias" not in takes:
            raise ValueError(why_not(self, "bias"))
        times = self.size.heads // self.size.key_heads
        k, v = (jnp.repeat(y, times, 1) for y in (k, v))
        tokens = self._of_tokens(None if x is None else x[:, None], None, 1)
        tokens = {name: jax.tree.map(lambda leaf: leaf[:, :, 0], tree) for name, tree in tokens.items()}
        of_head = {"bias": bias} | self.per_head()
        kept = lambda given: {name: value for name, value in given.items() if name in takes}
        tokens, of_head, of_sample = kept(tokens), kept(of_head), kept({"x": x})

        def one(state, q, k, v, tokens, of_sample, of_head):
            return self.step(state, q, k, v, **tokens, **of_sample, **of_head)

        heads = jax.vmap(one, in_axes=(0, 0, 0, 0, 0, None, 0))
        return jax.vmap(heads, in_axes=(0, 0, 0, 0, 0, 0, None))(cache, q, k, v, tokens, of_sample, of_head)


def one_by_one(step, x, cache, at):
    """`step(cache, x, at) -> y, cache` of T tokens in turn, leaves of x (B, T, ...), the first at position `at` ()
    -> y (B, T, ...) and the last cache."""
    in_turn = lambda tree: jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)
    tokens = in_turn(x)
    places = at + jnp.arange(len(jax.tree.leaves(tokens)[0]))
    cache, y = jax.lax.scan(lambda cache, given: step(cache, *given)[::-1], cache, (tokens, places))
    return in_turn(y), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Behind:
    """A bias where `rows` more stand in front of the first position (fewer than 0: so many positions are missing)."""

    bias: Any
    rows: jax.Array

    def __call__(self, q_at, k_at):
        return self.bias(q_at - self.rows, k_at - self.rows)


def why_not(mechanism: type | Attention, what: str) -> str:
    """Why a mechanism is refused, from its signature and, where it says so, from the `Not causal:` of its docstring."""
    kind = mechanism if isinstance(mechanism, type) else type(mechanism)
    name = kind.__name__.lower()
    if what == "bias":
        reason = stated(kind, "No bias") or "it has no scores to bias"
        rope = "" if isinstance(mechanism, Attention) and not mechanism.turns() else "rope, "
        return f"{name} takes no bias: {reason}; use position={rope}learned, sinusoidal or none"
    reason = stated(kind, "Not causal") or "its attend takes no `causal`"
    return f"{name} cannot be causal: {reason}; use model=encoder or another attention"


def why_not_one_way(mechanism: type) -> str:
    """Why a recurrence is refused where both sides are seen."""
    name = mechanism.__name__.lower()
    return f"{name} reads from left to right alone, so it serves no encoder: use model=decoder or another attention"


def why_not_decode(mechanism: type[Attention]) -> str | None:
    """Why a mechanism cannot decode token by token; None where it can."""
    name = mechanism.__name__.lower()
    if reason := stated(mechanism, "No decoding"):
        return f"{name} cannot decode: {reason}"
    if mechanism.__call__ is not Attention.__call__ and mechanism.decode is Attention.decode:
        return f"{name} cannot decode: it has a layer of its own, and no decode(x, cache) for it"
    own = mechanism.step is not Attention.step or mechanism.mix_step is not Attention.mix_step
    if not own and (reason := stated(mechanism, "Not cross")):
        return f"{name} cannot decode: one query against many keys is refused, for {reason}"
    causal = "causal" in mechanism.takes() or mechanism.mix is not Attention.mix
    return None if causal and not stated(mechanism, "Not causal") else why_not(mechanism, "causal")


def stated(mechanism: type, word: str) -> str:
    """What a docstring's line that begins with `word:` says, with the indented lines after it; "" where it has none."""
    lines = (inspect.getdoc(mechanism) or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{word}:")), None)
    if start is None:
        return ""
    more = itertools.takewhile(lambda line: line.startswith(" "), lines[start + 1 :])
    return " ".join(" ".join([lines[start], *more]).partition(":")[2].split()).rstrip(".")
