"""The shelf of positions: how a token learns where it is. One file = one class, a subclass of `Position`.

A position defines what it needs; what it does not define is the identity (or nothing):

    embed(x, at, valid=None)                     adds to the embeddings
    rotate(x, at)                               turns queries and keys
    bias()                                      gives scores to add, from positions alone
    of_queries, of_keys, compare, and `key_terms` give scores to add that depend on what the tokens are
    pair_values()                               adds vectors to the values of pairs of positions
    drawn(key)                                  is what a pass of training has in its place, where it draws anything

One position serves all layers, or several do in turn (_cycle.py), or, where it says `each_layer = True`, every layer
has one of its own, which its block builds (_each_layer.py). Its constructor may name `causal`, whether the model sees
the past alone.

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
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.documents import places, why_not
from xformers_lab.nn.size import Size

# What weights (..., T', S') make of vectors of pairs, of query and key positions that broadcast against them.
PairValues = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Scores to add, of query and key positions that broadcast against each other: what one head's slice of a bias is.
Bias = Callable[[jax.Array, jax.Array], jax.Array]


class Position(nnx.Module):
    """embeds: whether it defines `embed`; turns: whether it defines `rotate`.
    by_place: whether scores that `bias` gives depend on more than the distance of two positions.
    before: how many token embeddings before a token's own `embed` looks at; decoding keeps as many.
    adds_waves: whether `embed` adds sines and cosines of the position alone: a depth may add them again.
    share: what the products of queries and keys are multiplied by, beside scores of the position's own.
    adds_to_values: whether `pair_values` gives anything.
    each_layer: whether layers have parameters of their own, in the place of those of one position for all.
    tables: the names of parameters whose row t is that of position t alone, so that a shorter sequence uses the first.
    key_terms: None, or for a position that compares tokens how many numbers `of_keys` gives of a key for every query
        head; decoding keeps them."""

    embeds: ClassVar[bool] = False
    turns: bool = False
    by_place: ClassVar[bool] = False
    before: int = 0
    adds_waves: ClassVar[bool] = False
    share: float = 1.0
    adds_to_values: bool = False
    each_layer: bool = False
    tables: ClassVar[tuple[str, ...]] = ()
    key_terms: int | None = None

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.size = size

    def of_layer(self, layer: int) -> "Position":
        """What the layer of this number has, from 0 on: all have the same, but in a cycle of positions."""
        return self

    def drawn(self, key: jax.Array) -> "Position":
        """What one pass of training has in its place: a copy that draws from `key` alone, and the same wherever it is
        asked, or itself, where nothing is random. Evaluation and decoding ask the position as it is."""
        return self

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        """Token embeddings (B, T, D) at positions at (T,), valid (B, T) bool or None where nothing is padded -> (B, T,
        D). At the start tokens are of unit size, and so is, within a tenth, what becomes of them: `marked` of
        nn/embedding.py adds vectors so."""
        return x

    def embed_rows(
        self, x: jax.Array, *, valid: jax.Array | None = None, documents: jax.Array | None = None
    ) -> jax.Array:
        """`embed` of whole rows (B, T, D); of packed data, whose documents (B, T) are, each document begins at 0.

        Queries and keys are turned, and scores biased, by places in the row: within a document distances are the same.

        Raises:
            Refused: What is added to a token, or to scores, would depend on other documents of the row.
        """
        if documents is None:
            return self.embed(x, jnp.arange(x.shape[1]), valid=valid)
        self.check_documents()
        one = lambda x, at, valid: self.embed(x[None], at, valid=None if valid is None else valid[None])[0]
        return jax.vmap(one)(x, places(documents), valid)

    def check_documents(self) -> None:
        """Raises Refused where a token would be told of its place in a row of packed data, or of its neighbours."""
        reason = None
        if self.before:
            reason = "it looks at the tokens before, which may be another document's"
        elif self.by_place:
            reason = "its scores are of places in the row, which do not begin anew with each document"
        if reason is not None:
            raise Refused(why_not(f"position={type(self).__name__.lower()}", reason, "another position"))

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

    def pair_values(self) -> PairValues | None:
        """None, or a pytree whose leaves have a leading axis N: what is added to the value of each pair, a function of
        the distance of its positions alone. One head's slice is called with weights (..., T', S') and the positions of
        queries and keys, which broadcast against them, and gives the sum of the pairs' vectors by these weights, (...,
        T', H), in float32. Weights of pairs outside, which padded blocks have, are 0."""
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
