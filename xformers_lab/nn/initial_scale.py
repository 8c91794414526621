"""First weights made smaller, as placements that keep a deep stack's updates small want them."""

from flax import nnx

from xformers_lab.nn.parameters import decays


def scale_init(share: float, *parts: nnx.Module | nnx.Param) -> None:
    """Multiplies every matrix of these layers and parameters by `share`; what does not decay, biases and scales, is
    left."""
    for part in parts:
        params = [part] if isinstance(part, nnx.Param) else [param for _, param in nnx.iter_graph(part)]
        for param in params:
            if isinstance(param, nnx.Param) and decays(param):
                param[...] = param[...] * share
