from typing import Any

import jax
from flax import nnx

from xformers_lab import spec
from xformers_lab.nn.layer_context import LayerContext, apply
from xformers_lab.nn.size import Size
from xformers_lab.norm import Norm


class Sandwich(Norm):
    """Sandwich-LN: x + n2(f(n1(x))), and n1 once more at the end of the stack (Ding et al., 2021, arXiv 2105.13290).

    Peri-LN (Kim et al., 2025, arXiv 2502.02732) is the same with normaliser=rmsnorm, and embed_norm=rmsnorm for its
    norm of embeddings; Gemma 2 has it without the latter.

    Options:
        normaliser: a file of norm/normaliser
    """

    def __init__(self, size: Size, *, normaliser: str = "layernorm", rngs: nnx.Rngs):
        super().__init__(size, normaliser=normaliser, rngs=rngs)
        self.size, self.normaliser = size, normaliser

    def start(self, layer: Any) -> None:
        """Only around a sub-layer is there something to normalise behind it, not at the end of the stack."""
        self.outer = spec.build("normaliser", self.normaliser, self.size)

    def before(self, x: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(x, context)

    def branch(self, y: jax.Array, context: LayerContext) -> jax.Array:
        return apply(self.outer, y, context)

    def final(self, x: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(x, context)
