"""Recurrent baselines: embedding, a stack of cells that read from left to right, and a linear head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.config import AXES, Config
from xformers_lab.config import Model as Axes
from xformers_lab.errors import Refused
from xformers_lab.model import Model
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.embedding import first_layer
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size
from xformers_lab.tasks import Task


class Recurrent(Model):
    """A stack of cells; a sequence is pooled by the state after its last valid position."""

    causal = True
    headed = False
    most_layers = 64

    def __init__(self, size: Size, *, config: Config, task: Task, rngs: nnx.Rngs):
        refuse_unused(type(self).__name__.lower(), config)
        self.dropout, self.target, self.width = config.model.dropout, task.target, size.dim
        self.embedding = first_layer(task.vocab, task.channels, size.dim, dtype=size.dtype, rngs=rngs)
        self.cells = nnx.List[Any](self.cell(size, rngs) for _ in range(size.layers))
        self.head = Linear(size.dim, task.outputs, dtype=size.dtype, rngs=rngs)

    @required
    def cell(self, size: Size, rngs: nnx.Rngs) -> Any:
        """One layer: `cell(x (B, T, D), valid) -> (B, T, D)`, `init_state(B)` and `step(state, x (B, D))`.

        A cell that can also stand in an encoder or a decoder has `run(x, valid, start=None) -> (B, T, D), last state`:
        start is a state like that of `init_state`, which it is without one; a position that is not valid changes none.
        `hidden(state)` is what of a state the step that made it gave out, (B, D).
        """
        ...

    def __call__(self, inputs, *, valid=None, key=None):
        keys = [None] * (len(self.cells) + 1) if key is None else list(jax.random.split(key, len(self.cells) + 1))
        x = drop(self.embedding(inputs), self.dropout, keys[0])
        for cell, key in zip(self.cells, keys[1:], strict=True):
            x = drop(cell(x, valid), self.dropout, key)
        # Padding leaves a state as it was, so the last one is that of the last valid position.
        x = x[:, -1] if self.target == "sequence" else x
        return self.head(x).astype(jnp.float32), Aux()

    def init_cache(self, B: int, length: int):
        if self.target == "sequence":
            raise Refused("this model gives one answer per sequence, not one per token: there is nothing to decode")
        return stacked([cell.init_state(B) for cell in self.cells])

    def step(self, cache, tokens):
        x, cache = self.advance(cache, self.embedding(tokens))
        return self.head(x).astype(jnp.float32), cache

    def advance(self, cache, x):
        """One more position (B, D) through all cells -> (B, D) and the new states, stacked as `init_cache` does."""
        states = []
        for layer, cell in enumerate(self.cells):
            state, x = cell.step(jax.tree.map(lambda leaf, layer=layer: leaf[layer], cache), x)
            states.append(state)
        return x, stacked(states)


def stacked(states: list):
    """The states of all cells as one, their leaves (cells, B, ...)."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def refuse_unused(name: str, config: Config) -> None:
    """Raises Refused where a config asks a baseline for what only a transformer has, and it would ignore."""
    for axis in AXES:
        if (asked := getattr(config.model, axis)) != getattr(Axes(), axis):
            raise Refused(f"{name} has no {axis}: leave out {axis}={asked}")
