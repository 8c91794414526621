import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size

Mix = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
Numbered = tuple[jax.Array, jax.Array]


class Transparent(Fixed):
    """Transparent attention: what leaves the stack is a learned mix of all its layers (Bapna et al., 2018, arXiv
    1808.07561).

        out = sum over i = 0..L of s_i h_i,    s = softmax(w),    h_0 the embeddings, h_i the output of layer i

    w (L + 1) is zeros at first. The head's normaliser, where the norm has one, follows the mix, which is float32 and
    made on the way up.

    mixes=each is the paper's form, of model=encoder_decoder: every layer of the decoder has a mix of its own of the
    encoder's layers, w (L + 1, decoder layers), at which its cross-attention looks, so that gradients reach the lower
    ones straight; the decoder's own layers are those of depth=fixed. mixes=one has one mix of a stack, and so does each
    stack of an encoder-decoder.

    Options:
        mixes: one: one mix of all layers of a stack; each: one of the encoder's for every layer of the decoder
    """

    documents_apart = True
    several_streams = True
    plain_step = False
    later_options: ClassVar = ("mixes",)

    def __init__(
        self,
        size: Size,
        *,
        mixes: Literal["one", "each"] = "one",
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if mixes == "each" and not (size.source_layers or size.target_layers):
            raise Refused("mixes=each is of model=encoder_decoder, whose decoder looks at an encoder; use mixes=one")
        self.looks = mixes == "each" and size.source_layers > 0
        self.views = size.target_layers if mixes == "each" else 0
        wrapper = Looking if self.looks else Seen
        super().__init__(
            size, make_block=lambda index, rngs: wrapper(make_block(index, rngs)), period=period, rngs=rngs
        )
        if not self.looks:
            shape = (size.layers + 1, self.views) if self.views else (size.layers + 1,)
            self.mix = nnx.Param(jnp.zeros(shape), decays=False)

    def begin(self, x: jax.Array) -> Any:
        """The state, the mix so far, the shares of layers, and the number of the next layer; of a decoder that looks at
        mixes, the state and the number of the next layer from 0."""
        if self.looks:
            return x, jnp.zeros((), jnp.int32)
        share = jax.nn.softmax(self.mix[...], 0)
        return x, _share(share[0], x), share, jnp.ones((), jnp.int32)

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        carries = self.initial_carries(x.shape[0], x.shape[1], x.shape[1])
        state, _, aux = self.run(self.begin(x), carries, context, key=key)
        return self._end(state).astype(x.dtype), aux

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        state, layers, _ = self.run_step(self.begin(x), cache["layers"], cache["below"], context, at=at)
        return self._end(state).astype(x.dtype), cache | {"layers": layers}

    def _end(self, state: Any) -> jax.Array:
        return state[0] if self.looks else state[1]


class Seen(nnx.Module):
    """A block whose output goes into the mix, too."""

    def __init__(self, block: Any):
        self.block = block

    def __call__(
        self, x: Mix, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[Mix, dict[str, Any], Aux]:
        state, *rest = x
        state, carries, aux = self.block(state, carries, context, key=key)
        return _mixed(state, *rest), carries, aux

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return self.block.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int) -> Any:
        return self.block.init_cache(B, length)

    def step(
        self, x: Mix, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[Mix, Any, dict[str, Any]]:
        state, *rest = x
        state, cache, carries = self.block.step(state, cache, carries, context, at)
        return _mixed(state, *rest), cache, carries


class Looking(nnx.Module):
    """A block whose cross-attention looks at the mix that is its own, of the context's source (layers, B, S, D)."""

    def __init__(self, block: Any):
        self.block = block

    def __call__(
        self, x: Numbered, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[Numbered, dict[str, Any], Aux]:
        state, number = x
        state, carries, aux = self.block(state, carries, _own_source(context, number), key=key)
        return (state, number + 1), carries, aux

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return self.block.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int) -> Any:
        return self.block.init_cache(B, length)

    def step(
        self, x: Numbered, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[Numbered, Any, dict[str, Any]]:
        state, number = x
        state, cache, carries = self.block.step(state, cache, carries, _own_source(context, number), at)
        return (state, number + 1), cache, carries


def _own_source(context: Context, number: jax.Array) -> Context:
    assert context.source is not None
    return dataclasses.replace(context, source=context.source[number])


def _mixed(x, mix, share, number) -> Mix:
    return x, mix + _share(share[number], x), share, number + 1


def _share(share: jax.Array, x: jax.Array) -> jax.Array:
    """() or (views,) times x -> x's shape, or (views, ...), float32."""
    return share.reshape(*share.shape, *[1] * (x.ndim * share.ndim)) * x.astype(jnp.float32)
