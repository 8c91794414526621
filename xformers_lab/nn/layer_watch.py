"""Whoever looks at the layers of a stack as they run: at their parameters before, at what they give behind."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Protocol


class LayerWatch(Protocol):
    """enter(block): a layer is about to run, with parameters of its own that may be changed. leave(x) -> x: what it
    gave, which goes on as what comes back."""

    def enter(self, block: Any) -> None: ...

    def leave(self, x: Any) -> Any: ...


_WATCH: contextvars.ContextVar[LayerWatch | None] = contextvars.ContextVar("layer_watch", default=None)


@contextlib.contextmanager
def watched(watch: LayerWatch) -> Iterator[None]:
    """Meanwhile every layer of a stack is shown, in the order in which they run."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def watching() -> LayerWatch | None:
    """Who looks at the layers; None where nobody does. A loop over them is written out where somebody does, for what is
    within a loop of a program cannot be taken out of it."""
    return _WATCH.get()
