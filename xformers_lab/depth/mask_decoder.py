import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.documents import places
from xformers_lab.nn.embedding import ADDED, START
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size


class MaskDecoder(Depth):
    """DeBERTa's enhanced mask decoder: absolute positions enter just before the answers (He et al., 2020, arXiv
    2006.03654, section 3.2).

    With H the states below the last of L layers and p a learned vector for every position,
        Q_0 = H + p,  Q_i = layer_L(queries and residual stream Q_(i-1), keys and values H),  i = 1..passes
    and answers are read off the last Q. So all layers below know relative positions alone, as with position=deberta,
    and the words that are hidden are told apart by where they stand. The passes have the same parameters.

    An encoder alone, as in the paper. "computation" counts each pass as a layer.
    Deviations from the paper: p is of the decoder alone, and where data is packed begins anew with each document.

    Options:
        passes: how often the last layer runs
    """

    documents_apart = True

    def __init__(self, size: Size, *, passes: int = 2, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        if passes < 1:
            raise Refused(f"passes must be at least 1, got {passes}")
        below = size.layers - 1
        options = {"make_block": make_block, "period": period, "rngs": rngs}
        self.below = Fixed(dataclasses.replace(size, layers=below), **options) if below else None
        self.last, self.passes = make_block(below, rngs), passes
        if self.last.causal:
            raise Refused(
                "the enhanced mask decoder fills in words that are hidden, so it serves an encoder: use model=encoder, "
                "or depth=fixed"
            )
        if reason := self.last.attention.refusals().get("cross"):
            raise Refused(f"attention={self.last.name} cannot look from queries at other states: {reason}")
        self.table = nnx.Param(nnx.initializers.normal(START)(rngs.params(), (size.length, size.dim)), decays=False)

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        T = x.shape[1]
        keys = [None] * (self.passes + 1) if key is None else list(jax.random.split(key, self.passes + 1))
        aux = Aux()
        if self.below is not None:
            x, aux = self.below(x, context, key=keys[-1])
        at = jnp.arange(T) if context.documents is None else places(context.documents)
        states, x = x, x + (self.table[at] * (ADDED / START)).astype(x.dtype)
        for number in range(self.passes):
            x, more = self._pass(x, states, context, keys[number])
            aux = aux + more
        return x, aux

    def _pass(self, x: jax.Array, states: jax.Array, context: Context, key: Any) -> tuple[jax.Array, Aux]:
        """The last layer on queries x (B, T, D), its keys and values of `states`."""
        (B, T), block = x.shape[:2], self.last
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        layer = LayerContext(context.valid, key is not None)
        y, _, aux = block.attend(x, block.initial_carries(B, T, T), context, source=states, keys=keys[:2])
        x = block.attention_norm.after(x, y, layer)
        if block.ffn is not None:
            y, more = block.apply_ffn(x, context, keys=keys[2:])
            x, aux = block.ffn_norm.after(x, y, layer), aux + more
        return x, computation(1) | aux

    def init_cache(self, B: int, length: int) -> Any:
        raise Refused("depth=mask_decoder fills in words that are hidden, so it cannot decode token by token")
