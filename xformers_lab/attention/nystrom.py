from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.landmarks import EXACT, inverse, largest, means, probabilities, segments
from xformers_lab.attention._engine.softmax import masked_softmax
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# Positions whose convolution is one product: a wider one wastes more zeros, a narrower one is slower.
BLOCK = 64


class Nystrom(OneHead):
    """Nystromformer (Xiong et al., 2021, arXiv 2102.03902).

    out = F A^+ B v + conv(v), F = softmax(q k'^T / sqrt(H)), A = softmax(q' k'^T / sqrt(H)),
    B = softmax(q' k^T / sqrt(H)), with q' and k' the means of the queries and keys of m equal runs of positions (the
    landmarks), A^+ by Newton-Schulz steps, conv one kernel per head over the positions of v.

    Deviations from the paper: runs divide the positions that are no padding, and their number is at most that of the
    positions. The steps for A^+ start from A^T / (|A|_1 |A|_inf) of each head, as the paper has it; its code takes the
    largest column sum over the whole batch, which lets samples depend on each other.

    Options:
        landmarks: m, runs of positions; at most the length counts
        iterations: Newton-Schulz steps for the inverse
        kernel: positions under the convolution of v, odd; 0: none
    """

    kind = "low rank"
    heads_together = True
    exact = False
    accuracy = "; with a landmark for every position F A^+ B is the whole softmax"
    complexity = Complexity(time="O(T m H + m^3)", memory="O(T m)")
    refuses: ClassVar = {
        "causal": (
            "a landmark is a mean over a run of positions, and the softmax over landmarks mixes runs that are to come"
        ),
        "cross": "landmarks are runs of the same sequence on both sides",
    }

    def __init__(self, size: Size, *, landmarks: int = 64, iterations: int = 6, kernel: int = 33, rngs: nnx.Rngs):
        if landmarks < 1:
            raise Refused(f"landmarks must be at least 1, got {landmarks}")
        if iterations < 1:
            raise Refused(f"iterations must be at least 1, got {iterations}")
        if kernel < 0 or (kernel and kernel % 2 == 0):
            raise Refused(f"kernel must be 0 or odd, got {kernel}: {max(0, kernel) + 1} is the next")
        super().__init__(size, rngs=rngs)
        self.landmarks, self.iterations, self.kernel = landmarks, iterations, kernel
        if kernel:
            bound = kernel**-0.5
            self.taps = nnx.Param(
                jax.random.uniform(rngs.params(), (size.heads, kernel), minval=-bound, maxval=bound), decays=False
            )
        else:
            self.taps = None

    def per_head(self):
        return {"taps": None if self.taps is None else self.taps[...]}

    def attend(self, q, k, v, *, valid=None, taps=None):
        if q.shape[0] != k.shape[0]:
            raise Refused(
                f"nystrom takes as many queries as keys, got {q.shape[0]} and {k.shape[0]}: "
                "its landmarks are runs of the same sequence; use linformer or another attention"
            )
        return jax.checkpoint(self._attend)(q, k, v, valid, taps)

    def _attend(self, q, k, v, valid, taps):
        member = segments(valid, len(q), min(self.landmarks, len(q)))
        there = None if valid is None else member.any(1)
        q_mean, k_mean = means(q, member).astype(q.dtype), means(k, member).astype(q.dtype)
        middle = probabilities(q_mean, k_mean, there)
        if there is not None:
            middle = jnp.where(there[:, None], middle, jnp.eye(len(middle)))
        right = jnp.dot(probabilities(q_mean, k, valid).astype(v.dtype), v, **EXACT)
        if there is not None:
            right = jnp.where(there[:, None], right, 0)
        out = jnp.dot(probabilities(q, k_mean, there), inverse(middle, self.iterations) @ right)
        if taps is not None:
            out += _convolved(v if valid is None else jnp.where(valid[:, None], v, 0), taps)
        return out.astype(v.dtype)

    def reference(self, q, k, v, *, valid=None, taps=None):
        T = len(q)
        if len(k) != T:
            raise Refused("nystrom takes as many queries as keys")
        valid = jnp.ones(T, bool) if valid is None else valid
        m, number = min(self.landmarks, T), jnp.cumsum(valid) - 1
        of_run = [valid & (number * m // jnp.maximum(valid.sum(), 1) == run) for run in range(m)]
        mean = lambda x, run: jnp.where(run[:, None], x, 0).sum(0) / jnp.maximum(run.sum(), 1)
        q_mean, k_mean = (jnp.stack([mean(x, run) for run in of_run]) for x in (q, k))
        there = jnp.stack(of_run).any(1)
        softmax = lambda q, k, seen: masked_softmax(q @ k.T / self.size.head**0.5, seen)
        a = softmax(q_mean, k_mean, there) * there[:, None] + jnp.diag(1.0 - there)
        z = a.T / (largest(a.sum(0)) * largest(a.sum(1)))
        for _ in range(self.iterations):
            # The polynomial nested: powers of a z would lose what is small.
            z = z @ (13 * jnp.eye(m) - a @ z @ (15 * jnp.eye(m) - a @ z @ (7 * jnp.eye(m) - a @ z))) / 4
        out = softmax(q, k_mean, there) @ (z @ (softmax(q_mean, k, valid) * there[:, None] @ v))
        if taps is not None:
            padded = jnp.pad(jnp.where(valid[:, None], v, 0), ((self.kernel // 2,) * 2, (0, 0)))
            out += sum(taps[tap] * padded[tap : tap + T] for tap in range(self.kernel))
        return out.astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, m = self.size.head, min(self.landmarks, S)
        convolution = 2 * T * (BLOCK + self.kernel - 1) * H if self.kernel else 0
        flops = 12 * T * m * H + 8 * m**3 * self.iterations + 2 * m * m * (m + 2 * H) + convolution
        return Cost(flops=flops, memory=max(T * max(m, H), self.iterations * m * m), state=0)

    @staticmethod
    def limit(length: int):
        return {"landmarks": length, "iterations": 20, "kernel": 0}

    # In float32 the inverse of a matrix of softmax scores is good for four digits on rows that are its own, as those of
    # valid queries are in the limit, and for two on others, the rows of padding.
    limit_error = 0.02


def _convolved(v, taps):
    """Every channel of v (S, H) with one kernel: blocks of positions times a matrix whose diagonals are the taps."""
    S, H = v.shape
    K, block = len(taps), max(BLOCK, len(taps) - 1)
    count = -(-S // block)
    v = jnp.pad(v, ((K // 2, (count + 1) * block - S - K // 2), (0, 0))).reshape(count + 1, block, H)
    windows = jnp.concatenate([v[:-1], v[1:, : K - 1]], 1)
    # One row of zeros and taps is one longer than a row of the matrix, so that each row begins one further back.
    width = block + K - 1
    matrix = jnp.tile(jnp.pad(taps, (0, width + 1 - K)), block)[: block * width].reshape(block, width)
    return jnp.einsum("ij,njh->nih", matrix.astype(v.dtype), windows, **EXACT).reshape(-1, H)[:S]
