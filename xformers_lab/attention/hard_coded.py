import math
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost, Stepwise
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Absent
from xformers_lab.nn.size import Size

# A Gaussian's weight this many standard deviations away is 1.5e-8 of the centre's: less than float32 rounds off.
SIGMAS = 6
# Queries computed together are at least this many: their weights are one matrix for all of them.
CHUNK = 32


class HardCoded(Stepwise):
    """Hard-coded Gaussian attention (You et al., 2020, arXiv 2005.00742).

    out_t = sum_s N(s; t + offset, std^2) v_s with the density N of a Gaussian around a fixed neighbour of the query,
    one offset per head; causally no key after t counts, and offsets ahead become 0. No queries, no keys, nothing
    learned but the projections of values and outputs; weights need not sum to one, at the ends they do not.

    Deviations from the paper: none in self-attention; between sequences, where the paper scales positions by the ratio
        of lengths, the centre is at the query's position counted from the end.

    Options:
        offsets: centres of the heads' Gaussians relative to the query, in turn; -1x1 is one before, one after
        std: standard deviation in positions
    """

    kind = "prior"
    exact = True
    accuracy = "in float32: keys further than 6 std from the centre weigh nothing there"
    complexity = Complexity(
        time="O(T std H)",
        memory="O(T H)",
        decoding="the newest 6 std values and a few",
        time_note="by one banded matrix of weights",
    )
    refuses: ClassVar = {"bias": "it has no scores"}

    def __init__(self, size: Size, *, offsets: tuple[int, ...] = (-1, 1), std: float = 1.0, rngs: nnx.Rngs):
        if not offsets:
            raise Refused("offsets must name at least one position, such as -1x1")
        if std <= 0:
            raise Refused(f"std must be above 0, got {std}")
        super().__init__(size, rngs=rngs)
        self.query = Absent(size.heads * size.head, size.dtype)
        self.key = Absent(size.key_heads * size.head, size.dtype)
        self.offsets, self.std = tuple(offsets), std
        self.reach = max(map(abs, offsets)) + math.ceil(SIGMAS * std)

    def per_head(self):
        return {"offset": jnp.asarray([self.offsets[n % len(self.offsets)] for n in range(self.size.heads)])}

    def _density(self, distance, offset, causal: bool):
        """Weights of keys that stand `distance` after the query."""
        if not causal:
            return _gaussian(distance - offset, self.std)
        return jnp.where(distance <= 0, _gaussian(distance - jnp.minimum(offset, 0), self.std), 0)

    def _blocks(self, T: int, S: int) -> tuple[int, int]:
        """How far keys count on both sides, and queries per chunk."""
        reach = min(self.reach, max(T, S))
        return reach, max(CHUNK, reach)

    def attend(self, q, k, v, *, valid=None, causal, offset):
        T, S, H = q.shape[0], k.shape[0], v.shape[1]
        R, C = self._blocks(T, S)
        M = -(-T // C)
        v = v if valid is None else jnp.where(valid[:, None], v, 0)
        # Chunks of keys, one before the first query's and one after the last query's.
        first = S - T - C
        v = v[max(first, 0) :]
        v = jnp.pad(v, ((max(-first, 0), 0), (0, 0)))[: (M + 2) * C]
        chunks = jnp.pad(v, ((0, (M + 2) * C - v.shape[0]), (0, 0))).reshape(M + 2, C, H).swapaxes(0, 1)
        ahead = 0 if causal else R
        slab = jnp.concatenate([chunks[C - R :, :-2], chunks[:, 1:-1], chunks[:ahead, 2:]]).reshape(-1, M * H)
        distance = jnp.arange(R + C + ahead)[None] - R - jnp.arange(C)[:, None]
        weights = self._density(distance, offset, causal).astype(v.dtype)
        out = jnp.dot(weights, slab, preferred_element_type=jnp.float32)
        return out.astype(v.dtype).reshape(C, M, H).swapaxes(0, 1).reshape(M * C, H)[:T]

    def reference(self, q, k, v, *, valid=None, causal, offset):
        T, S = q.shape[0], k.shape[0]
        t, s = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        centre = t + (jnp.where(offset > 0, 0, offset) if causal else offset)
        p = jnp.exp(-0.5 * ((s - centre) / self.std) ** 2) / (self.std * math.sqrt(2 * math.pi))
        seen = s <= t if causal else s >= 0
        return (jnp.where(seen if valid is None else seen & valid[None], p, 0) @ v).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, (R, C) = self.size.head, self._blocks(T, S)
        rows, band = -(-T // C) * C, C + 2 * R
        largest = max(rows // C * band * H, C * band)
        return Cost(flops=2 * rows * band * H, memory=largest, state=min(self.reach + 1, S) * H)

    def init_state(self, length: int, dtype=jnp.float32):
        return jnp.zeros((min(self.reach + 1, length), self.size.head), dtype)

    def step(self, state, q, k, v, *, offset):
        state = jnp.concatenate([state[1:], v[None]])
        weights = self._density(jnp.arange(1 - len(state), 1), offset, causal=True)
        return (weights @ state).astype(v.dtype), state


def _gaussian(x, std: float):
    return jnp.exp(-((x / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
