from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth._added import Added
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import LayerNorm
from xformers_lab.nn.short_conv import ShortConv
from xformers_lab.nn.size import Size


class Evolved(Fixed):
    """Evolved Transformer: gates and branched convolutions in front of attention (So et al., 2019, arXiv 1901.11117,
    figure 3).

    A layer is a cell. Of an encoder:

        x + v(x) * sigmoid(g(x)),    then x + [sep9(n(relu(W x) + [relu(conv3(x)), 0])), 0],
        then x + attention(x),       then x + ffn(x)

    W is D x 4D, conv3 and sep9 give D/2 channels, zeros fill them up. Of a decoder:

        x + attention'(x) + cross'(x),    then x + sep7'(n(relu(sep11(x)) + [sep7(x), 0])),
        then x + attention(x), x + cross(x),    then x + ffn(x)

    sep11 gives 2D channels, sep7 D/2 and sep7' D. convW sees W positions, sepW each channel at W positions and then all
    channels at one; those of an encoder stand around t, those of a decoder end there. What is outside of the sequence,
    padding or in another document counts as zeros. n is a layer norm; in place of x + f(x) stands what the norm makes
    of it. attention' is another layer of the same mechanism; cross' and cross are there where a decoder looks at a
    source. The paper's decoder has ffn=mlp:activation=silu, its encoder relu.

    A cell has about the parameters of two layers, so the paper has half as many; it counts as 1 in "computation".
    Decoding keeps what its convolutions see of the past, at most 10 inputs.
    Deviations from the paper: attention' has as many heads as attention, not twice as many, for they share positions;
    no dropout inside the branches.
    """

    documents_apart = True
    several_streams = True

    def __init__(self, size: Size, *, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        if size.dim < 2:
            raise Refused("dim=1: its branches have half of the channels; use dim=2 or more")

        def cell(index: int, rngs: nnx.Rngs):
            block = make_block(index, rngs)
            if not block.causal:
                return Added(block, [Gated(size, rngs=rngs), EncoderBranches(size, rngs=rngs)], rngs=rngs)
            first = make_block(index, rngs).only("attention").beside_source()
            return DecoderCell(first, Added(block, [DecoderBranches(size, rngs=rngs)], rngs=rngs))

        super().__init__(size, make_block=cell, period=period, rngs=rngs)


class DecoderCell(nnx.Module):
    """A block of attention alone, and another behind convolutions."""

    def __init__(self, first: Any, rest: Added):
        self.first, self.rest = first, rest

    def __call__(
        self, x: jax.Array, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any], Aux]:
        first, second = (None, None) if key is None else jax.random.split(key)
        x, carries, aux = self.first(x, carries, context, key=first)
        x, carries, more = self.rest(x, carries, context, key=second)
        return x, carries, (aux | computation(0)) + (computation(1) | more)

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return self.rest.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        return {"first": self.first.init_cache(B, length), "rest": self.rest.init_cache(B, length)}

    def step(
        self, x: jax.Array, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        x, first, carries = self.first.step(x, cache["first"], carries, context, at)
        x, rest, carries = self.rest.step(x, cache["rest"], carries, context, at)
        return x, {"first": first, "rest": rest}, carries

    def step_several(self, x: jax.Array, cache: Any, context: Context, at: jax.Array) -> tuple[jax.Array, Any]:
        x, first = self.first.step_several(x, cache["first"], context, at)
        x, rest = self.rest.step_several(x, cache["rest"], context, at)
        return x, {"first": first, "rest": rest}


class Gated(nnx.Module):
    """v(x) * sigmoid(g(x)) (Dauphin et al., 2016, arXiv 1612.08083)."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.value, self.gate = (Linear(size.dim, size.dim, dtype=size.dtype, rngs=rngs) for _ in range(2))

    def scale_init(self, share: float) -> None:
        scale_init(share, self.value)

    def __call__(self, x: jax.Array, *, valid: jax.Array | None = None, documents: jax.Array | None = None):
        return self.value(x) * jax.nn.sigmoid(self.gate(x))


class Separable(nnx.Module):
    """Each channel mixed along `width` positions, then the channels of one position: (B, T, C) -> (B, T, C')."""

    def __init__(self, channels: int, out: int, width: int, *, causal: bool, size: Size, rngs: nnx.Rngs):
        draw = nnx.initializers.normal(width**-0.5)
        self.along = ShortConv(channels, width, causal=causal, kernel_init=draw, rngs=rngs)
        self.across = Linear(channels, out, dtype=size.dtype, rngs=rngs)
        self.dtype = size.dtype

    def __call__(self, x: jax.Array, *, valid: jax.Array | None = None, documents: jax.Array | None = None):
        return self.across(self.along(x, valid=valid, documents=documents))

    def init_tail(self, B: int) -> jax.Array:
        return self.along.init_tail(B, self.dtype)

    def step_several(self, tail: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, tail = self.along.step_several(tail, x)
        return self.across(y), tail


class Branches(nnx.Module):
    """Two convolutions of the same input added up, and a third one of their norm; the last gives what is added."""

    last: Separable

    def scale_init(self, share: float) -> None:
        """Behind the norm alone: in front of it no size matters."""
        scale_init(share, self.last.across)


class EncoderBranches(Branches):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        D, self.dim = size.dim, size.dim
        self.wide = Linear(D, 4 * D, dtype=size.dtype, rngs=rngs)
        self.near = Linear(3 * D, D // 2, dtype=size.dtype, rngs=rngs)
        self.norm = LayerNorm(4 * D, dtype=size.dtype, rngs=rngs)
        self.last = Separable(4 * D, D // 2, 9, causal=False, size=size, rngs=rngs)

    def __call__(self, x: jax.Array, *, valid: jax.Array | None = None, documents: jax.Array | None = None):
        x = x if valid is None else jnp.where(valid[..., None], x, 0)
        total = jax.nn.relu(self.wide(x)) + filled(jax.nn.relu(self.near(around(x, documents))), 4 * self.dim)
        return filled(self.last(self.norm(total), valid=valid, documents=documents), self.dim)


class DecoderBranches(Branches):
    """(B, T, D) -> (B, T, D), of which position t sees none after it."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        D, options = size.dim, {"causal": True, "size": size, "rngs": rngs}
        self.far, self.near = Separable(D, 2 * D, 11, **options), Separable(D, D // 2, 7, **options)
        self.norm = LayerNorm(2 * D, dtype=size.dtype, rngs=rngs)
        self.last, self.dim = Separable(2 * D, D, 7, **options), D

    def __call__(self, x: jax.Array, *, valid: jax.Array | None = None, documents: jax.Array | None = None):
        rows = {"valid": valid, "documents": documents}
        return self.last(self._joined(self.far(x, **rows), self.near(x, **rows)), **rows)

    def init_tail(self, B: int) -> dict[str, jax.Array]:
        return {name: getattr(self, name).init_tail(B) for name in ("far", "near", "last")}

    def step_several(self, tail: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        far, of_far = self.far.step_several(tail["far"], x)
        near, of_near = self.near.step_several(tail["near"], x)
        y, of_last = self.last.step_several(tail["last"], self._joined(far, near))
        return y, {"far": of_far, "near": of_near, "last": of_last}

    def _joined(self, far: jax.Array, near: jax.Array) -> jax.Array:
        return self.norm(jax.nn.relu(far) + filled(near, 2 * self.dim))


def filled(y: jax.Array, channels: int) -> jax.Array:
    """(B, T, C) -> (B, T, channels), zeros behind."""
    return jnp.pad(y, [(0, 0), (0, 0), (0, channels - y.shape[-1])])


def around(x: jax.Array, documents: jax.Array | None) -> jax.Array:
    """What stands before, at and after each position, side by side, (B, T, D) -> (B, T, 3 D); zeros outside of the row
    and in other documents."""
    T, sides = x.shape[1], [(0, 0), (1, 1)]
    wide = jnp.pad(x, [*sides, (0, 0)])
    rows = [wide[:, place : place + T] for place in range(3)]
    if documents is not None:
        # No document has the number of what stands outside of the row.
        beside = jnp.pad(documents, sides, constant_values=-1)
        same = [(beside[:, place : place + T] == documents)[..., None] for place in range(3)]
        rows = [jnp.where(there, row, 0) for row, there in zip(rows, same, strict=True)]
    return jnp.concatenate(rows, -1)
