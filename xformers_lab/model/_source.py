"""What models with an encoder share: which positions are the source, and how it is read before anything is decoded."""

import jax.numpy as jnp

from xformers_lab.model import Model


class Sourced(Model):
    """A model whose first `source` positions are read by an encoder; `blank`, where there is one, fills them up.

    Its cache has `at`, how many tokens it was given, and of every source the tokens and which of them are real, `read`
    and `real` (1, B, source).
    """

    blank: int | None = None

    def real_source(self, tokens, real=None):
        """Which tokens of sources (B, S) are looked at, bool; None where all are."""
        if self.blank is None:
            return real
        filled = tokens != self.blank
        return filled if real is None else filled & real

    def unread(self, B: int) -> dict:
        """The part of an empty cache that is about the source."""
        read = jnp.zeros((1, B, self.source), jnp.int32)
        return {"at": jnp.zeros((), jnp.int32), "read": read, "real": jnp.ones(read.shape, bool)}

    def take(self, cache, tokens):
        """The cache with one more token (B,) of every source."""
        at, real = cache["at"], self.real_source(tokens)
        read = {"read": cache["read"].at[0, :, at].set(tokens)}
        return cache | read if real is None else cache | read | {"real": cache["real"].at[0, :, at].set(real)}

    def read(self, cache, sources, real):
        given = {"read": sources[None], "real": self.real_source(sources, real)[None]}
        return cache | given | {"at": jnp.full((), self.source)}
