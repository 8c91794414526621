"""Documents of packed data, which stand one after another in a row and know nothing of one another."""

import jax
import jax.numpy as jnp


def why_not(choice: str, reason: str, mend: str) -> str:
    """The sentence that refuses packed data: "depth=funnel", a clause, and what to use instead."""
    return f"{choice} cannot keep the documents of packed data apart: {reason}; use packed=false or {mend}"


def places(documents: jax.Array) -> jax.Array:
    """The position of each token within its document: numbers of documents (B, T) -> (B, T) int32 from 0."""
    at = jnp.broadcast_to(jnp.arange(documents.shape[1], dtype=jnp.int32), documents.shape)
    first = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return at - jax.lax.cummax(jnp.where(first, at, 0), axis=1)
