from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.pattern import All
from xformers_lab.nn.size import Size


class Full(Patterned):
    """Scaled dot-product attention (Vaswani et al., 2017, arXiv 1706.03762).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over every key (causal: every key up to t).

    On a TPU a kernel of JAX's own runs it, and in half precision, without padding or bias, cuDNN's on an NVIDIA GPU.
    """

    kind = "full"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        memory_note="per row of blocks, the T x S scores are never stored",
    )

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        super().__init__(size, All(), rngs=rngs)
