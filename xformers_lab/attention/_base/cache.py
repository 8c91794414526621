"""The cache of keys and values, newest last, and how tokens are decoded one by one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xformers_lab.attention._base.call import Call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShiftedBias:
    """A bias where `rows` more stand in front of the first position (fewer than 0: so many positions are missing)."""

    bias: Any
    rows: jax.Array

    def __call__(self, q_at, k_at):
        return self.bias(q_at - self.rows, k_at - self.rows)


def one_by_one(step: Callable, x, cache, at):
    """`step(cache, x, at) -> y, cache` of T tokens in turn, leaves of x (B, T, ...), the first at position `at` ()
    -> y (B, T, ...) and the last cache."""
    in_turn = lambda tree: jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)
    tokens = in_turn(x)
    positions = at + jnp.arange(len(jax.tree.leaves(tokens)[0]))
    cache, y = jax.lax.scan(lambda cache, xs: step(cache, *xs)[::-1], cache, (tokens, positions))
    return in_turn(y), cache


def pushed(cache: dict, call: Call) -> tuple[dict, Call]:
    """The cache with T more keys, values and inputs, (B, T, ...), and the call of their queries on all it holds."""
    T, new = call.k.shape[1], {"k": call.k, "v": call.v, "x": call.x}
    cache = {
        name: rows + T if name == "seen" else jnp.concatenate([rows[:, T:], new[name]], 1)
        for name, rows in cache.items()
    }
    k, v, heads = cache["k"], cache["v"], call.q.shape[2]
    empty = k.shape[1] - cache["seen"]
    valid = jnp.broadcast_to(jnp.arange(k.shape[1]) >= empty, k.shape[:2])
    # The newest row stands last, whatever its position.
    bias = None if call.bias is None else ShiftedBias(call.bias, jnp.full(heads, empty))
    return cache, call.replace(
        k=k, v=v, x=cache.get("x"), x_q=call.x, valid=valid, causal=True, bias=bias, decoding=True
    )
