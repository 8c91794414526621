"""Short convolutions: every channel mixed with itself at the few positions beside, as a layer of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused


class ShortConv(nnx.Module):
    """A depthwise convolution along positions, (B, T, C) -> (B, T, C).

    y_t = sum_j w_j * x_(t+j), w_j in R^C, over the last `width` positions, t among them, or where both sides are seen
    over `width` around t, an odd number. What stands before the first position, behind the last, in padding or in
    another document counts as zeros. There is neither a bias nor an activation; who wants silu applies it to y.

    At the start t has a weight of 1/2 and every other position of 1/(2 width), as in Primer (So et al., 2021, arXiv
    2109.08668), unless `kernel_init` draws the (width, C) weights, oldest position first. It takes O(T width C), as
    shifted copies of x, which XLA fuses: on CPU its own depthwise convolution and gradient are many times slower.

    Args:
        channels: C.
        width: Positions that it sees, at least 2.
        causal: Whether it sees none after t.
        kernel_init: An initializer of jax.nn, given a key, (width, C) and float32.
    """

    def __init__(
        self, channels: int, width: int, *, causal: bool = True, kernel_init: Any = None, rngs: nnx.Rngs | None = None
    ):
        if width < 2 or (not causal and width % 2 == 0):
            raise Refused(
                "a short convolution sees at least 2 positions, and an odd number where it sees both sides; got "
                f"{width}: use {max(3, width + 1)}"
            )
        self.before = width - 1 if causal else width // 2
        self.after, shape = width - 1 - self.before, (width, channels)
        if kernel_init is None:
            start = jnp.full(shape, 0.5 / width).at[self.before].set(0.5)
        elif rngs is None:
            raise ValueError("kernel_init draws with rngs, which is missing")
        else:
            start = kernel_init(rngs.params(), shape, jnp.float32)
        self.weights = nnx.Param(start, decays=False)

    def __call__(self, x: jax.Array, *, valid: jax.Array | None = None, documents: jax.Array | None = None):
        """x (B, T, C), of which valid (B, T) is no padding and documents (B, T) numbers the documents -> (B, T, C)."""
        x = x if valid is None else jnp.where(valid[..., None], x, 0)
        sides = [(0, 0), (self.before, self.after)]
        wide = jnp.pad(x, [*sides, (0, 0)])
        if documents is None:
            return self._summed(wide)
        # No document has the number of what stands outside of the row.
        beside = jnp.pad(documents, sides, constant_values=-1)
        return self._summed(wide, lambda rows: (rows(beside) == documents)[..., None])

    def init_tail(self, B: int, dtype: Any = jnp.float32) -> jax.Array:
        """What `step` remembers before the first token of B sequences: its inputs, oldest first, (B, width - 1, C)."""
        return jnp.zeros((B, self.before, self.weights.shape[-1]), dtype)

    def step(self, tail: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One more token x (B, C) of a causal one -> (B, C) and the new tail."""
        y, tail = self.step_several(tail, x[:, None])
        return y[:, 0], tail

    def step_several(self, tail: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """T more tokens x (B, T, C) of a causal one -> (B, T, C) and the new tail."""
        if self.after:
            raise Refused("a short convolution that sees both sides cannot go on token by token")
        wide = jnp.concatenate([tail.astype(x.dtype), x], 1)
        return self._summed(wide), wide[:, x.shape[1] :].astype(tail.dtype)

    def _summed(self, wide: jax.Array, seen: Any = None) -> jax.Array:
        """(B, before + T + after, C) -> (B, T, C); seen(rows): which of a tap's inputs count, (B, T, 1)."""
        T, weights = wide.shape[1] - self.before - self.after, self.weights[...]
        total = jnp.zeros((), jnp.float32)
        for tap in range(len(weights)):
            rows = lambda array, tap=tap: array[:, tap : tap + T]
            inputs = rows(wide).astype(jnp.float32)
            total += weights[tap] * (inputs if seen is None else jnp.where(seen(rows), inputs, 0))
        return total.astype(wide.dtype)
