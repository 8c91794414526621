from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.landmarks import EXACT, inverse, largest
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Skyformer(OneHead):
    """Skyformer: Gaussian kernel and a Nystrom method on its positive completion (Chen et al., 2021, arXiv 2111.00035).

    out = K(q, z) (K(z, z) + ridge I)^-1 K(z, k) v, which approximates K(q, k) v with the Gaussian kernel
    K(x, y) = exp(-|x - y|^2 / (2 sqrt(H))): the softmax's numerator, divided by a factor of each side's length in place
    of its row sum. z (the landmarks) are queries and keys drawn at random, so that K(z, z) is part of the positive
    semi-definite matrix K([q; k], [q; k]), of which K(q, k) is a corner.

    The kernel is not the softmax, and its rows do not sum to 1.
    Deviations from the paper: the inverse's Newton-Schulz steps, on the matrix scaled on both sides by the roots of its
    row sums as there, start from each head's own largest sums (the authors' code takes the batch's); every head draws
    positions of its own, which samples share as fractions of their length; evaluation keeps those drawn first.

    Options:
        landmarks: m, half of them queries and half keys, drawn with replacement; at most twice the length
        ridge: added to the diagonal of K(z, z)
        iterations: Newton-Schulz steps for the inverse
        redraw: when landmarks are drawn: anew in every training step, or once
    """

    kind = "low rank"
    exact = False
    complexity = Complexity(time="O(T m H + m^3)", memory="O(T m)")
    refuses: ClassVar = {
        "causal": "landmarks are drawn from the whole sequence",
        "cross": "landmarks are drawn from the queries and keys of one sequence",
    }

    def __init__(
        self,
        size: Size,
        *,
        landmarks: int = 128,
        ridge: float = 0.1,
        iterations: int = 6,
        redraw: Literal["step", "once"] = "step",
        rngs: nnx.Rngs,
    ):
        if landmarks < 2:
            raise Refused(f"landmarks must be at least 2, a query and a key, got {landmarks}")
        if ridge <= 0:
            raise Refused(f"ridge must be above 0, got {ridge:g}: landmarks may be drawn twice")
        if iterations < 1:
            raise Refused(f"iterations must be at least 1, got {iterations}")
        super().__init__(size, rngs=rngs)
        self.landmarks, self.ridge, self.iterations, self.redraw = landmarks, ridge, iterations, redraw
        self.landmarks_at = nnx.Variable(jax.vmap(self._draw)(jax.random.split(rngs.params(), size.heads)))

    def _draw(self, key):
        """Where landmarks stand, as fractions of the positions that are no padding."""
        return jax.random.uniform(key, (min(self.landmarks, 2 * self.size.length),))

    def per_head(self):
        return {"drawn": self.landmarks_at[...]}

    def attend(self, q, k, v, *, valid=None, drawn, key=None):
        if len(q) != len(k):
            raise Refused(
                f"skyformer takes as many queries as keys, got {len(q)} and {len(k)}: "
                "its landmarks are drawn from both; use performer or another attention"
            )
        return jax.checkpoint(self._attend)(q, k, v, valid, self._positions(valid, len(q), drawn, key))

    def _positions(self, valid, T: int, drawn, key):
        if self.redraw == "step" and key is not None:
            drawn = self._draw(key)
        if valid is None:
            return jnp.floor(drawn * T).astype(int)
        number = jnp.floor(drawn * valid.sum()).astype(int)  # which of the valid positions
        return jnp.minimum(jnp.searchsorted(jnp.cumsum(valid), number + 1), T - 1)

    def _attend(self, q, k, v, valid, at):
        q, k = (x.astype(jnp.float32) * x.shape[1] ** -0.25 for x in (q, k))
        half = len(at) // 2
        z = jnp.concatenate([q[at[:half]], k[at[half:]]])
        middle = _gaussian(z, z) + self.ridge * jnp.eye(len(z))
        scale = middle.sum(1) ** -0.5
        right = _gaussian(z, k)
        right = right if valid is None else jnp.where(valid, right, 0)
        right = scale[:, None] * jnp.dot(right.astype(v.dtype), v, **EXACT)
        inner = scale[:, None] * (inverse(middle * scale * scale[:, None], self.iterations) @ right)
        return jnp.dot(_gaussian(q, z), inner).astype(v.dtype)

    def reference(self, q, k, v, *, valid=None, drawn, key=None):
        T, H = q.shape
        if len(k) != T:
            raise Refused("skyformer takes as many queries as keys")
        at = self._positions(valid, T, drawn, key)
        both, rows = jnp.concatenate([q, k]), jnp.where(jnp.arange(len(at)) < len(at) // 2, at, at + T)
        # The columns of the completed matrix (2T, 2T) that were drawn.
        columns = jnp.exp(-jnp.square(both[:, None] - both[rows]).sum(-1) / (2 * H**0.5))
        a = columns[rows] + self.ridge * jnp.eye(len(at))
        root = jnp.diag(a.sum(1) ** -0.5)
        a = root @ a @ root
        inverse = a.T / (largest(a.sum(0)) * largest(a.sum(1)))
        for _ in range(self.iterations):
            x, eye = a @ inverse, jnp.eye(len(a))
            inverse = inverse @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x))) / 4
        corner = columns[:T] @ root @ inverse @ root @ columns[T:].T
        return ((corner if valid is None else jnp.where(valid, corner, 0)) @ v).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, m = self.size.head, min(self.landmarks, 2 * S)
        flops = 8 * T * m * H + 2 * m * m * (2 * H + 4 * self.iterations * m)
        return Cost(flops=flops, memory=max(T * max(m, H), self.iterations * m * m), state=0)


def _gaussian(x, y):
    """exp(-|x - y|^2 / 2) of rows (n, H) and (m, H) -> (n, m)."""
    lengths = jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1)
    return jnp.exp(jnp.minimum(jnp.dot(x, y.T, **EXACT) - lengths / 2, 0))
