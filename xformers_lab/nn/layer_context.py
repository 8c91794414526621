"""What a layer may know of the rows that it works on, beside their values."""

import dataclasses
import inspect
from typing import Any


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """valid: (B, T) bool, None where nothing is padded; train: whether a training step asks, whose rows move running
    statistics."""

    valid: Any = None
    train: bool = False


def asks(layer) -> bool:
    """Whether a layer names `rows` in the signature of its `__call__`."""
    return "rows" in inspect.signature(type(layer).__call__).parameters


def apply(layer, x, rows: LayerContext):
    """`layer(x)`, or `layer(x, rows)` of one that asks for them."""
    return layer(x, rows) if asks(layer) else layer(x)
