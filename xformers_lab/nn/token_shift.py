"""Token shift: what a projection reads, mixed with what it reads one position before."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.layer_number import first_layer
from xformers_lab.nn.size import Size


class TokenShift(nnx.Module):
    """The inputs of several projections, each a mix of its own, channel by channel (RWKV-4: Peng et al., 2023, arXiv
    2305.13048, section 3):

        x'_t = m * x_t + (1 - m) * x_(t-1)

    At the start channel i of D in layer l of L has m = (i / D)^(p (1 - l / L)) + a l / (L - 1), as the authors' code
    has it: lower layers look back with most of their channels, higher ones with fewer. A parameter is what training
    adds to that, for the layers of a stack are one program, which learns l as it runs (see layer_number.py).

    starts: (p, a) of every projection, under its name.
    """

    def __init__(self, size: Size, starts: Mapping[str, tuple[float, float]]):
        self.starts, self.layers, self.number = tuple(starts.items()), size.layers, first_layer()
        for name in starts:
            setattr(self, name, nnx.Param(jnp.zeros(size.dim), decays=False))

    def share(self, name: str) -> jax.Array:
        """The m of a projection, (D,) float32."""
        learned, (power, more) = getattr(self, name)[...], dict(self.starts)[name]
        number = jnp.minimum(self.number[...], self.layers - 1)
        at = jnp.arange(len(learned)) / len(learned)
        return at ** (power * (1 - number / self.layers)) + more * number / max(1, self.layers - 1) + learned

    def __call__(self, name: str, x: jax.Array, before: jax.Array) -> jax.Array:
        """x (..., D) and what stood before it, shaped alike -> what the projection reads."""
        share = self.share(name)
        return (share * x.astype(jnp.float32) + (1 - share) * before.astype(jnp.float32)).astype(x.dtype)


def one_before(
    x: jax.Array,
    *,
    valid: jax.Array | None = None,
    documents: jax.Array | None = None,
    first: jax.Array | None = None,
) -> jax.Array:
    """x (B, T, D) one position later: what stands before each, zeros where that is padding or another document.

    first: what stands in front of them all, (B, D), where that is not zeros.
    """
    x = x if valid is None else jnp.where(valid[..., None], x, 0)
    first = jnp.zeros_like(x[:, 0]) if first is None else first.astype(x.dtype)
    before = jnp.concatenate([first[:, None], x[:, :-1]], 1)
    if documents is None:
        return before
    same = jnp.pad(documents[:, 1:] == documents[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(same[..., None], before, 0)
