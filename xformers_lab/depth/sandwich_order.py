import dataclasses

import jax
from flax import nnx

from xformers_lab.depth import Context, Depth
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

    def __init__(self, size: Size, *, k: int | None = None, make_block, period: int, rngs: nnx.Rngs):
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
        self.parts = nnx.List(part(*given) for given in parts if given[0])

    def __call__(self, x, context: Context, *, key=None):
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

    def init_cache(self, B: int, length: int):
        layers = [part.init_cache(B, length)["layers"] for part in self.parts]
        return {"layers": layers, "below": self._carries(B, 1, length)}

    def step(self, x, cache, context: Context, *, at):
        carries, layers = cache["below"], []
        for part, own in zip(self.parts, cache["layers"], strict=True):
            x, own, carries = part.run_step(x, own, carries, context, at=at)
            layers.append(own)
        return x, cache | {"layers": layers}
