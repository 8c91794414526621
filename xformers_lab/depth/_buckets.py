"""Work on as many rows as a batch needs, where shapes must be known before: one branch for each of a few sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def over_first(count: jax.Array, sizes: Sequence[int], run: Callable[[int], Any]) -> Any:
    """run(size) for the smallest of the rising `sizes` that is at least `count` ().

    Every size must give the same shapes; the last one is taken where none is large enough. Only the branch taken runs.
    """
    if len(sizes) == 1:
        return run(sizes[0])
    at = jnp.searchsorted(jnp.array(sizes[:-1]), count)
    return lax.switch(at, [lambda size=size: run(size) for size in sizes])
