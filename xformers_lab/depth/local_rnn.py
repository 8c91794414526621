from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth._stack import in_turn
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn import gru, lstm, rnn
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.layer_context import LayerContext
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
            return Reading(block, [Windowed(size, cell, window, rngs=rngs) for _ in range(rnns)], rngs=rngs)

        super().__init__(size, make_block=layer, period=period, rngs=rngs)


class Reading(nnx.Module):
    """A block, and recurrent sub-layers before it."""

    def __init__(self, block: Any, rnns: list, *, rngs: nnx.Rngs):
        self.block, self.rnns = block, nnx.List(rnns)
        self.norms = nnx.List(block.placed(rnn, rngs=rngs) for rnn in rnns)

    def __call__(
        self, x: jax.Array, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any], Aux]:
        last, *keys = [None] * (len(self.rnns) + 1) if key is None else list(jax.random.split(key, len(self.rnns) + 1))
        rows = LayerContext(context.valid, key is not None)
        for read, norm, key in zip(self.rnns, self.norms, keys, strict=True):
            y = read(norm.before(x, rows), valid=context.valid, documents=context.documents)
            x = norm.after(x, drop(y, self.block.dropout, key), rows)
        return self.block(x, carries, context, key=last)

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return self.block.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        return {"tails": [rnn.init_tail(B) for rnn in self.rnns], "block": self.block.init_cache(B, length)}

    def step(
        self, x: jax.Array, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        tails = cache["tails"]
        if self.block.memory is not None:
            begins = at % self.block.length == 0
            tails = [jnp.where(begins, 0, tail) for tail in tails]
        x, tails = self._read(x[:, None], tails)
        x, own, carries = self.block.step(x[:, 0], cache["block"], carries, context, at)
        return x, {"tails": tails, "block": own}, carries

    def step_several(self, x: jax.Array, cache: Any, context: Context, at: jax.Array) -> tuple[jax.Array, Any]:
        if self.block.memory is not None:
            return in_turn(self, x, cache, context, at)
        x, tails = self._read(x, cache["tails"])
        x, own = self.block.step_several(x, cache["block"], context, at)
        return x, {"tails": tails, "block": own}

    def _read(self, x: jax.Array, tails: list) -> tuple[jax.Array, list]:
        """The recurrent sub-layers on the next T tokens (B, T, D), and the new tails."""
        new = []
        for read, norm, tail in zip(self.rnns, self.norms, tails, strict=True):
            y, tail = read.step_several(tail, norm.before(x, LayerContext()))
            x = norm.after(x, y, LayerContext())
            new.append(tail)
        return x, new


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
