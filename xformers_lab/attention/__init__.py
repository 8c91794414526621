"""The shelf of attention mechanisms, and the contract each of them keeps.

A mechanism is one file with one class, a subclass of `Attention`, that says what one head of one sequence does:

    attend(q, k, v, *, real, causal, bias=None)      (T, H) (S, H) (S, H) -> (T, H), the fast form
    reference(q, k, v, *, real, causal, bias=None)   the same by definition, O(T S), obviously right
    cost(T, S)                                       declared matmul FLOPs, memory and state, checked against counts

The signature of `attend` is the declaration. One that cannot be causal has no `causal`; one that has no scores to bias
has no `bias`; one that draws random numbers takes `key`; one that needs the block's input takes `x` (S, D); one that
shares something with the same mechanism in the layer below takes `carry` and returns (out, carry), and defines
`init_carry(T, S)`; per-head parameters are named by `per_head()`. The lab adds heads, batch, grouped key/value heads,
projections and devices, and refuses what a signature cannot do.

Causal is aligned at the end: query t stands at position S - T + t. real (S,) bool marks keys that are no padding (a
mechanism that writes `real=None` gets None where nothing is padded); a query that may see no key gets zeros. bias,
where given, is called with broadcasting query and key positions, (T', 1) and (1, S').

A mechanism that is not per head overrides `mix` on (B, T, N, H), or `__call__` on (B, T, D).
"""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._heads import over_heads
from xformers_lab.linear import Linear
from xformers_lab.size import Size

# What the lab can hand to `attend`; every other parameter must be named by `per_head`.
GIVEN = ("real", "causal", "bias", "carry", "x", "key")


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

    def __call__(self, x, memory=None, *, real=None, causal=False, position=None, carry=None, key=None):
        """(B, T, D) and optional keys' source (B, S, D) -> (B, T, D), the carry for the layer above, auxiliary scalars.

        real (B, S) bool or None where nothing is padded. position gives `rotate(x, at)` and `bias()`.
        """
        source = x if memory is None else memory
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.size.head)
        q, k, v = heads(self.query(x)), heads(self.key(source)), heads(self.value(source))
        bias = None
        if position is not None:
            T, S = q.shape[1], k.shape[1]
            q, k = position.rotate(q, jnp.arange(T) + S - T), position.rotate(k, jnp.arange(S))
            bias = position.bias()
        out, carry = self.mix(q, k, v, x=source, real=real, causal=causal, bias=bias, carry=carry, key=key)
        return self.out(out.reshape(*out.shape[:2], -1)), carry, {}

    def mix(self, q, k, v, *, x=None, real=None, causal=False, bias=None, carry=None, key=None, method="attend"):
        """All heads of a batch: q (B, T, N, H), k and v (B, S, K, H) -> (B, T, N, H) and the carry.

        bias is a pytree whose leaves have a leading axis N; method is "attend" or "reference". Raises ValueError where
        the mechanism's signature has no place for what is asked.
        """
        takes = self.takes(method)
        if causal and "causal" not in takes:
            raise ValueError(why_not(type(self), "causal"))
        if bias is not None and "bias" not in takes:
            raise ValueError(why_not(type(self), "bias"))
        if "carry" in takes and carry is None:
            carry = self.initial_carry(q.shape[0], q.shape[1], k.shape[1])
        if real is None and not self.optional(method, "real"):
            real = jnp.ones(k.shape[:2], bool)
        keys = None if key is None or "key" not in takes else jax.random.split(key, q.shape[2])
        fixed = {"causal": causal} if "causal" in takes else {}
        function = getattr(self, method)

        def one(q, k, v, carry, of_sample, of_head):
            given = {"carry": carry} | of_sample | of_head
            out = function(q, k, v, **fixed, **{name: value for name, value in given.items() if name in takes})
            return out if "carry" in takes else (out, None)

        of_sample = {"real": real} | ({"x": x} if "x" in takes else {})
        of_head = {"bias": bias, "key": keys} | self.per_head()
        out, above = over_heads(one, q, k, v, carry if "carry" in takes else None, of_sample, of_head)
        return out, above if "carry" in takes else carry

    @classmethod
    def takes(cls, method: str = "attend") -> frozenset[str]:
        """The keyword arguments a method declares."""
        return frozenset(inspect.signature(getattr(cls, method)).parameters) - {"self", "q", "k", "v"}

    @classmethod
    def optional(cls, method: str, name: str) -> bool:
        """Whether a method declares a default for an argument: it then also does without."""
        return inspect.signature(getattr(cls, method)).parameters[name].default is not inspect.Parameter.empty

    def per_head(self) -> dict[str, Any]:
        """Arrays with a leading axis N, passed to `attend` under their names, one head at a time."""
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

    # ---- decoding: one head of one sequence, one token at a time -----------------------------------------------

    def init_state(self, length: int, dtype=jnp.float32):
        """What decoding remembers of up to `length` tokens: by default every key and value, newest last."""
        cache = jnp.zeros((length, self.size.head), dtype)
        return {"k": cache, "v": cache, "seen": jnp.zeros((), jnp.int32)}

    def step(self, state, q, k, v, *, bias=None):
        """One more token: q, k, v (H,) -> out (H,) and the new state; equal to the last row of `attend` on all so far.

        The default calls `attend` with one query at the end of the cache, which is right wherever the mechanism only
        depends on distances; a mechanism tied to absolute positions or with a smaller state overrides both methods.
        """
        keys, values = (jnp.concatenate([state[name][1:], new[None]]) for name, new in (("k", k), ("v", v)))
        seen = state["seen"] + 1
        length = keys.shape[0]
        real = jnp.arange(length) >= length - seen
        given = {"bias": bias} if "bias" in self.takes() else {}
        out = self.attend(q[None], keys, values, real=real, causal=True, **given)  # pyright: ignore[reportCallIssue]
        return out[0], {"k": keys, "v": values, "seen": seen}


def why_not(mechanism: type, what: str) -> str:
    """Why a mechanism is refused, from its signature and, where it says so, from the `Not causal:` of its docstring."""
    name = mechanism.__name__.lower()
    if what == "bias":
        return f"{name} has no scores to bias: use position=rope, learned, sinusoidal or none"
    text = inspect.getdoc(mechanism) or ""
    reason = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Not causal:")), "")
    return (
        f"{name} cannot be causal: {reason or 'its attend takes no `causal`'}; use model=encoder or another attention"
    )
