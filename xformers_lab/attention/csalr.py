from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.landmarks import EXACT, means, probabilities, segments
from xformers_lab.attention._engine.products import inverts
from xformers_lab.attention._engine.softmax import masked_softmax
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# The weight of the identity: above 1, the largest an eigenvalue of a softmax can be, so that A + I has an inverse.
IDENTITY = 1.001


class Csalr(OneHead):
    """CSALR, compressed self-attention with low-rank approximation (Chen et al., IJCAI 2020).

    out = (F + E) (A + I)^-1 B v, F = softmax(q k'^T / sqrt(H)), A = softmax(q' k'^T / sqrt(H)),
    B = softmax(q' k^T / sqrt(H)), with q' and k' the means of the queries and keys of m equal runs of positions (the
    landmarks) and E_tj = 1 where position t is in run j. B v is what landmarks attend to; (F + E) (A + I)^-1, whose
    rows sum to 1, combines it for every query, from its own run unless F says otherwise. It has no band: the sum of a
    low-rank matrix and a band is `low_rank_band`.

    Deviations from the paper: there runs are tiles of an image, of a fixed size, and scores are not divided by sqrt(H).
    Here runs divide the positions that are no padding into a fixed number; E and I count 1.001, for with 1 A + I may
    have no inverse. A position of padding is in no run: its own output is B v combined by F alone.

    Options:
        landmarks: m, runs of positions; at most the length counts
    """

    kind = "low rank"
    heads_together = True
    exact = False
    accuracy = "; with a landmark for every position it is full attention"
    complexity = Complexity(time="O(T m H + m^3)", memory="O(T m)")
    refuses: ClassVar = {
        "causal": "a landmark is a mean over a run of positions, and the inverse mixes runs that are to come",
        "cross": "landmarks are runs of the same sequence on both sides",
    }

    def __init__(self, size: Size, *, landmarks: int = 64, rngs: nnx.Rngs):
        if landmarks < 1:
            raise Refused(f"landmarks must be at least 1, got {landmarks}")
        super().__init__(size, rngs=rngs)
        self.landmarks = landmarks

    def attend(self, q, k, v, *, valid=None):
        if len(q) != len(k):
            raise Refused(
                f"csalr takes as many queries as keys, got {len(q)} and {len(k)}: "
                "its landmarks are runs of the same sequence; use linformer or another attention"
            )
        return jax.checkpoint(self._attend)(q, k, v, valid)

    def _attend(self, q, k, v, valid):
        member = segments(valid, len(q), min(self.landmarks, len(q)))
        there = None if valid is None else member.any(1)
        q_mean, k_mean = means(q, member).astype(q.dtype), means(k, member).astype(q.dtype)
        middle = probabilities(q_mean, k_mean, there) + IDENTITY * jnp.eye(len(member))
        right = jnp.dot(probabilities(q_mean, k, valid).astype(v.dtype), v, **EXACT)
        if there is not None:
            right = jnp.where(there[:, None], right, 0)
        left = probabilities(q, k_mean, there) + IDENTITY * member.T
        return jnp.dot(left, _dominant_inverse(middle) @ right).astype(v.dtype)

    def reference(self, q, k, v, *, valid=None):
        T = len(q)
        if len(k) != T:
            raise Refused("csalr takes as many queries as keys")
        valid = jnp.ones(T, bool) if valid is None else valid
        m, number = min(self.landmarks, T), jnp.cumsum(valid) - 1
        of_run = [valid & (number * m // jnp.maximum(valid.sum(), 1) == run) for run in range(m)]
        mean = lambda x, run: jnp.where(run[:, None], x, 0).sum(0) / jnp.maximum(run.sum(), 1)
        q_mean, k_mean = (jnp.stack([mean(x, run) for run in of_run]) for x in (q, k))
        of_run = jnp.stack(of_run)
        there = of_run.any(1)
        softmax = lambda q, k, seen: masked_softmax(q @ k.T / self.size.head**0.5, seen)
        a = softmax(q_mean, k_mean, there) * there[:, None] + IDENTITY * jnp.eye(m)
        coefficients = (softmax(q, k_mean, there) + IDENTITY * of_run.T) @ _inverse(a)
        return (coefficients @ (softmax(q_mean, k, valid) * there[:, None] @ v)).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, m = self.size.head, min(self.landmarks, S)
        return Cost(flops=12 * T * m * H, memory=T * max(m, H), state=0)


@inverts
def _dominant_inverse(a):
    """The inverse of matrices (..., m, m) whose diagonal outweighs the rest of its row, by Gauss-Jordan elimination.

    Such a matrix needs no pivots. `jnp.linalg.inv` would serve, but two of its batched triangular solves in one program
    starve XLA:CPU's thread pool (jaxlib 0.10.2), and neither ends.
    """

    def eliminate(a, _):
        # In place, with the pivot in the first row and column, which then go last: after m steps all are back.
        pivot, row, column, rest = a[..., :1, :1], a[..., :1, 1:], a[..., 1:, :1], a[..., 1:, 1:]
        row = row / pivot
        above = jnp.concatenate([rest - column * row, -column / pivot], -1)
        return jnp.concatenate([above, jnp.concatenate([row, 1 / pivot], -1)], -2), None

    return jax.lax.scan(eliminate, a, length=a.shape[-1])[0]


def _inverse(a):
    """Row by row from (A | I) to (I | A^-1). Not `jnp.linalg.inv`: see `_dominant_inverse`."""

    def clear_column(i, rows):
        row = rows[i] / rows[i, i]
        return (rows - rows[:, i, None] * row).at[i].set(row)

    m = len(a)
    return jax.lax.fori_loop(0, m, clear_column, jnp.concatenate([a, jnp.eye(m)], 1))[:, m:]
