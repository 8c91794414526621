from flax import nnx

from xformers_lab.nn import normalisation
from xformers_lab.nn.size import Size


def rmsnorm(size: Size, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Unit root mean square over channels, with a learned scale (Zhang and Sennrich, 2019, arXiv 1910.07467)."""
    return normalisation.RMSNorm(size.dim, dtype=size.dtype, rngs=rngs)
