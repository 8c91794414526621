"""What a layer may know of the rows that it works on, beside their values."""

import dataclasses
import inspect
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """valid: (B, T) bool, None where nothing is padded; train: whether a training step asks, whose rows move running
    statistics."""

    valid: jax.Array | None = None
    train: bool = False


def takes_context(layer: Any) -> bool:
    """Whether a layer names `context` in the signature of its `__call__`."""
    return "context" in inspect.signature(type(layer).__call__).parameters


def apply(layer: Any, x: jax.Array, context: LayerContext) -> jax.Array:
    """`layer(x)`, or `layer(x, context)` of one that takes it; x (..., D) -> (..., D')."""
    return layer(x, context) if takes_context(layer) else layer(x)
