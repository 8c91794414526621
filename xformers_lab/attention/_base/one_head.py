"""One head of one sequence: what a mechanism says of it, and how the laboratory maps that over heads and samples."""

import inspect
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from xformers_lab.attention._base.call import Call
from xformers_lab.attention._base.multi_head import MultiHead
from xformers_lab.attention._base.refusals import UNMARKED, why_not
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.required import required

# What the laboratory can hand to `attend`; every other parameter is named by `per_head`, `from_keys` or `from_queries`.
OFFERED = ("valid", "documents", "marked", "causal", "bias", "carry", "x", "key", "pair_values")


class OneHead(MultiHead):
    """A subclass defines `attend` and `reference`; their signatures say what it can do and what it needs."""

    documents_apart: ClassVar[bool] = True
    adds_pair_values: ClassVar[bool] = True
    # Whether heads run together where the plan has a loop over them, as many as fill it: small products of several
    # heads keep all cores busy. Whatever reads its keys in chunks is better off one head at a time.
    heads_together: ClassVar[bool] = False

    @required
    def attend(self, q, k, v, *args: Any, **kwargs: Any) -> Any:
        """(T, H) (S, H) (S, H) -> (T, H), the fast form."""

    @required
    def reference(self, q, k, v, *args: Any, **kwargs: Any) -> Any:
        """The same by definition, O(T S), obviously right."""

    def per_head(self) -> dict[str, Any]:
        """Arrays with a leading axis N, passed to `attend` under their names, one head at a time."""
        return {}

    def from_keys(self, x) -> dict[str, Any]:
        """(B, S, D), what the keys are projected from -> arrays (B, S, N, ...), passed to `attend` as (S, ...)."""
        return {}

    def from_queries(self, x) -> dict[str, Any]:
        """(B, T, D), what the queries are projected from -> arrays (B, T, N, ...), passed to `attend` as (T, ...)."""
        return {}

    def finished(self, mean, *args: Any, **kwargs: Any) -> Any:
        """What stands behind the weighted mean that `attend` gives, such as a norm or a gate, of all heads (B, T, N, H)
        -> the same shape. It may take, by name, what `per_head` (N, ...) and `from_queries` (B, T, N, ...) name."""
        return mean

    def heads_at_once(self, T: int, S: int, causal: bool) -> int:
        """How many heads `attend` should run together where the plan has a loop over them, at most."""
        return plan_of(self.size).heads_of_wide_rows(int(self.cost(T, S).memory)) if self.heads_together else 1

    def attend_heads(self, call: Call) -> tuple[jax.Array, Any, Aux]:
        takes, (B, T, N, _), S = self.takes(call.method), call.q.shape, call.k.shape[1]
        if call.causal and "causal" not in takes:
            raise Refused(why_not(type(self), "causal"))
        if call.bias is not None and "bias" not in takes:
            raise Refused(why_not(self, "bias"))
        if call.pair_values is not None and "pair_values" not in takes:
            raise Refused(why_not(self, "pair_values"))
        if "documents" not in takes:
            self.check_documents(call.documents)
        if self.marks and call.marked is None:
            raise Refused(UNMARKED.format(type(self).__name__.lower()))
        carry, valid = call.carry, call.valid
        if "carry" in takes and carry is None:
            carry = self.initial_carry(B, T, S)
        if valid is None and not self.optional(call.method, "valid"):
            valid = jnp.ones((B, S), bool)
        keys = None if call.key is None or "key" not in takes else jax.random.split(call.key, N)
        fixed = {"causal": call.causal} if "causal" in takes else {}
        function, v = getattr(self, call.method), self.summands(call)

        def one(q, k, v, of_pair, of_sample, of_head):
            carry, tokens = of_pair
            offered = {"carry": carry} | tokens | of_sample | of_head
            out = function(q, k, v, **fixed, **{name: value for name, value in offered.items() if name in takes})
            return out if "carry" in takes else (out, None)

        of_sample = {"valid": valid, "documents": call.documents, "marked": call.marked}
        of_sample |= {"x": call.x} if "x" in takes else {}
        of_head = {"bias": call.bias, "key": keys, "pair_values": call.pair_values} | self.per_head()
        of_pair = carry if "carry" in takes else None, self.of_tokens(call)
        at_once, plan = self.heads_at_once(T, S, call.causal) if call.method == "attend" else 1, plan_of(self.size)
        out, above = over_heads(one, call.q, call.k, v, of_pair, of_sample, of_head, plan=plan, at_once=at_once)
        return self.behind(out, call), above if "carry" in takes else carry, Aux()

    def summands(self, call: Call) -> jax.Array:
        """What the means of this call add up, (B, S, K, H): `summed` of its values, unless the call has others."""
        return self.summed(call.v) if call.values is None else call.v

    def behind(self, mean, call: Call) -> jax.Array:
        """What this call's heads give, (B, T, N, H), of their means: `finish`, unless the call ends before it."""
        return self.finish(mean, call) if call.values is None else mean

    def finish(self, mean, call: Call) -> jax.Array:
        if type(self).finished is OneHead.finished:
            return mean
        arrays, takes = self.per_head() | self.from_queries(call.queries_input), self.takes("finished")
        given = {name: value for name, value in arrays.items() if name in takes}
        return self.finished(mean, **given).astype(call.v.dtype)

    def of_tokens(self, call: Call) -> dict[str, Any]:
        """What `attend` takes of what `from_keys` and `from_queries` give, heads before positions: (B, N, S, ...) and
        (B, N, T, ...)."""
        arrays, takes = self.from_keys(call.x) | self.from_queries(call.queries_input), self.takes()
        taken = {name: value for name, value in arrays.items() if name in takes}
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), taken)

    @classmethod
    def takes(cls, method: str = "attend") -> frozenset[str]:
        """The keyword arguments a method declares."""
        return frozenset(inspect.signature(getattr(cls, method)).parameters) - {"self", "q", "k", "v"}

    @classmethod
    def optional(cls, method: str, name: str) -> bool:
        """Whether a method declares a default for an argument: it then also does without."""
        return inspect.signature(getattr(cls, method)).parameters[name].default is not inspect.Parameter.empty

    @classmethod
    def accepts(cls, what: str) -> bool:
        return what in cls.takes() and super().accepts(what)

    @classmethod
    def carries(cls) -> bool:
        return "carry" in cls.takes()

    def reads_keys_input(self) -> bool:
        """Whether it looks at the block's input that keys came from, beside keys and values."""
        return "x" in self.takes() or bool(self._named("from_keys"))

    def reads_queries_input(self) -> bool:
        """Whether it looks at the block's input that queries came from, beside queries."""
        return bool(self._named("from_queries"))

    def _named(self, hook: str) -> list:
        x = jax.ShapeDtypeStruct((1, 1, self.size.dim), jnp.float32)
        return jax.tree.leaves(jax.eval_shape(getattr(self, hook), x))

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        """Every key and value, and the block's input where `attend` looks at it, newest last."""
        cache = super().init_cache(B, length, dtype)
        if self.reads_keys_input():
            cache["x"] = jnp.zeros((B, length, self.size.dim), dtype)
        return cache


