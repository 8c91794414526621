"""Sequences cut into segments of equal length, which are read one after the other, or apart and as one state each."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context
from xformers_lab.errors import Refused
from xformers_lab.memory import Remembered
from xformers_lab.nn.size import Size


def in_turn(y: jax.Array | None, size: int, count: int) -> jax.Array | None:
    """(B, T, ...) -> (count, B, size, ...), filled up with zeros; None stays None."""
    if y is None:
        return None
    y = jnp.pad(y, [(0, 0), (0, count * size - y.shape[1])] + [(0, 0)] * (y.ndim - 2))
    return jnp.swapaxes(y.reshape(len(y), count, size, *y.shape[2:]), 0, 1)


def at_once(y: jax.Array, T: int) -> jax.Array:
    """The inverse of `in_turn`, (count, B, size, ...) -> (B, T, ...)."""
    return jnp.swapaxes(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :T]


def runs(x: jax.Array, valid: jax.Array | None, k: int, before: int = 0) -> tuple[jax.Array, jax.Array]:
    """(B, T, D) -> what each of G runs of k tokens holds (B, G, k, D), and which of that is valid (B, G, k).

    before: so many places in front of the first token that are not valid.
    """
    B, T, D = x.shape
    G = -(-T // k)
    valid = jnp.ones((B, T), bool) if valid is None else valid
    around = (before, max(0, G * k - T - before))
    x = jnp.pad(x, ((0, 0), around, (0, 0)))[:, : G * k].reshape(B, G, k, D)
    return x, jnp.pad(valid, ((0, 0), around))[:, : G * k].reshape(B, G, k)


def mean_of(runs: jax.Array, valid: jax.Array) -> jax.Array:
    """(..., k, D), of which valid (..., k) count -> (..., D), zeros where none does."""
    total = jnp.where(valid[..., None], runs, 0).sum(-2, dtype=jnp.float32)
    return (total / jnp.maximum(valid.sum(-1, keepdims=True), 1)).astype(runs.dtype)


class Carried(nnx.Module):
    """What each sequence of a batch leaves to the one that goes on from it in the next: a state (rows, D), without
    gradient. Nothing was left where a new text begins. there: whether something was (checkpoints call it so)."""

    def __init__(self, rows: int, dim: int, dtype: str = "float32"):
        # Of one sequence, behind an axis that stands for layers, as the train state keeps all that is remembered.
        self.state, self.there = Remembered(jnp.zeros((1, 1, rows, dim), dtype)), Remembered(jnp.zeros((1, 1), bool))

    def read(self, start: jax.Array) -> jax.Array:
        """What was left to each sequence, or else start (B, rows, D)."""
        left = lax.stop_gradient(self.state[...][0]).astype(start.dtype)
        return jnp.where(self.there[...][0][:, None, None], left, start)

    def write(self, state: jax.Array) -> None:
        """Leave a state (B, rows, D)."""
        self.state.set_value(lax.stop_gradient(state.astype(self.state[...].dtype))[None])
        self.there.set_value(jnp.ones((1, len(state)), bool))


@dataclasses.dataclass(frozen=True)
class Segments:
    """size: k, tokens of a segment; count: G, segments of a whole sequence."""

    size: int
    count: int

    @classmethod
    def of(cls, size: Size, segment: int | None) -> "Segments":
        """Of so many tokens, by default of the root of the length; raises Refused."""
        k = max(1, math.isqrt(size.length)) if segment is None else segment
        if not 1 <= k <= size.length:
            raise Refused(f"segment={segment} must be from 1 to seq_len={size.length}")
        return cls(k, -(-size.length // k))

    def apart(self, x: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """(B, T, D) -> (B G, k, D), and the context of its rows; raises Refused where layers look at a source."""
        if context.source is not None:
            raise Refused(
                "this depth reads segments apart, with no place for cross-attention: use depth=fixed or model=decoder"
            )
        valid = context.valid
        if valid is None and x.shape[1] % self.size:
            valid = jnp.ones(x.shape[:2], bool)
        cut = lambda y: None if y is None else self._cut(y)
        return self._cut(x), dataclasses.replace(context, valid=cut(valid), tokens=cut(context.tokens))

    def joined(
        self, rows: jax.Array, inside: Context, context: Context, B: int
    ) -> tuple[jax.Array, jax.Array | None, Context]:
        """The rows of `apart` (B G, k, D), whose context is `inside`, by sequence: -> (B, G, k, D) with zeros where
        nothing is valid, which is valid (B, G, k) or None, and the context of one state per segment."""
        rows = rows.reshape(B, -1, *rows.shape[1:])
        valid = None if inside.valid is None else inside.valid.reshape(rows.shape[:3])
        rows = rows if valid is None else jnp.where(valid[..., None], rows, 0)
        # A segment that was filled up holds something valid, or T would be shorter.
        some = None if context.valid is None or valid is None else valid.any(-1)
        return rows, valid, dataclasses.replace(context, valid=some, tokens=None)

    def add_states(self, rows: jax.Array, states: jax.Array, T: int, causal: bool) -> jax.Array:
        """Tokens (B G, k, D) plus the state of their segment, of (B, G, D), or causally of the one before it -> (B, T,
        D)."""
        B, _, D = states.shape
        if causal:
            states = jnp.concatenate([jnp.zeros_like(states[:, :1]), states[:, :-1]], 1)
        return (rows.reshape(B, -1, self.size, D) + states[:, :, None]).reshape(B, -1, D)[:, :T]

    def _cut(self, y: jax.Array) -> jax.Array:
        fill = [(0, 0), (0, -y.shape[1] % self.size)] + [(0, 0)] * (y.ndim - 2)
        return jnp.pad(y, fill).reshape(-1, self.size, *y.shape[2:])
