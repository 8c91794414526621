from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.ffn import Ffn
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.size import Size


class Macaron(Fixed):
    """Macaron layers: attention between two feed-forward layers, each with half a step (Macaron Net: Lu et al., 2019,
    arXiv 1906.02762).

        x + 1/2 f1(x),    then x + attention(x),    then x + 1/2 f2(x)

    f1 and f2 have parameters of their own, each with a normaliser of its own; in place of x + f(x) stands what the norm
    makes of it. The paper halves the hidden layers, so that a layer has the parameters it had: ffn=mlp:ratio=2.
    """

    documents_apart = True
    several_streams = True

    def __init__(self, size: Size, *, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        def layer(index: int, rngs: nnx.Rngs):
            return Sandwiched(make_block(index, rngs).only("ffn"), make_block(index, rngs))

        super().__init__(size, make_block=layer, period=period, rngs=rngs)


class Sandwiched(nnx.Module):
    """A block and, before it, the feed-forward half of another."""

    def __init__(self, first: Any, block: Any):
        first.ffn, block.ffn = Half(first.ffn), Half(block.ffn)
        self.first, self.block = first, block

    def __call__(
        self, x: jax.Array, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any], Aux]:
        first, second = (None, None) if key is None else jax.random.split(key)
        x, carries, aux = self.first(x, carries, context, key=first)
        x, carries, more = self.block(x, carries, context, key=second)
        # The two feed-forward layers count as one.
        return x, carries, (aux | computation(0)) + (computation(1) | more)

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return self.block.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int) -> Any:
        own = self.block.init_cache(B, length)
        return {"first": self.first.init_cache(B, length), "block": own} if self.first.ffn.looks_back else own

    def step(
        self, x: jax.Array, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        if not self.first.ffn.looks_back:
            x, _, carries = self.first.step(x, self.first.init_cache(len(x), 1), carries, context, at)
            return self.block.step(x, cache, carries, context, at)
        x, first, carries = self.first.step(x, cache["first"], carries, context, at)
        x, own, carries = self.block.step(x, cache["block"], carries, context, at)
        return x, {"first": first, "block": own}, carries


class Half(Ffn):
    """Half of what a feed-forward layer gives."""

    def __init__(self, layer: Any):
        self.layer, self.documents_apart, self.looks_back = layer, layer.documents_apart, layer.looks_back

    def takes(self, name: str) -> bool:
        return self.layer.takes(name)

    def init_cache(self, B: int, dtype: Any = jnp.float32) -> Any:
        return self.layer.init_cache(B, dtype)

    def step(self, x: jax.Array, cache: Any, **tokens: jax.Array) -> tuple[jax.Array, Any]:
        y, cache = self.layer.step(x, cache, **tokens)
        return y / 2, cache

    def step_several(self, x: jax.Array, cache: Any, **tokens: jax.Array) -> tuple[jax.Array, Any]:
        y, cache = self.layer.step_several(x, cache, **tokens)
        return y / 2, cache

    def rewound(self, before: Any, after: Any, taken: jax.Array, *, read: int) -> Any:
        return self.layer.rewound(before, after, taken, read=read)

    def __call__(self, x: jax.Array, **options: Any) -> tuple[jax.Array, Aux]:
        y, aux = self.layer(x, **options)
        return y / 2, aux
