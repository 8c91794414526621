from flax import nnx

from xformers_lab.model._recurrent import Recurrent
from xformers_lab.nn.lstm import Cell
from xformers_lab.nn.size import Size


class Lstm(Recurrent):
    """Stacked LSTM (Hochreiter and Schmidhuber, 1997; with the forget gate of Gers et al., 2000)."""

    def cell(self, size: Size, rngs: nnx.Rngs):
        return Cell(size, rngs)
