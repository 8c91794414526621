import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity
from xformers_lab.attention._base.patterned import Patterned, near_block
from xformers_lab.attention._engine.pattern import Band, Global
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sunk:
    """Scores to add where a key of zeros stands in front of all others: its score is the logit."""

    logit: jax.Array
    bias: Any

    def __call__(self, q_at, k_at):
        others = 0.0 if self.bias is None else self.bias(q_at - 1, k_at - 1)
        return jnp.where(k_at == 0, self.logit, others)


class Streaming(Patterned):
    """StreamingLLM: attention sinks and a window (Xiao et al., 2023, arXiv 2309.17453; a learned logit in their place:
    OpenAI, 2025, arXiv 2508.10925).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= window (causal: t - window <= s <= t) and s <
    sinks; with logit=learned exp(b), b of each head, is added to the softmax's denominator.

    Deviations from the paper: it is trained with as well, not only decoded with; positions stay those of the sequence,
    where the paper numbers what its cache holds anew, which matters beyond the length that was trained.

    Options:
        window: keys seen on each side of a query, besides itself
        sinks: first positions that every query sees
        logit: learned: one more score for each head, of a key without a value
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T (window + sinks) H)",
        memory="O(S H)",
        decoding="the sinks' keys and values and a ring of window + 1",
    )

    refuses: ClassVar = {"documents": "its sinks are the first positions of the row"}

    def __init__(
        self,
        size: Size,
        *,
        window: int = 124,
        sinks: int = 4,
        logit: Literal["none", "learned"] = "none",
        rngs: nnx.Rngs,
    ):
        if window < 1:
            raise Refused(f"window must be at least 1, got {window}")
        if sinks < 0 or (sinks == 0 and logit == "none"):
            raise Refused(f"sinks must be at least 1, or 0 with logit=learned, got {sinks}; without sinks use local")
        kept = sinks + (logit == "learned")
        super().__init__(size, Band(window) | Global(kept, queries=False), rngs=rngs)
        self.window, self.sinks, self.kept, self.front = window, sinks, kept, kept - sinks
        self.logit = nnx.Param(jnp.zeros(size.heads), decays=False) if logit == "learned" else None

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        block = near_block(self.window, causal)
        return (block, block) if min(T, S) > block else super().blocks(T, S, causal)

    def drawn(self, causal: bool, head: int = 0):
        """Without the key of the learned logit, which stands in front of all positions and is none of them."""
        seen, moved = self.seen(causal, head), self.kept - self.sinks
        return lambda q, k: seen(q + moved, k + moved)

    def attend_heads(self, call: Call):
        """A learned logit is the score of one more key, of zeros, in front of all: every position moves by one."""
        if self.logit is not None:
            front = lambda y, value=0: jnp.pad(y, [(0, 0), (1, 0)] + [(0, 0)] * (y.ndim - 2), constant_values=value)
            valid = None if call.valid is None else front(call.valid, True)
            bias = _Sunk(self.logit[...], call.bias)
            call = call.replace(k=front(call.k), v=front(call.v), valid=valid, bias=bias)
        return super().attend_heads(call)

    @staticmethod
    def limit(length: int):
        return {"window": length}

    def slots(self, length: int) -> int:
        return min(length, self.sinks + self.window + 1) + self.front

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        return super().init_cache(B, length, dtype) | {"seen": jnp.int32(self.front)}

    def attend_cached(self, q, keys, values, at, positions, seen, bias):
        bias = bias if self.logit is None else _Sunk(self.logit[...], bias)
        return super().attend_cached(q, keys, values, at, positions, seen, bias)
