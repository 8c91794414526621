from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size

Mix = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Transparent(Fixed):
    """Transparent attention: what leaves the stack is a learned mix of all its layers (Bapna et al., 2018, arXiv
    1808.07561).

        out = sum over i = 0..L of s_i h_i,    s = softmax(w),    h_0 the embeddings, h_i the output of layer i

    w (L + 1) is zeros at first. The paper gives each decoder layer a mix of its own of the encoder's layers for cross-
    attention, so that gradients reach the lower ones straight; here one stack feeds one head, so there is one mix. The
    head's normaliser, where the norm has one, follows it. The mix is float32 and made on the way up.
    """

    documents_apart = True
    several_streams = True
    plain_step = False

    def __init__(self, size: Size, *, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        super().__init__(size, make_block=lambda index, rngs: Seen(make_block(index, rngs)), period=period, rngs=rngs)
        self.mix = nnx.Param(jnp.zeros(size.layers + 1), decays=False)

    def begin(self, x: jax.Array) -> Mix:
        """The state, the mix so far, the shares of layers, and the number of the next layer."""
        share = jax.nn.softmax(self.mix[...])
        return x, share[0] * x.astype(jnp.float32), share, jnp.ones((), jnp.int32)

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        carries = self.initial_carries(x.shape[0], x.shape[1], x.shape[1])
        state, _, aux = self.run(self.begin(x), carries, context, key=key)
        return state[1].astype(x.dtype), aux

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        state, layers, _ = self.run_step(self.begin(x), cache["layers"], cache["below"], context, at=at)
        return state[1].astype(x.dtype), cache | {"layers": layers}


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


def _mixed(x, mix, share, number) -> Mix:
    return x, mix + share[number] * x.astype(jnp.float32), share, number + 1
