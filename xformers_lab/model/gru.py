from flax import nnx

from xformers_lab.model._recurrent import Recurrent
from xformers_lab.nn.gru import Cell
from xformers_lab.nn.size import Size


class Gru(Recurrent):
    """Stacked gated recurrent units (Cho et al., 2014, arXiv 1406.1078)."""

    def cell(self, size: Size, rngs: nnx.Rngs):
        return Cell(size, rngs)
