from flax import nnx

from xformers_lab.position import Position
from xformers_lab.size import Size


def none(size: Size, *, rngs: nnx.Rngs) -> Position:
    """No positions: only causality, if any, tells tokens apart (Haviv et al., 2022, arXiv 2203.16634)."""
    return Position(size, rngs=rngs)
