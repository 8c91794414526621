import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._segments import mean_of, runs
from xformers_lab.depth._stack import shared
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size


class Funnel(Depth):
    """Funnel-Transformer: blocks of layers, each of which reads a sequence half as long as the one before (Dai et al.,
    2020, arXiv 2006.03236).

        first layer of a block:  p = pool(h),  h' = p + attention(queries p, keys and values h),  then feed-forward
        the others:              as usual, on h'

    pool makes one state of two neighbours: their mean, or their largest numbers. Only queries are pooled, so that what
    they leave out can be looked up in h. Where a sequence gets one answer, the states of the last block stay short:
    each stands for the 2^(blocks - 1) tokens that it was pooled from, and a mean over tokens weighs it by them. Where
    tokens have answers, they get it added to what the first block gave them, and `decoder` layers more.

    Padding counts in no pool; two of padding are padding. A pooled query stands at the place of the first of its two.
    Positions count the rows of a layer's own length: rotations and added scores are of their distance. What a mechanism
    hands to the layer above ends with each block. Attention of a block's first layer runs for both places of a pooled
    query, which any mechanism can, and the second's answer is dropped: it costs as much as before the pooling, all else
    half. "computation" counts a layer of block i = 0, 1, ... as 2^-i. An encoder alone: depth=hourglass is causal.
    Deviations from the paper: no class token that stays out of the pool; pools are of two.

    Options:
        blocks: how many lengths, each half of the one before
        pool: mean or max
        decoder: layers on all tokens at the end (none: a quarter of them where tokens have answers, at least one; else
            0)
    """

    def __init__(
        self,
        size: Size,
        *,
        blocks: int = 3,
        pool: Literal["mean", "max"] = "mean",
        decoder: int | None = None,
        make_block: MakeBlock,
        period: int,
        target: str,
        rngs: nnx.Rngs,
    ):
        of_tokens = target == "token"
        decoder = (max(1, size.layers // 4) if of_tokens else 0) if decoder is None else decoder
        deep = size.layers - decoder
        if blocks < 2 or decoder < 0 or deep < blocks:
            raise Refused(
                f"layers={size.layers} are no funnel of blocks={blocks}, decoder={decoder}: there must be 2 blocks or "
                "more, each with a layer"
            )
        if size.length <= 2 ** (blocks - 1):
            raise Refused(
                f"blocks={blocks} leave one state of seq_len={size.length}: it must be above {2 ** (blocks - 1)}"
            )
        self.pool, self.of_tokens = pool, of_tokens or decoder > 0

        def part(first: int, count: int, length: int):
            make = lambda index, rngs: make_block(first + index, rngs, length=length)
            return Fixed(dataclasses.replace(size, layers=count), make_block=make, period=period, rngs=rngs)

        lengths = [-(-size.length // 2**number) for number in range(blocks)]
        starts = [-(-deep * number // blocks) for number in range(blocks + 1)]
        self.pooling, self.parts = nnx.List([]), nnx.List([])
        for number, length in enumerate(lengths):
            first, count = starts[number], starts[number + 1] - starts[number]
            if number:
                self.pooling.append(Pooling(make_block(first, rngs, length=lengths[number - 1]), pool))
                first, count = first + 1, count - 1
            self.parts.append(part(first, count, length) if count else None)
        self.decoder = part(deep, decoder, size.length) if decoder else None

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        T, aux, states = x.shape[1], Aux(), []
        keys = iter([None] * 2 * len(self.parts) if key is None else jax.random.split(key, 2 * len(self.parts)))
        here = context
        for number, part in enumerate(self.parts):
            if number:
                x, here, more = self.pooling[number - 1](x, here, key=next(keys))
                aux = aux + shared(more, 2**number)
            if part is not None:
                x, more = part(x, here, key=next(keys))
                aux = aux + shared(more, 2**number)
            states.append(x)
        x = jnp.repeat(x, 2 ** (len(self.parts) - 1), 1)[:, :T]
        if self.of_tokens:
            x = states[0] + x
        if self.decoder is not None:
            x, more = self.decoder(x, context, key=next(keys))
            aux = aux + more
        return x, aux

    def init_cache(self, B: int, length: int) -> Any:
        raise Refused("depth=funnel pools what comes later, too, so it cannot decode token by token")


class Pooling(nnx.Module):
    """A block whose queries are pooled, two to one."""

    def __init__(self, block: Any, pool: str):
        if block.causal:
            raise Refused(
                "a pooled query sees both of its tokens, so this is for an encoder: use depth=hourglass, which is "
                "causal, or model=encoder"
            )
        if reason := block.attention.refusals().get("cross"):
            raise Refused(f"attention={block.name} cannot look from pooled queries at what is not pooled: {reason}")
        self.block, self.pool = block, pool

    def __call__(
        self, x: jax.Array, context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, Context, Aux]:
        """(B, S, D) and its context -> (B, S / 2 rounded up, D), the context there, aux."""
        B, S, _ = x.shape
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        two, valid = runs(x, context.valid, 2)
        if self.pool == "mean":
            p = mean_of(two, valid)
        else:
            most = jnp.where(valid[..., None], two, jnp.finfo(x.dtype).min).max(2)
            p = jnp.where(valid.any(2)[..., None], most, 0)
        block, queries = self.block, jnp.repeat(p, 2, 1)[:, :S]
        y, _, aux = block.attend(queries, block.initial_carries(B, S, S), context, source=x, keys=keys[:2])
        short = dataclasses.replace(context, valid=None if context.valid is None else valid.any(2), tokens=None)
        layer_context = LayerContext(short.valid, key is not None)
        x = block.attention_norm.after(p, y[:, ::2], layer_context)
        if block.ffn is not None:
            y, more = block.apply_ffn(x, short, keys=keys[2:])
            x, aux = block.ffn_norm.after(x, y, layer_context), aux + more
        return x, short, computation(1) | aux
