import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost, why_not_one_way
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.chunks import largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.softmax import same_document, softmax_average
from xformers_lab.attention.full import Full
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Fox(Full):
    """Forgetting attention: softmax attention with a forget gate (Lin et al., 2025, arXiv 2503.02130).

    out_t = sum_(s <= t) softmax_s(q_t . k_s / sqrt(H) + sum_(s < l <= t) log f_l) v_s, f_l = sigmoid(w x_l + b): every
    position says, in each head, how much of what came before it still counts.

    Padding forgets nothing. A bias is added to the scores as well; the paper needs none, for gates tell distances.
    Deviations from the paper: of its two blocks this is the one without output gate, norms of queries and keys, and
        mixing of neighbouring keys (the paper's LLaMA block, not its Pro block).
    """

    kind = "prior"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value, and of each what is left of it",
        time_note=", half of it where S >= 1024",
        memory_note="per row of blocks, the T x S scores are never stored",
    )
    refuses: ClassVar = {"bidirectional": "its gates forget what came before, so it serves no encoder"}

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.forget = Linear(size.dim, size.heads, dtype=size.dtype, rngs=rngs)

    def from_keys(self, x):
        return {"forget": jax.nn.log_sigmoid(self.forget(x).astype(jnp.float32))}

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, forget):
        T, S = q.shape[0], k.shape[0]
        bias = Forgetting(bias, *_running(_of_valid(forget, valid, causal), documents))
        options = {"pattern": self.seen(causal), "valid": valid, "documents": documents, "bias": bias}
        return block_sparse(q, k, v, **options, blocks=self.blocks(T, S, causal))

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, forget):
        T, S = q.shape[0], k.shape[0]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        log = _of_valid(forget, valid, causal)

        def next_row(row, t):
            row = jnp.where(keys[0] < t, row + log[t], 0)
            return row, row

        rows = lax.scan(next_row, jnp.zeros(S), jnp.arange(S))[1]
        s = scores(q, k, bias) + rows[jnp.clip(at[:, 0], 0)]
        seen = keys <= at
        seen = seen if documents is None else seen & same_document(documents, at, keys)
        return softmax_average(s, seen if valid is None else seen & valid, v)

    def cost(self, T: int, S: int) -> Cost:
        H, blocks = self.size.head, self.blocks(T, S, causal=True)
        pairs = live_pairs(self.seen(True), T, S, *blocks)
        memory = largest_array(self.seen(True), T, S, H, blocks)
        return Cost(flops=4 * H * pairs, memory=memory, state=(2 * H + 1) * S)

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        """Beside keys and values the sum of what was forgotten since each."""
        return super().init_cache(B, length, dtype) | {"since": jnp.zeros((B, self.size.heads, length), jnp.float32)}

    def decode_heads_several(self, cache, call: Call):
        """Of a key and a query: what was forgotten from the key to the last token that was read before, and from there,
        or from the key where it is new, to the query."""
        at, T = cache["seen"], call.q.shape[1]
        forgotten = jnp.cumsum(jnp.moveaxis(self.from_keys(call.x)["forget"], 1, 2), 2)
        up_to_keys = lax.dynamic_update_slice_in_dim(cache["since"], -forgotten, at, 2)
        to_queries = jnp.swapaxes(forgotten, 1, 2)[..., None] + up_to_keys[:, None]
        out, cache = self.read_several(cache, call, to_queries)
        read = jnp.arange(up_to_keys.shape[2]) < at + T
        return out, cache | {"since": jnp.where(read, up_to_keys + forgotten[:, :, -1:], 0)}

    def decode_heads(self, cache, call: Call):
        forget = self.from_keys(call.x)["forget"]
        newest = jnp.arange(cache["since"].shape[2]) == cache["seen"]
        since = jnp.where(newest, 0, cache["since"] + forget[:, :, None])
        cache, at, positions, seen = self.remembered(cache | {"since": since}, call)
        out = self.attend_cached(call.q, cache["k"], cache["v"], at, positions, seen, call.bias, since)
        return out, cache, call.carry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forgetting:
    """What was forgotten from a key to a query, the difference of two running sums (S,), and another bias, if any."""

    bias: Any
    whole: jax.Array
    part: jax.Array

    def __call__(self, q_at, k_at):
        between = lambda sums: sums[jnp.clip(q_at, 0)] - sums[k_at]
        forgotten = between(lax.stop_gradient(self.whole)) + between(self.part)
        return forgotten if self.bias is None else forgotten + self.bias(q_at, k_at)


def _of_valid(forget, valid, causal: bool):
    """Logarithms of gates (S,), 0 where padding stands."""
    if not causal:
        raise Refused(why_not_one_way(Fox))
    return forget if valid is None else jnp.where(valid, forget, 0)


def _running(log, documents):
    """Sums (S,) of log over the positions up to each of its document, as whole numbers and what is left, below 1.

    A difference of such sums is as exact behind a million positions as behind ten; that of two long floats is not.
    """
    begins = jnp.zeros(len(log), bool) if documents is None else jnp.diff(documents, prepend=documents[:1]) != 0

    def joined(first, then):
        (whole, part, begins), (more, rest, apart) = first, then
        part = rest + jnp.where(apart, 0, part)
        carried = lax.stop_gradient(jnp.floor(part))
        return more + jnp.where(apart, 0, whole) + carried, part - carried, begins | apart

    carried = lax.stop_gradient(jnp.floor(log))
    whole, part, _ = lax.associative_scan(joined, (carried, log - carried, begins))
    return whole, part