class KeepsKeys(OneHead):
    """In front of a base class that keeps less: decoding keeps every key and value, newest last."""

    keeps_keys: ClassVar[bool] = True
    init_cache, decode_heads = OneHead.init_cache, OneHead.decode_heads
    decode_heads_several = OneHead.decode_heads_several


class Stepwise(OneHead):
    """A subclass defines `init_state` and `step` besides: keys and values are not what decoding keeps, or it is tied to
    absolute positions."""

    keeps_keys: ClassVar[bool] = False

    @required
    def init_state(self, length: int, dtype=jnp.float32) -> Any:
        """What one head of one sequence remembers of up to `length` tokens, with `step`."""

    @required
    def step(self, state, q, k, v, *args: Any, **kwargs: Any) -> Any:
        """One more token of one head: q, k, v (H,) -> out (H,) and the new state; equal to the last row of `attend` on
        all tokens so far. It may take, by name, `bias`, `x` (D,), and what `per_head`, `from_keys` and `from_queries`
        name, each for this token."""

    def steps(self, state, q, k, v, *args: Any, **kwargs: Any) -> Any:
        """`step` of T more tokens of one head: q, k, v (T, H) -> out (T, H) and the new state. It may take, by name,
        what `step` may, each for these tokens. A subclass defines it where many tokens cost less than so many steps;
        else they are read one by one."""
        raise NotImplementedError

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        """Every head's `init_state`."""
        wide = lambda leaf: jnp.broadcast_to(leaf, (B, self.size.heads, *leaf.shape))
        return jax.tree.map(wide, self.init_state(length, dtype))

    def decode_heads(self, cache, call: Call):
        """`step` of every head of every sample."""
        self._check_decode()
        takes = self.takes("step")
        if call.bias is not None and "bias" not in takes:
            raise Refused(why_not(self, "bias"))
        times = self.size.heads // self.size.key_heads
        k, v = (jnp.repeat(y, times, 1) for y in (call.k, self.summed(call.v)))
        tokens = jax.tree.map(lambda leaf: leaf[:, :, 0], self.of_tokens(call.as_row()))
        of_head = {"bias": call.bias} | self.per_head()
        taken = lambda arrays: {name: value for name, value in arrays.items() if name in takes}

        def one(state, q, k, v, tokens, of_sample, of_head):
            return self.step(state, q, k, v, **tokens, **of_sample, **of_head)

        heads = jax.vmap(one, in_axes=(0, 0, 0, 0, 0, None, 0))
        samples = jax.vmap(heads, in_axes=(0, 0, 0, 0, 0, 0, None))
        out, cache = samples(cache, call.q, k, v, taken(tokens), taken({"x": call.x}), taken(of_head))
        return self.finish(out[:, None], call.as_row())[:, 0], cache, call.carry

    def decode_heads_several(self, cache, call: Call):
        """`steps` of every head of every sample, where a subclass defines them."""
        if type(self).steps is Stepwise.steps:  # token by token: a class behind this one has a cache of another kind
            return MultiHead.decode_heads_several(self, cache, call)
        self._check_decode()
        takes = self.takes("steps")
        if call.bias is not None and "bias" not in takes:
            raise Refused(why_not(self, "bias"))

        def one(q, k, v, of_pair, of_sample, of_head):
            state, tokens = of_pair
            offered = tokens | of_sample | of_head
            return self.steps(state, q, k, v, **{name: value for name, value in offered.items() if name in takes})

        of_sample, of_head = {"x": call.x} if "x" in takes else {}, {"bias": call.bias} | self.per_head()
        of_pair = cache, self.of_tokens(call)
        out, cache = over_heads(
            one, call.q, call.k, self.summed(call.v), of_pair, of_sample, of_head, plan=plan_of(self.size)
        )
        return self.finish(out, call), cache
