from flax import nnx

from xformers_lab.nn import normalisation
from xformers_lab.nn.size import Size


def layernorm(size: Size, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Zero mean and unit variance over channels, with learned scale and shift (Ba et al., 2016, arXiv 1607.06450)."""
    return normalisation.LayerNorm(size.dim, dtype=size.dtype, rngs=rngs)
