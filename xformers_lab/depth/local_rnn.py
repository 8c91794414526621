from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import MakeBlock
from xformers_lab.depth._added import Added
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn import gru, lstm, rnn
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.size import Size

CELLS = {"gru": gru.Cell, "lstm": lstm.Cell, "rnn": rnn.Cell}


class LocalRnn(Fixed):
    """R-Transformer: in every layer a recurrent network reads the window of each position, before attention (Wang et
    al., 2019, arXiv 1907.05572).

        x + r(x),    then x + attention(x),    then x + ffn(x)
        r(x)_t = h_M,    h_j = cell(x_(t - M + j), h_(j-1)),    h_0 = 0,    for j = 1 .. M

    Each window of M = window positions is read anew, from its oldest to t itself, so that order is known nearby
    without positions: the paper has none, position=none. What stands before the first position, in padding or in
    another document, counts as zeros. In place of x + r(x) stands what the norm makes of it. An encoder's windows end
    at t, too.

    Products of the cell with x are shared by all windows: O(T D^2), and O(T M D^2) for those with h, M steps one after
    the other whatever T is. "computation" counts the layer as 1. Decoding keeps the last M - 1 inputs of each layer.
    With a memory windows begin anew in every segment.

    Options:
        window: M, positions that are read for each
        cell: gru, lstm, or rnn, a tanh alone
        rnns: such sub-layers in a layer, each on what the one below gives
    """

    documents_apart = True
    several_streams = True

    def __init__(
        self,
        size: Size,
        *,
        window: int = 6,
        cell: Literal["gru", "lstm", "rnn"] = "gru",
        rnns: int = 1,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if window < 2:
            raise Refused(f"window must be at least 2 positions, got {window}: a token sees itself in attention, too")
        if rnns < 1:
            raise Refused(f"rnns must be at least 1, got {rnns}; without one it is depth=fixed")

        def layer(index: int, rngs: nnx.Rngs):
            block = make_block(index, rngs)
            return Added(block, [Windowed(size, cell, window, rngs=rngs) for _ in range(rnns)], rngs=rngs)

        super().__init__(size, make_block=layer, period=period, rngs=rngs)


class Windowed(nnx.Module):
    """A cell's last hidden state of the window of each position, (B, T, D) -> (B, T, D)."""

    def __init__(self, size: Size, cell: str, window: int, *, rngs: nnx.Rngs):
        self.cell, self.before = CELLS[cell](size, rngs), window - 1

    def scale_init(self, share: float) -> None:
        """What reads the input: how far the matrices of the recurrence turn a state is no size of an update."""
        scale_init(share, self.cell.input)

    def __call__(self, x: jax.Array, *, valid: jax.Array | None = None, documents: jax.Array | None = None):
        x = x if valid is None else jnp.where(valid[..., None], x, 0)
        wide = jnp.pad(x, [(0, 0), (self.before, 0), (0, 0)])
        # No document has the number of what stands outside of the row.
        beside = None if documents is None else jnp.pad(documents, [(0, 0), (self.before, 0)], constant_values=-1)
        return self._windows(wide, beside)

    def init_tail(self, B: int) -> jax.Array:
        """The inputs before the first token of B sequences, oldest first, (B, M - 1, D)."""
        return jnp.zeros((B, self.before, self.cell.width), self.cell.dtype)

    def step_several(self, tail: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """T more tokens x (B, T, D) -> (B, T, D) and the new tail."""
        wide = jnp.concatenate([tail.astype(x.dtype), x], 1)
        return self._windows(wide), wide[:, x.shape[1] :].astype(tail.dtype)

    def _windows(self, wide: jax.Array, documents: jax.Array | None = None) -> jax.Array:
        """(B, M - 1 + T, D), of documents numbered as long -> (B, T, D): all windows take a step together."""
        B, T = wide.shape[0], wide.shape[1] - self.before
        gates = self.cell.input(wide)
        # What the cell is given of zeros.
        nothing = self.cell.input.bias[...].astype(gates.dtype)
        state = self.cell.init_state(B * T)
        for place in range(self.before + 1):
            given = gates[:, place : place + T]
            if documents is not None:
                apart = documents[:, place : place + T] != documents[:, self.before :]
                given = jnp.where(apart[..., None], nothing, given)
            state = self.cell.advance(given.reshape(B * T, -1), state)
        return self.cell.hidden(state).reshape(B, T, -1)
