"""Sub-layers that a depth adds in front of those of a block, each with a placement of its own."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context
from xformers_lab.depth._stack import in_turn
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.layer_context import LayerContext


class Neighbours(Protocol):
    """A sub-layer that sees a few positions beside its own."""

    def __call__(self, x: jax.Array, *, valid: jax.Array | None, documents: jax.Array | None) -> jax.Array:
        """x (B, T, D), of which valid (B, T) is no padding and documents (B, T) numbers the documents -> (B, T, D)."""
        ...

    def init_tail(self, B: int) -> Any:
        """What `step_several` remembers before the first token of B sequences, all zeros."""

    def step_several(self, tail: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """T more tokens x (B, T, D) -> (B, T, D) and the new tail."""
        ...


class Added(nnx.Module):
    """A block, and sub-layers in front of it. Where the block has a memory, they begin anew in every segment."""

    def __init__(self, block: Any, parts: list, *, rngs: nnx.Rngs):
        self.block, self.parts = block, nnx.List(parts)
        self.norms = nnx.List(block.placed(part, rngs=rngs) for part in parts)

    def __call__(
        self, x: jax.Array, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any], Aux]:
        count = len(self.parts) + 1
        last, *keys = [None] * count if key is None else list(jax.random.split(key, count))
        rows = LayerContext(context.valid, key is not None)
        for part, norm, own in zip(self.parts, self.norms, keys, strict=True):
            y = part(norm.before(x, rows), valid=context.valid, documents=context.documents)
            x = norm.after(x, drop(y, self.block.dropout, own), rows)
        return self.block(x, carries, context, key=last)

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return self.block.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        return {"tails": [part.init_tail(B) for part in self.parts], "block": self.block.init_cache(B, length)}

    def step(
        self, x: jax.Array, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        tails = cache["tails"]
        if self.block.memory is not None:
            begins = at % self.block.length == 0
            tails = jax.tree.map(lambda tail: jnp.where(begins, 0, tail), tails)
        x, tails = self._next(x[:, None], tails)
        x, own, carries = self.block.step(x[:, 0], cache["block"], carries, context, at)
        return x, {"tails": tails, "block": own}, carries

    def step_several(self, x: jax.Array, cache: Any, context: Context, at: jax.Array) -> tuple[jax.Array, Any]:
        if self.block.memory is not None:
            return in_turn(self, x, cache, context, at)
        x, tails = self._next(x, cache["tails"])
        x, own = self.block.step_several(x, cache["block"], context, at)
        return x, {"tails": tails, "block": own}

    def _next(self, x: jax.Array, tails: list) -> tuple[jax.Array, list]:
        """The sub-layers on the next T tokens (B, T, D), and the new tails."""
        new = []
        for part, norm, tail in zip(self.parts, self.norms, tails, strict=True):
            y, tail = part.step_several(tail, norm.before(x, LayerContext()))
            x = norm.after(x, y, LayerContext())
            new.append(tail)
        return x, new
