from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.recurrent import gate_of
from xformers_lab.attention.full import Full
from xformers_lab.nn.size import Size


class Gated(Full):
    """Gated attention: softmax attention behind a sigmoid gate (Qiu et al., 2025, arXiv 2505.06708, position G1).

    out_t = sigmoid(W x_t) * sum_s softmax_s(q_t . k_s / sqrt(H)) v_s: the query's own input says which channels of a
    head, or which heads, count. A head may so give nothing, which softmax alone cannot: no key has to be a sink.

    Deviations from the paper: none; its gates behind values, keys, queries and the output layer are left out.

    Options:
        per: channel: a number of its own for each channel of a head; head: one for all of them
    """

    kind = "multi-head"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        memory_note="per row of blocks, the T x S scores are never stored",
    )

    def __init__(self, size: Size, *, per: Literal["channel", "head"] = "channel", rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.gate = gate_of(size, rngs, numbers=1 if per == "head" else None)

    def from_queries(self, x):
        return {"gate": self.gate(x).reshape(*x.shape[:2], self.size.heads, -1)}

    def finished(self, mean, *, gate):
        return mean * jax.nn.sigmoid(gate.astype(jnp.float32))
