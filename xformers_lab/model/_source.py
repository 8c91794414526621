"""What models with an encoder share: which positions are the source, and how it is read before anything is decoded."""

import jax.numpy as jnp

from xformers_lab.model import Model


class EncoderInput(Model):
    """A model whose first `source` positions are read by an encoder; `blank`, where there is one, fills them up.

    Its cache has `at`, how many tokens it was given, and of every source the tokens and which of them are valid, `read`
    and `valid` (1, B, source).
    """

    blank: int | None = None

    def real_source(self, tokens, valid=None):
        """Which tokens of sources (B, S) are looked at, of those that are valid; None where all are."""
        if self.blank is None:
            return valid
        return self.filled(tokens) if valid is None else self.filled(tokens) & valid

    def filled(self, tokens):
        """Which tokens are not blank."""
        return jnp.ones(tokens.shape, bool) if self.blank is None else tokens != self.blank

    def unread(self, B: int) -> dict:
        """The part of an empty cache that is about the source."""
        read = jnp.zeros((1, B, self.source), jnp.int32)
        return {"at": jnp.zeros((), jnp.int32), "read": read, "valid": jnp.ones(read.shape, bool)}

    def take(self, cache, tokens):
        """The cache with one more token (B,) of every source."""
        put = lambda name, new: {name: cache[name].at[0, :, cache["at"]].set(new)}
        return cache | put("read", tokens) | put("valid", self.filled(tokens))

    def read(self, cache, sources, valid):
        valid = self.filled(sources) & valid
        return cache | {"at": jnp.full((), self.source), "read": sources[None], "valid": valid[None]}
