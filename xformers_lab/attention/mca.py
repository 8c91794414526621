from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Complexity, Cost, Stepwise
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.chunks import largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.pattern import All
from xformers_lab.attention._engine.products import weighted
from xformers_lab.attention._engine.softmax import softmax_average
from xformers_lab.attention._engine.windows import Windows, count, windows
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# From this many positions on, causal slots come in eighths: 9/16 of the pairs are computed.
LONG, EIGHTHS = 1024, 8


class Mca(Stepwise):
    """Memory-compressed attention (Liu et al., 2018, arXiv 1801.10198).

    out = softmax(q K^T / sqrt(H)) V, K and V convolutions of k and v over windows of `kernel` positions, one every
    `stride`: stride times fewer keys. Causally a query sees the windows that end at its position or before, and the
    first position.

    Deviations from the paper: a convolution runs within a head, kernel x H x H weights for keys and as many for values.
    As in the authors' code the first key stands uncompressed for the queries before the first window is full (not where
    kernel=1, whose windows are always full); queries in the middle of a window do not see what is in it so far. Padded
    positions are zeros in a window, and a window of nothing else is not seen.

    Options:
        kernel: positions in a window, at least stride
        stride: positions from one window to the next
        pool: conv, or mean, without parameters
    """

    kind = "memory compression"
    exact = True
    accuracy = "over the slots, each a learned mixture of a few neighbours"
    complexity = Complexity(
        time="O(T S H / stride)",
        memory="O(S H)",
        decoding="S / stride slots and the newest `kernel` keys and values",
    )
    refuses: ClassVar = {"bias": "a slot has no one position"}

    def __init__(
        self, size: Size, *, kernel: int = 3, stride: int = 3, pool: Literal["conv", "mean"] = "conv", rngs: nnx.Rngs
    ):
        if stride < 1:
            raise Refused(f"stride must be at least 1, got {stride}")
        if kernel < stride:
            raise Refused(f"kernel must be at least stride, or positions are lost: got {kernel} and {stride}")
        super().__init__(size, rngs=rngs)
        self.kernel, self.stride, self.pool = kernel, stride, pool
        shape, scale = (size.heads, 2, kernel, size.head, size.head), (kernel * size.head) ** -0.5
        self.taps = nnx.Param(jax.random.normal(rngs.params(), shape) * scale, decays=True) if pool == "conv" else None

    def refusals(self):
        mixes = {} if self.taps is None else {"map": "its convolutions mix the channels of values; pool=mean has a map"}
        return {**super().refusals(), **mixes}

    def per_head(self):
        return {"taps": None if self.taps is None else self.taps[...]}

    def attend(self, q, k, v, *, valid=None, causal, taps=None):
        lead = self._lead(causal)
        there = None if valid is None else windows(valid, self.kernel, self.stride)
        keys, values = (self._compressed(x, which, valid, there, taps) for which, x in enumerate((k, v)))
        there = None if there is None else there.any(1)
        if lead:
            keys, values = jnp.concatenate([k[:1], keys]), jnp.concatenate([v[:1], values])
            there = None if valid is None or there is None else jnp.concatenate([valid[:1], there])
        blocks = self._blocks(len(q), len(keys), causal)
        return block_sparse(q, keys, values, pattern=self._seen(len(k), causal), valid=there, blocks=blocks)

    def _compressed(self, x, which: int, valid, there, taps):
        """(S, H) -> (slots, H)."""
        x = x if valid is None else jnp.where(valid[:, None], x, 0)
        x = windows(x, self.kernel, self.stride)
        return self._slots(x, which, self.kernel if there is None else there.sum(1)[:, None], taps)

    def _slots(self, x, which: int, members, taps):
        """(slots, kernel, H) -> (slots, H); a mean is over `members` positions."""
        if taps is None:
            return (x.sum(1, dtype=jnp.float32) / jnp.maximum(members, 1)).astype(x.dtype)
        taps = taps[which].reshape(-1, x.shape[2]).astype(x.dtype)
        return weighted(x.reshape(len(x), -1), taps).astype(x.dtype)

    def _lead(self, causal: bool) -> int:
        return int(causal and self.kernel > 1)

    def _seen(self, S: int, causal: bool):
        lead = self._lead(causal)
        slots = lead + count(S, self.kernel, self.stride)
        return Windows(self.kernel, self.stride, slots, S, None, 0, lead) if causal else All()

    def _blocks(self, T: int, slots: int, causal: bool) -> tuple[int, int]:
        even = lambda length, most: -(-length // -(-length // most))
        most = -(-slots // EIGHTHS) if causal and slots * self.stride >= LONG else slots
        return even(T, 256 if causal else 512), even(slots, most)

    def reference(self, q, k, v, *, valid=None, causal, taps=None):
        T, S = q.shape[0], k.shape[0]
        valid = jnp.ones(S, bool) if valid is None else valid
        k, v = (jnp.where(valid[:, None], x, 0) for x in (k, v))
        slots = count(S, self.kernel, self.stride)
        member = np.arange(slots)[:, None] * self.stride + np.arange(self.kernel)  # (slots, kernel)
        last, member = member[:, -1], np.minimum(member, S)
        there = jnp.pad(valid, (0, 1))[member]
        x = jnp.pad(jnp.stack([k, v]), ((0, 0), (0, 1), (0, 0)))[:, member]  # (2, slots, kernel, H)
        mean = x.sum(2) / jnp.maximum(there.sum(1), 1)[:, None]
        x = mean if taps is None else jnp.einsum("xmci,xcij->xmj", x, taps)
        there = there.any(1)
        if causal and self.kernel > 1:
            x = jnp.concatenate([jnp.stack([k[:1], v[:1]]), x], 1)
            there, last = jnp.concatenate([valid[:1], there]), np.append(0, last)
        at = np.arange(S - T, S)[:, None]
        seen = jnp.asarray(last <= at) & there if causal else jnp.broadcast_to(there, (T, slots))
        return softmax_average(q @ x[0].T * self.size.head**-0.5, seen, x[1]).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, slots = self.size.head, count(S, self.kernel, self.stride)
        blocks = self._blocks(T, slots, False)
        taps = 4 * slots * self.kernel * H * H if self.pool == "conv" else 0
        return Cost(
            flops=4 * H * live_pairs(All(), T, slots, *blocks) + taps,
            memory=max(slots * self.kernel * H, largest_array(All(), T, slots, H, blocks)),
            state=2 * H * (self._lead(True) + slots + self.kernel),
        )

    @staticmethod
    def limit(length: int):
        return {"pool": "mean", "kernel": 1, "stride": 1}

    on_places = "its windows go"

    def init_state(self, length: int, dtype=jnp.float32):
        slots = jnp.zeros((2, self._lead(True) + count(length, self.kernel, self.stride), self.size.head), dtype)
        newest = jnp.zeros((2, self.kernel, self.size.head), dtype)
        return {"slots": slots, "newest": newest, "seen": jnp.zeros((), jnp.int32)}

    def step(self, state, q, k, v, *, taps=None):
        """A window becomes a slot when its last position comes; it then is what the newest keys hold."""
        at, lead, number = state["seen"], self._lead(True), state["slots"].shape[1]
        newest = jnp.concatenate([state["newest"][:, 1:], jnp.stack([k, v])[:, None]], 1)
        slot, start = jnp.arange(number), at - self.kernel + 1
        fresh = ((slot - lead) * self.stride == start) & (slot >= lead)
        made = jnp.stack([self._slots(newest[i][None], i, self.kernel, taps)[0] for i in range(2)])
        slots = jnp.where(fresh[:, None], made[:, None], state["slots"])
        slots = jnp.where(((slot < lead) & (at == 0))[:, None], newest[:, -1:], slots)
        seen = (slot < lead) | ((slot - lead) * self.stride <= start)
        out = softmax_average(jnp.dot(slots[0], q * q.shape[0] ** -0.5), seen, slots[1])
        return out, {"slots": slots, "newest": newest, "seen": at + 1}
