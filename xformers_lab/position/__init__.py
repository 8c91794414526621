"""The shelf of positions: how a token learns where it is. One file = one class, a subclass of `Position`.

A position defines what it needs; what it does not define is the identity (or nothing):

    embed(x, at, valid=None)                     adds to the embeddings
    rotate(x, at)                               turns queries and keys
    bias()                                      gives scores to add, from positions alone
    of_queries, of_keys, compare, and `key_terms` give scores to add that depend on what the tokens are

One position serves all layers. Its constructor may name `causal`, whether the model sees the past alone.

What it defines of the first two its class declares, `embeds = True` and `turns = True`, for others go by that: a memory
is refused to a position that marks the embeddings, and attention without queries and keys one that turns them.

Scores from tokens: `of_queries(q, at)` and `of_keys(k, at)` say once for every token what its scores depend on (its
products with a table of relative vectors, say), and `compare` makes of them a bias like that of `bias()`, but of every
sample. Blockwise mechanisms call either per block: a T x S array is never built. Mechanisms take both alike: the lab
runs those with a bias of every sample one sample at a time (attention/_base/samples.py).
"""

from collections.abc import Callable
from typing import ClassVar

import jax
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# Scores to add, of query and key positions that broadcast against each other: what one head's slice of a bias is.
Bias = Callable[[jax.Array, jax.Array], jax.Array]


class Position(nnx.Module):
    """embeds: whether it defines `embed`; turns: whether it defines `rotate`.
    before: how many token embeddings before a token's own `embed` looks at; decoding keeps as many.
    adds_waves: whether `embed` adds sines and cosines of the position alone: a depth may add them again.
    share: what the products of queries and keys are multiplied by, beside scores of the position's own.
    tables: the names of parameters whose row t is that of position t alone, so that a shorter sequence uses the first.
    key_terms: None, or for a position that compares tokens how many numbers `of_keys` gives of a key for every query
        head; decoding keeps them."""

    embeds: ClassVar[bool] = False
    turns: bool = False
    before: int = 0
    adds_waves: ClassVar[bool] = False
    share: float = 1.0
    tables: ClassVar[tuple[str, ...]] = ()
    key_terms: int | None = None

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.size = size

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        """Token embeddings (B, T, D) at positions at (T,), valid (B, T) bool or None where nothing is padded -> (B, T,
        D). At the start tokens are of unit size, and so is, within a tenth, what becomes of them: `marked` of
        nn/embedding.py adds vectors so."""
        return x

    def rotate(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """Queries or keys of all heads (B, T, N, H) at positions at (T,) -> (B, T, N, H)."""
        return x

    def bias(self) -> Bias | None:
        """None, or a pytree whose leaves have a leading axis N; one head's slice is called with broadcasting query and
        key positions and gives scores to add. Blockwise mechanisms call it per block: a T x S array is never built."""
        if self.key_terms is not None:
            name = type(self).__name__.lower()
            raise Refused(
                f"position={name} compares queries with keys of every head, and this attention makes none of its "
                "heads' size: use another attention, or position=alibi, t5 or rope"
            )
        return None

    def of_queries(self, q: jax.Array, at: jax.Array) -> jax.Array:
        """Queries (B, T, N, H), not rotated, at positions at (T,) -> (B, T, N, ...)."""
        raise NotImplementedError(f"{type(self).__name__} compares tokens: define of_queries")

    def of_keys(self, k: jax.Array, at: jax.Array) -> jax.Array:
        """Keys (B, S, K, H), not rotated, at positions at (S,) -> (B, S, N, key_terms)."""
        raise NotImplementedError(f"{type(self).__name__} compares tokens: define of_keys")

    def compare(self, of_queries: jax.Array, of_keys: jax.Array, first: jax.Array) -> Bias:
        """The results of `of_queries`, (B, N, T, ...), and `of_keys`, (B, N, S, key_terms), and the first query's
        position, (B, N) -> a pytree whose leaves have leading axes B and N; one head's slice is called as that of
        `bias()`.

        Row t is that of position first + t of queries, row s that of position s of keys; positions outside, which
        padded blocks have, are masked by who calls, and may give anything finite.
        """
        raise NotImplementedError(f"{type(self).__name__} compares tokens: define compare")
