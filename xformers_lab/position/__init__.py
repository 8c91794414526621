"""The shelf of positions: how a token learns where it is. One file = one class, a subclass of `Position`.

A position defines what it needs of three methods; what it does not define is the identity (or nothing):
`embed(x, at)` adds to the embeddings, `rotate(x, at)` turns queries and keys, `bias()` gives scores to add.
"""

from flax import nnx

from xformers_lab.size import Size


class Position(nnx.Module):
    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.size = size

    def embed(self, x, at):
        """Token embeddings (B, T, D) at positions at (T,) -> (B, T, D)."""
        return x

    def rotate(self, x, at):
        """Queries or keys of all heads (B, T, N, H) at positions at (T,) -> (B, T, N, H)."""
        return x

    def bias(self):
        """None, or a pytree whose leaves have a leading axis N; one head's slice is called with broadcasting query and
        key positions and gives scores to add. Blockwise mechanisms call it per block: a T x S array is never built."""
        return None
