import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._stack import shared
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.later import later
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Distilling(Depth):
    """Self-attention distilling of Informer: between two layers a convolution, and the largest of every two neighbours,
    so that each layer reads half as much as the one before (Zhou et al., 2021, arXiv 2012.07436, equation 5).

        h_(j+1) = maxpool(elu(conv(layer_j(h_j)))), the convolution over 3 positions, the pool over 3 with a stride of 2

    With L layers the last one reads ceil(T / 2^(L - 1)) states, so that all together read less than 2 T. It is for one
    answer of a sequence: a state stands for the tokens that it was pooled from, and a mean over tokens weighs it by
    them. Layer j = 0, 1, ... counts as 2^-j in "computation". Padding is zeros in the convolution and counts in no
    pool; two of padding are padding. Positions count the rows of a layer's own length. What a mechanism hands to the
    layer above ends with each layer. An encoder alone.
    Deviations from the paper: one stack, without the halved copies of it that its encoder joins; no normaliser between
    convolution and elu, which the authors' code has and the equation has not; zeros stand beyond both ends, where that
    code goes on at the other end.
    """

    def __init__(self, size: Size, *, make_block: MakeBlock, period: int, target: str, rngs: nnx.Rngs):
        if target == "token":
            raise Refused(
                "its last layer has one state for several tokens, each of which has an answer: use depth=funnel"
            )
        if size.layers > 1 and size.length <= 2 ** (size.layers - 1):
            raise Refused(
                f"layers={size.layers} leave one state of seq_len={size.length}: it must be above "
                f"{2 ** (size.layers - 1)}"
            )
        self.layers, self.between = nnx.List([]), nnx.List([])
        for number in range(size.layers):
            length = -(-size.length // 2**number)
            make = lambda index, rngs, at=number, length=length: _encoding(make_block(at + index, rngs, length=length))
            self.layers.append(Fixed(dataclasses.replace(size, layers=1), make_block=make, period=1, rngs=rngs))
            if number + 1 < size.layers:
                self.between.append(Halving(size, rngs=rngs))

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        T, aux, count = x.shape[1], Aux(), len(self.layers)
        keys = [None] * count if key is None else list(jax.random.split(key, count))
        for number, layer in enumerate(self.layers):
            x, more = layer(x, context, key=keys[number])
            aux = aux + shared(more, 2**number)
            if number + 1 < count:
                x, valid = self.between[number](x, context.valid)
                context = dataclasses.replace(context, valid=valid, tokens=None)
        return jnp.repeat(x, 2 ** (count - 1), 1)[:, :T], aux

    def init_cache(self, B: int, length: int) -> Any:
        raise Refused("depth=distilling pools what comes later, too, so it cannot decode token by token")


class Halving(nnx.Module):
    """A convolution over 3 positions, elu, and a maximum over 3, of every second position."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.conv = Linear(3 * size.dim, size.dim, dtype=size.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """(B, S, D) -> (B, S / 2 rounded up, D), and which of them are valid."""
        real = jnp.ones(x.shape[:2], bool) if valid is None else valid
        x = jnp.where(real[..., None], x, 0)
        x = jax.nn.elu(self.conv(jnp.concatenate(around(x), -1)))
        three, there = (jnp.stack(around(each), 2)[:, ::2] for each in (x, real))
        most = jnp.where(there[..., None], three, -jnp.inf).max(2)
        most = jnp.where(there.any(2)[..., None], most, 0).astype(x.dtype)
        return most, None if valid is None else (valid | later(valid, 1))[:, ::2]


def around(x: jax.Array) -> list[jax.Array]:
    """(B, S, ...) -> what stands before, at and behind each position, zeros beyond the ends."""
    before = jnp.pad(x[:, :-1], [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)])
    return [before, x, later(x, 1)]


def _encoding(block: Any) -> Any:
    """The block, if it sees both sides."""
    if block.causal:
        raise Refused("its convolutions and pools see what comes later: use depth=hourglass, or model=encoder")
    return block
