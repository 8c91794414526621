"""A mechanism over whole sequences: projections, positions, and heads and samples around what it says of one head."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._declared import Declared
from xformers_lab.attention._engine.absent import Absent
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._refusals import why_not
from xformers_lab.attention._samples import apart
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

# What the lab can hand to `attend`; every other parameter must be named by `per_head`.
GIVEN = ("valid", "causal", "bias", "carry", "x", "key")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShiftedBias:
    """A bias where `rows` more stand in front of the first position (fewer than 0: so many positions are missing)."""

    bias: Any
    rows: jax.Array

    def __call__(self, q_at, k_at):
        return self.bias(q_at - self.rows, k_at - self.rows)


class Forward(Declared):
    """Projections around one mechanism, and what it may define to be run on whole sequences."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.size = size
        self.query, self.key, self.value = (
            Linear(size.dim, heads * size.head, use_bias=False, dtype=size.dtype, rngs=rngs)
            for heads in (size.heads, size.key_heads, size.key_heads)
        )
        self.out = Linear(size.heads * size.head, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)

    def scale_init(self, share: float) -> None:
        """Multiplies by `share` the first weights that values pass, `value` and `out`, and none of scores."""
        scale_init(share, *(getattr(self, name) for name in ("value", "out") if hasattr(self, name)))

    def __call__(self, x, memory=None, *, valid=None, causal=False, position=None, carry=None, key=None):
        """(B, T, D) and optional keys' source (B, S, D) -> (B, T, D), the carry for the layer above, an `Aux`.

        valid (B, S) bool or None where nothing is padded. position gives `rotate(x, at)` and `share`, and `bias()` or
        what makes a bias of every sample (see position/__init__.py), with which samples are run apart.
        """
        source = x if memory is None else memory
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.size.head)
        given = {"valid": valid, "causal": causal, "position": position, "carry": carry, "key": key}
        return self.attend_projected(x, heads(self.key(source)), heads(self.value(source)), source, **given)

    def attend_projected(
        self, x, k, v, source, *, valid=None, causal=False, position=None, carry=None, key=None, at: Any = None
    ):
        """`__call__` of x (B, T, D) on keys and values that were projected before, (B, S, K, H), of source (B, S, D).

        at (): the position of x's first row, where the rows that a mechanism sees are a part of the text; none: S - T.
        Keys before position 0 are not valid.
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
                    bias = ShiftedBias(bias, jnp.full(self.size.heads, -before))
            else:
                bias = self._compared(position, position.of_queries(q, q_at), position.of_keys(k, k_at), S - T)
                mix = functools.partial(apart, self)
            q, k = position.share * position.rotate(q, q_at), position.rotate(k, k_at)
        given = {"valid": valid, "causal": causal, "bias": bias, "carry": carry, "key": key}
        out, carry, aux = mix(q, k, v, x=source, x_q=x, **given)
        return self.out(out.reshape(*out.shape[:2], -1)), carry, aux

    def mix(
        self, q, k, v, *, x=None, x_q=None, valid=None, causal=False, bias=None, carry=None, key=None, method="attend"
    ):
        """All heads of a batch: q (B, T, N, H), k and v (B, S, K, H) -> (B, T, N, H), the carry, an `Aux`.

        x (B, S, D) is the block's input that keys and values came from, x_q (B, T, D) the queries' (default: the last T
        of x). bias is a pytree whose leaves have a leading axis N; key is given in training alone; method is "attend"
        or "reference". Raises Refused where the mechanism's signature has no place for what is asked.
        """
        takes = self.takes(method)
        if causal and "causal" not in takes:
            raise Refused(why_not(type(self), "causal"))
        if bias is not None and "bias" not in takes:
            raise Refused(why_not(self, "bias"))
        if "carry" in takes and carry is None:
            carry = self.initial_carry(q.shape[0], q.shape[1], k.shape[1])
        if valid is None and not self.optional(method, "valid"):
            valid = jnp.ones(k.shape[:2], bool)
        keys = None if key is None or "key" not in takes else jax.random.split(key, q.shape[2])
        fixed = {"causal": causal} if "causal" in takes else {}
        function = getattr(self, method)
        tokens = self._of_tokens(x, x_q, q.shape[1])

        def one(q, k, v, of_pair, of_sample, of_head):
            carry, tokens = of_pair
            given = {"carry": carry} | tokens | of_sample | of_head
            out = function(q, k, v, **fixed, **{name: value for name, value in given.items() if name in takes})
            return out if "carry" in takes else (out, None)

        of_sample = {"valid": valid} | ({"x": x} if "x" in takes else {})
        of_head = {"bias": bias, "key": keys} | self.per_head()
        of_pair = carry if "carry" in takes else None, tokens
        narrow = method == "attend" and self.narrow(q.shape[1], k.shape[1], causal)
        out, above = over_heads(one, q, k, v, of_pair, of_sample, of_head, plan=plan_of(self.size), narrow=narrow)
        return out, above if "carry" in takes else carry, Aux()

    def narrow(self, T: int, S: int, causal: bool) -> bool:
        """Whether `attend` runs the queries of a head as a batch of narrow rows, to which a CPU adds other heads."""
        return False

    def _compared(self, position, of_queries, of_keys, first):
        """The bias of every sample, (B, N, ...), from what a position makes of queries (B, T, N, ...) and keys."""
        # A number like any other leaf of a bias, which are differentiated.
        first = jnp.full((len(of_queries), self.size.heads), first, jnp.float32)
        return position.compare(jnp.swapaxes(of_queries, 1, 2), jnp.swapaxes(of_keys, 1, 2), first)

    def _of_tokens(self, x, x_q, T: int) -> dict[str, Any]:
        """What `from_keys` and `from_queries` give, heads before positions: (B, N, S, ...) and (B, N, T, ...)."""
        found = {}
        if type(self).from_keys is not Forward.from_keys:
            found |= self.from_keys(x)
        if type(self).from_queries is not Forward.from_queries:
            found |= self.from_queries(x[:, -T:] if x_q is None else x_q)
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), found)

    @classmethod
    def takes(cls, method: str = "attend") -> frozenset[str]:
        """The keyword arguments a method declares."""
        return frozenset(inspect.signature(getattr(cls, method)).parameters) - {"self", "q", "k", "v"}

    @classmethod
    def optional(cls, method: str, name: str) -> bool:
        """Whether a method declares a default for an argument: it then also does without."""
        return inspect.signature(getattr(cls, method)).parameters[name].default is not inspect.Parameter.empty

    @classmethod
    def carries(cls) -> bool:
        """Whether layers share something: attend takes `carry`, or a mix of its own does and `init_carry` is there."""
        return "carry" in cls.takes() or cls.init_carry is not Forward.init_carry

    def turns(self) -> bool:
        """Whether there are queries or keys for a position to turn or compare: not both projections are `Absent`."""
        return not (isinstance(self.query, Absent) and isinstance(self.key, Absent))

    def check_position(self, position) -> None:
        """Raises Refused where a position would tell this mechanism nothing."""
        if not self.turns() and (position.rotates() or position.kept is not None):
            raise Refused(
                f"{type(self).__name__.lower()} makes neither queries nor keys, which this position would turn or "
                "compare; use position=learned, sinusoidal or none"
            )

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

    def attend(self, q, k, v, *, valid):
        raise NotImplementedError(f"{type(self).__name__} must define attend (or override mix or __call__)")

    def reference(self, q, k, v, *, valid):
        raise NotImplementedError(f"{type(self).__name__} must define reference")
