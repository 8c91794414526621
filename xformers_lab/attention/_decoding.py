"""A mechanism one token at a time: the cache of a layer, and how mechanisms that say nothing of it decode."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from xformers_lab.attention._forward import Forward, ShiftedBias
from xformers_lab.attention._refusals import why_not
from xformers_lab.attention._samples import step_apart
from xformers_lab.errors import Refused


def why_not_decode(mechanism: "type[Decoding]") -> str | None:
    """Why a mechanism cannot decode token by token; None where it can."""
    name = mechanism.__name__.lower()
    if reason := mechanism.refuses.get("decoding"):
        return f"{name} cannot decode: {reason}"
    if mechanism.__call__ is not Decoding.__call__ and mechanism.decode is Decoding.decode:
        return f"{name} cannot decode: it has a layer of its own, and no decode(x, cache) for it"
    own = mechanism.step is not Decoding.step or mechanism.mix_step is not Decoding.mix_step
    if not own and (reason := mechanism.refuses.get("cross")):
        return f"{name} cannot decode: one query against many keys is refused, for {reason}"
    causal = "causal" in mechanism.takes() or mechanism.mix is not Decoding.mix
    return None if causal and "causal" not in mechanism.refuses else why_not(mechanism, "causal")


def one_by_one(step, x, cache, at):
    """`step(cache, x, at) -> y, cache` of T tokens in turn, leaves of x (B, T, ...), the first at position `at` ()
    -> y (B, T, ...) and the last cache."""
    in_turn = lambda tree: jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)
    tokens = in_turn(x)
    places = at + jnp.arange(len(jax.tree.leaves(tokens)[0]))
    cache, y = jax.lax.scan(lambda cache, given: step(cache, *given)[::-1], cache, (tokens, places))
    return in_turn(y), cache


class Decoding(Forward):
    """What a layer remembers of the tokens so far, and one token more."""

    # What goes by places in the row of keys, of a mechanism that cannot leave any of them empty in decoding.
    on_places: ClassVar[str] = ""

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
        if type(self).step is not Decoding.step:
            wide = lambda leaf: jnp.broadcast_to(leaf, (B, self.size.heads, *leaf.shape))
            return jax.tree.map(wide, self.init_state(length, dtype))
        rows = jnp.zeros((B, length, self.size.key_heads, self.size.head), dtype)
        cache = {"k": rows, "v": rows, "seen": jnp.zeros((), jnp.int32)}
        if "x" in self.takes() or type(self).from_keys is not Decoding.from_keys:
            cache["x"] = jnp.zeros((B, length, self.size.dim), dtype)
        return cache

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
        """One more token through the whole layer: x (B, D) at position `at` () -> (B, D), the new cache, the carry.

        The cache is that of `init_cache`, or with a position that compares tokens {"own": that, "of_keys": (B, length,
        N, kept), what the position says of keys}.
        Raises Refused where the mechanism cannot decode.
        """
        if reason := why_not_decode(type(self)):
            raise Refused(reason)
        heads = lambda y: y.reshape(len(x), -1, self.size.head)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        own, of_keys, bias, step = cache, None, None, self.mix_step
        if position is not None:
            self.check_position(position)
            if position.kept is None:
                bias = position.bias()
            else:
                if "of_keys" not in cache:
                    raise Refused(f"{type(position).__name__.lower()} needs `kept` of the model's blocks to decode")
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

        Raises Refused where the mechanism cannot decode.
        """
        if reason := why_not_decode(type(self)):
            raise Refused(reason)
        if type(self).step is not Decoding.step:
            return *self._steps(cache, q, k, v, x, bias), carry
        x = None if x is None else x[:, None]
        cache = self._pushed(cache, k[:, None], v[:, None], x)
        if carry is None and self.carries():
            carry = self.initial_carry(q.shape[0], 1, cache["k"].shape[1])
        given = {"valid": self._known(cache), "bias": self._late(bias, cache), "x": cache.get("x"), "x_q": x}
        out, carry, _ = self.mix(q[:, None], cache["k"], cache["v"], causal=True, carry=carry, **given)
        return out[:, 0], cache, carry

    def decode_several(self, x, cache, *, at, position=None):
        """`decode` of T tokens, x (B, T, D) at positions from `at` () on -> (B, T, D) and the new cache; of mechanisms
        that carry nothing."""
        if type(self).decode is not Decoding.decode or (position is not None and position.kept is not None):
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
        given = {"valid": self._known(cache), "bias": self._late(bias, cache), "x": cache.get("x"), "x_q": x}
        return self.mix(q, cache["k"], cache["v"], causal=True, **given)[0], cache

    def _keeps_all(self) -> bool:
        """Whether decoding keeps keys and values, newest last, and asks `mix` with them."""
        own = type(self).step is not Decoding.step or type(self).mix_step is not Decoding.mix_step
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
        return ShiftedBias(bias, jnp.full(self.size.heads, cache["k"].shape[1] - cache["seen"]))

    def _steps(self, cache, q, k, v, x, bias):
        """`step` of every head of every sample."""
        takes = self.takes("step")
        if bias is not None and "bias" not in takes:
            raise Refused(why_not(self, "bias"))
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
