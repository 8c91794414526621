"""Where the gradients of keys and values are added up while rows of blocks are gone through backwards."""

import jax.numpy as jnp

from xformers_lab.attention._engine.block_sparse.view import View


class Totals:
    """Gradients of one part's keys, values and bias while its groups add to them.

    Looped rows add to (H, S) arrays, batched ones to (blocks, H, block) arrays; each exists once something adds to it.
    """

    def __init__(self, view: View, bias):
        self.view, self.bias = view, bias
        self.transposed = self.blocked = None

    def start_transposed(self):
        width = self.view.k.shape[0]
        if self.transposed is None:
            shapes = ((self.view.k.shape[1], width), (self.view.v.shape[1], width))
            self.transposed = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        return self.transposed

    def start_blocked(self):
        if self.blocked is None:
            self.blocked = tuple(
                jnp.zeros((x.shape[0] // self.view.block_k, x.shape[1], self.view.block_k), jnp.float32)
                for x in (self.view.k, self.view.v)
            )
        return self.blocked

    def _sum(self, which: int):
        """(S, H); zeros where a part has no live block at all."""
        found = None if self.transposed is None and self.blocked else self.start_transposed()[which].T
        if self.blocked is None:
            return found
        blocked = self.blocked[which].swapaxes(1, 2).reshape(-1, self.blocked[which].shape[1])
        return blocked if found is None else found + blocked

    def keys(self):
        return self._sum(0)

    def values(self):
        return self._sum(1)
