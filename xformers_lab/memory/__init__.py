"""The shelf of memories: what survives from one segment of a text to the next. One file = one class or function.

`none` returns None. Every other choice is a `Memory`, of which each layer has one of its own: what it read in earlier
segments stands before the current one as the source of keys and values. Attention is aligned at the end, so every
mechanism that takes T != S takes it.

What is remembered of each sequence is kept in variables of type `Remembered`, which are no parameters and no part of
the model that is shared: they are built for one sequence, (1, ...), and all zeros, which means that nothing was read
yet. Behind the axis of layers that a stack gives them, the batch is their second axis, (L, B, ...); the train state
holds them so, shares them out over devices with the batch, saves and restores them, and zeroes those of a sequence
that begins a new text (`Batch.fresh`). Evaluation starts with an empty memory of its own.

A depth may remember in such variables, too, as depth=recurrent_memory:carry=true does. A model that has any reads
texts that go on: a task gives segments that follow one another by `segment(split, step)`, see tasks/__init__.py; others
are refused. Decoding writes a memory whenever a segment of the trained length is full, so that a text may go on without
an end (see model/_segments.py).
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size
from xformers_lab.position import Position

UNRELATED = (
    "the task gives unrelated sequences, none of which goes on in the next; use task=lm without stride= or packed="
)

Look = Callable[[jax.Array, jax.Array], jax.Array]
"""look(states, known): what the layer's queries of x find by content among states (B, S, D) that are known (B, S) bool,
(B, T, N, H). No gradient passes it to x or to the layer's parameters."""


class Remembered(nnx.Variable):
    """What is remembered of each sequence; all zeros where nothing is."""


class Memory(nnx.Module):
    """The memory of one layer. length: how many keys it puts before those of a segment. learns: whether it has
    parameters, which `loss` trains. of_outputs: whether what the layer gave is written, in place of its input."""

    length: int
    learns: bool = False
    of_outputs: bool = False

    @required
    def __init__(self, size: Size, *, rngs: nnx.Rngs): ...

    @required
    def read(self, B: int) -> tuple[jax.Array, jax.Array]:
        """What stands before the segment: hidden states (B, length, D), oldest first, and which are valid (B, length).

        No gradient flows through it to what was written.
        """
        ...

    @required
    def write(self, x: jax.Array, valid: jax.Array | None) -> None:
        """Remember the layer's input x (B, T, D) of a segment, or its output; valid (B, T) bool or None where nothing
        is padded."""

    def loss(self, x: jax.Array, valid: jax.Array | None, look: Look) -> Aux:
        """Auxiliary results of a segment that is about to be written; x and valid as for `write`, look: see `Look`."""
        return Aux()


def looking(attention: Any, norm: Any, x: jax.Array) -> Look:
    """`look` of a layer whose attention has the placement `norm`, on its input x (B, T, D)."""

    def frozen(module):
        graph, variables = nnx.split(module)
        return nnx.merge(graph, lax.stop_gradient(variables))

    def look(states, known):
        layer, before = frozen(attention), frozen(norm).before
        states = before(states, LayerContext(known))
        q, k, v = layer.contents(before(lax.stop_gradient(x), LayerContext()), states, known)
        return jax.nn.dot_product_attention(q, k, v, mask=known[:, None, None])

    return look


def check(position: Position, layers: bool, segments: bool) -> None:
    """Raises Refused where a model cannot have a memory. layers: whether its depth gives every layer variables of
    its own; segments: whether its task gives texts in segments that follow one another."""
    if not segments:
        raise Refused(UNRELATED)
    if not layers:
        raise Refused(
            "each layer has one memory, of whole segments, but this depth uses layers again or on a part of them; use "
            "depth=fixed"
        )
    if position.embeds:
        raise Refused(
            "this position marks the embeddings themselves, and begins anew in every segment, so that what is "
            "remembered would seem to stand where the segment does; use position=xl, rope, alibi, t5, shaw or none"
        )


def why_not(attention: Any, learns: bool = False) -> str | None:
    """Why a layer's attention cannot look at a memory, or at one that learns; None where it can."""
    mechanism = type(attention)
    name = mechanism.__name__.lower()
    if reason := mechanism.refuses.get("cross") or mechanism.refuses.get("bidirectional"):
        return f"attention={name} takes no keys but the segment's own: {reason}"
    if attention.carries():
        return f"attention={name} hands something to the layer above, which is made for the segment's own keys"
    if learns and not mechanism.projects:
        return (
            f"it learns by what queries find of the layer's own keys and values, and attention={name} makes them in a "
            "way of its own; use a memory without parameters, as compressive:pool=mean is"
        )
    return None
