from flax import nnx

from xformers_lab.nn.size import Size
from xformers_lab.position import Position


def none(size: Size, *, rngs: nnx.Rngs) -> Position:
    """No positions: only causality, if any, tells tokens apart (Haviv et al., 2022, arXiv 2203.16634)."""
    return Position(size, rngs=rngs)
