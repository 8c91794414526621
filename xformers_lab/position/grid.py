import math

from flax import nnx

from xformers_lab.position import Position
from xformers_lab.size import Size


class Grid(Position):
    """Learned vectors of a position's row and of its column on a plane, added to the embeddings (Child et al., 2019,
    arXiv 1904.10509, section 5.3).

    x_t + rows[t // width] + columns[t mod width]: tables of rows + columns vectors in place of rows * columns.

    Options:
        width: columns of the plane; none: the root of the length, rounded up
    """

    def __init__(self, size: Size, *, width: int | None = None, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        if width is None:
            width = math.ceil(math.sqrt(size.length))
        if not 1 <= width <= size.length:
            raise ValueError(f"width must be from 1 to the length of {size.length}, got {width}")
        draw = lambda count: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (count, size.dim)))
        self.width, self.rows, self.columns = width, draw(math.ceil(size.length / width)), draw(width)

    def embed(self, x, at, *, real=None):
        places = self.rows[at // self.width] + self.columns[at % self.width]
        return x + places.astype(x.dtype)
