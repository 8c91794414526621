import dataclasses
from typing import Any

import jax
from flax import nnx

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size


class SandwichOrder(Depth):
    """Sandwich Transformer: attention gathers at the bottom, feed-forward layers at the top (Press et al., 2020, arXiv
    1911.03864).

    With s for attention and f for feed-forward, n layers are s^k (sf)^(n-k) f^k: the parameters and the cost of the
    usual (sf)^n, which is k=0, in another order. Mechanisms joined by `+` take turns over all attention layers. Each
    sub-layer keeps its placement and normaliser; it counts as half a layer in "computation".

    Options:
        k: how many layers are taken apart; none: 3/8 of them, the paper's best for 16
    """

    own_layers = True
    documents_apart = True
    several_streams = True

    def __init__(self, size: Size, *, k: int | None = None, make_block: MakeBlock, period: int, rngs: nnx.Rngs):
        k = size.layers * 3 // 8 if k is None else k
        if not 0 <= k <= size.layers:
            raise Refused(f"k={k} must be from 0 to layers={size.layers}")

        def part(count: int, make, period: int = period):
            return Fixed(dataclasses.replace(size, layers=count), make_block=make, period=period, rngs=rngs)

        parts = [
            (k, lambda index, rngs: make_block(index, rngs).only("attention")),
            (size.layers - k, lambda index, rngs: make_block(k + index, rngs)),
            (k, lambda index, rngs: make_block(0, rngs).only("ffn"), 1),
        ]
        self.parts = nnx.List(part(*arguments) for arguments in parts if arguments[0])

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        keys = [None] * len(self.parts) if key is None else list(jax.random.split(key, len(self.parts)))
        carries, aux = self._carries(x.shape[0], x.shape[1], x.shape[1]), Aux()
        for part, key in zip(self.parts, keys, strict=True):
            x, carries, more = part.run(x, carries, context, key=key)
            aux = aux + more
        return x, aux

    def _carries(self, B: int, T: int, S: int) -> dict:
        carries = {}
        for part in self.parts:
            carries |= part.initial_carries(B, T, S)
        return carries

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        layers = [part.init_cache(B, length)["layers"] for part in self.parts]
        return {"layers": layers, "below": self._carries(B, 1, length)}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        carries, layers = cache["below"], []
        for part, caches in zip(self.parts, cache["layers"], strict=True):
            x, caches, carries = part.run_step(x, caches, carries, context, at=at)
            layers.append(caches)
        return x, cache | {"layers": layers}
