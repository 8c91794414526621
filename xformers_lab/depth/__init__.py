"""The shelf of depths: how many layers a token gets. One file = one class, a subclass of `Depth`.

A depth builds its layers with `make_block(index, rngs)`, or with `length=` those that it gives shorter sequences than
the model's, and runs them by `run_stack` or `run_layer` of _stack.py, which know what the backward pass computes again
(`remat`). A block is called as `block(x, carries, context, key=...) -> (x, carries, aux)` and gives
its `initial_carries(B, T, S)`; carries hold what a mechanism passes to the same mechanism in the layer above, aux is an
`Aux` (nn/aux_results.py). For decoding it gives its `init_cache(B, length)`, and `block.step(x, cache, carries,
context, at)` takes one token; where it has it, `block.step_several(x, cache, context, at)` takes several. It says
whether it is `causal`, and holds its sub-layers as `attention` and `ffn` (None where it has none), each with its
placement, `attention_norm` and `ffn_norm`. A depth that puts sub-layers together in another way runs them alone,
`attend` and `apply_ffn` (in decoding `step_attend` and `step_ffn`, which both take and give the layer's cache), which
give the y of `attention_norm.after(x, y, layer_context)` and of `ffn_norm.after`; or leaves one out,
`block.only("ffn")`. One that adds a sub-layer of its own has a placement from `block.placed(layer, rngs=rngs)`, and the
rate of dropout from `block.dropout`. Of a decoder that looks at a source, `block.beside_source()` does so beside its
attention, not after it.

What a token cost is the scalar "computation" of aux: the layers that a valid token passed through, on average. A block
that says nothing of it counts as 1 (see _stack.py); evaluation records it, and reports plot it. Where tokens differ in
it, aux also holds a figure of each token under that name (`by_token` gives both), as it may of any other scalar.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from xformers_lab.attention import one_by_one
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size
from xformers_lab.position import Position

MakeBlock = Callable[..., Any]
"""make_block(index, rngs, length=None) -> the block of a layer, whatever model it is of."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer sees alike: the positions, valid (B, T) bool or None where nothing is padded, and what the model
    makes predictions of hidden states with: `predict(x, valid=valid)`, (B, T, D) -> logits (B, T, outputs), or (B,
    outputs) where a sequence gets one answer; in a step `predict(x)`, (B, D) -> (B, outputs). source (B, S, D) and
    source_real: what layers with cross-attention look at. tokens (B, T): what the sequences are made of, in a step
    (B,); None where a layer's rows are no tokens (a pooled sequence, say). among: where queries look at something else
    than their own layer's input x, `among(y)` of it normalised, (B, T, D), what they look at: the arguments of
    attention's `attend_projected` by name, but for x; in a step `among(y, cache)` of y (B, D), which gives x (B, T, D),
    which row of it is the token's, the same arguments, and the new cache. documents (B, T): of packed data the
    document of each token; None where nothing is packed. marked (B, T): which tokens the task marks; None where nothing
    is marked, and in a depth that does not say `documents_apart`, for its layers may see other rows."""

    position: Position
    valid: jax.Array | None = None
    predict: Callable[..., jax.Array] | None = None
    source: jax.Array | None = None
    source_real: jax.Array | None = None
    tokens: jax.Array | None = None
    among: Callable[..., Any] | None = None
    documents: jax.Array | None = None
    marked: jax.Array | None = None


class Depth(nnx.Module):
    """own_layers: whether every layer has variables of its own, with a leading axis of layers, and runs once, on whole
    batches, as a memory needs. documents_apart: whether it mixes no positions but by its blocks, which are given the
    context's documents, so that those of packed data stay apart; no subclass inherits it, each says so itself, nor
    several_streams: whether nothing but its blocks looks at the states' channels, so that states may be wider than D,
    several residual streams side by side. views: of an encoder, how many mixes of its layers it gives, (views, B, T, D)
    in the place of (B, T, D), one for each layer of the decoder that looks at it; 0 where all look at the same.

    The states that it is given are of unit size at the start, and so are, within a tenth, those that it gives its first
    layer (see nn/embedding.py)."""

    own_layers: ClassVar[bool] = False
    documents_apart: ClassVar[bool] = False
    several_streams: ClassVar[bool] = False
    views: int = 0

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name in ("documents_apart", "several_streams"):
            setattr(cls, name, vars(cls).get(name, False))

    @required
    def __init__(self, size: Size, *, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        """period: after how many layers the choice of mechanism repeats (1 unless mechanisms are cycled by `+`). A
        constructor that also names `target` learns what the states are for: "token", every one of them for an answer
        or a look at it, or "sequence", one answer of all."""

    @required
    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        """(B, T, D) -> (B, T, D), aux."""
        ...

    def init_cache(self, B: int, length: int) -> Any:
        """What decoding remembers in all layers of up to `length` tokens of B sequences."""
        raise Refused(f"depth={type(self).__name__.lower()} cannot decode token by token")

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        """One token (B, D) at position `at` () -> (B, D) and the new cache."""
        raise Refused(f"depth={type(self).__name__.lower()} cannot decode token by token")

    def step_several(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        """T tokens (B, T, D), the first at position `at` () -> (B, T, D) and the new cache: `step` of each in turn, or
        layer after layer where that comes to the same."""

        def one(cache, inputs, at):
            x, tokens = inputs
            return self.step(x, cache, dataclasses.replace(context, tokens=tokens), at=at)

        return one_by_one(one, (x, context.tokens), cache, at)

    # ---- drafting: the first layers propose tokens, which the others then verify together ---------------------------

    def check_draft(self, layers: int) -> None:
        """Raises Refused where the first `layers` layers cannot propose tokens; else it defines the three methods
        below, which together say what `step` of each token says."""
        raise Refused(
            f"depth={type(self).__name__.lower()} drafts nothing: it does not answer above any layer with what `step` "
            "makes of the others; use depth=layerskip, or fixed"
        )

    def step_below(
        self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array, layers: int
    ) -> tuple[jax.Array, Any]:
        """One token (B, D) at position `at` () through the first `layers` layers alone -> (B, D), the new cache."""
        raise NotImplementedError

    def step_above(
        self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array, layers: int
    ) -> tuple[jax.Array, Any]:
        """T tokens (B, T, D), of which `step_below` gave the states, through the other layers; the first is at position
        `at` () -> (B, T, D), the new cache."""
        raise NotImplementedError

    def rewound(self, before: Any, after: Any, taken: jax.Array, *, read: int) -> Any:
        """The cache behind the first `taken` () of the `read` tokens that made `after` of `before`; raises Refused
        where a layer cannot go back."""
        raise NotImplementedError
