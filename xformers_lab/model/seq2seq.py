from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.config import Config
from xformers_lab.errors import Refused
from xformers_lab.model import gru, lstm
from xformers_lab.model._recurrent import Recurrent, stacked
from xformers_lab.model._source import EncoderInput
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.tasks import Task

CELLS = {"lstm": lstm.Cell, "gru": gru.Cell}


class Seq2seq(EncoderInput, Recurrent):
    """Recurrent encoder-decoder (Sutskever, Vinyals and Le, 2014, arXiv 1409.3215), with attention if asked.

    Of every sequence the first `task.source_length` positions are the source, the rest the target. A stack of cells
    reads the source; a second one, whose layers start from the last states of the first, reads the target. Without
    attention those states, a vector of fixed size, are all that the decoder knows of the source. With it, it also sees
    c_t = sum_j softmax_j(e_tj) h_j over the valid positions of the source, h_j (B, S, D) the encoder's top states. With
    x_t the embedded target token read at t, and s_t the state of a cell,

        additive   e_tj = v . tanh(W s_(t-1) + U h_j + b),   s_t = cell(s_(t-1), [x_t; c_t]),
                   y_t = maxout(P [x_t; s_t; c_t])           (Bahdanau, Cho and Bengio, 2014, arXiv 1409.0473)
        dot        e_tj = s_t . h_j                          (Luong, Pham and Manning, 2015, arXiv 1508.04025)
        concat     e_tj = v . tanh(W s_t + U h_j + b)        (the same; both have y_t = tanh(P [c_t; s_t]))

    and the head reads y_t. Blanks that fill a source up are padding. Nothing is predicted at the source: its logits are
    zeros.

    Deviations: of several layers the lowest asks and is fed c_t by additive attention, the others stand above it, and
    s_t in y_t is the top one; Bahdanau et al. have one. Luong et al. also feed y_(t-1) into the cells, by choice; here
    dot and concat feed nothing, so all positions of the target are looked at together. Additive scores are taken one
    position after another, and again for the gradient, so that no (B, T, S, D) is kept. A decoder starts from the last
    states as they are, with no layer between. Source and target share an embedding. Both sides have `layers` layers,
    and all vectors are `dim` wide.

    Options:
        look: how the decoder looks back at the source: not at all, or by additive, dot-product or concat attention
        cell: the recurrent cell of both sides
        reads: the encoder's direction; backward is the reversed source of Sutskever et al.; both joins two cells in
            each layer by a linear map, and the decoder starts from the backward one, as Bahdanau et al. do
    """

    def __init__(
        self,
        size: Size,
        *,
        look: Literal["none", "additive", "dot", "concat"] = "none",
        cell: Literal["lstm", "gru"] = "lstm",
        reads: Literal["forward", "backward", "both"] = "forward",
        config: Config,
        task: Task,
        rngs: nnx.Rngs,
    ):
        if task.target == "sequence" or not 0 < task.source_length < size.length:
            raise Refused("this task has no source and target apart: use model=lstm, or a task like mqar")
        self.source, self.blank, self.outputs = task.source_length, task.blank, task.outputs
        self.kind, self.dtype, self.feeds = cell, size.dtype, look == "additive"
        super().__init__(size, config=config, task=task, rngs=rngs)
        if self.feeds:
            self.cells[0] = CELLS[cell](size, rngs, inputs=2 * size.dim)
        self.encoder = nnx.List[Any](Reader(size, CELLS[cell], reads, rngs) for _ in range(size.layers))
        self.look = None if look == "none" else Look(size, additive=look != "dot", rngs=rngs)
        self.join = None if look == "none" else (Maxout if self.feeds else Tanh)(size, rngs)

    def cell(self, size: Size, rngs: nnx.Rngs):
        return CELLS[self.kind](size, rngs)

    def encode(self, inputs, *, valid=None, key=None):
        """Source tokens (B, S) -> what the decoder starts from, a state per layer, and what it looks at."""
        keys = [None] * (len(self.encoder) + 1) if key is None else list(jax.random.split(key, len(self.encoder) + 1))
        x, states = drop(self.embedding(inputs), self.dropout, keys[0]), []
        for layer, key in zip(self.encoder, keys[1:], strict=True):
            x, state = layer(x, valid)
            x = drop(x, self.dropout, key)
            states.append(state)
        return states, None if self.look is None else (self.look.keys(x), x)

    def fed(self, x, state, seen, real_source, valid):
        """Embedded targets (B, T, D) through the lowest cell, which looks before each -> its outputs, and what it saw,
        both (B, T, D)."""
        cell, inputs = self.cells[0], (x, jnp.ones(x.shape[:2], bool) if valid is None else valid)

        def one(state, inputs):
            x, keep = inputs
            c = self.glimpse(state, seen, real_source)
            new, s = cell.step(state, jnp.concatenate([x, c], -1))
            return jax.tree.map(lambda new, old: jnp.where(keep[:, None], new, old), new, state), (s, c)

        _, states = lax.scan(one, state, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), inputs))
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), states)

    def glimpse(self, state, seen, valid):
        """What the lowest cell sees from a state: (B, D)."""
        assert self.look is not None
        keys, states = seen
        return self.look(self.cells[0].hidden(state)[:, None], keys, states, valid)[:, 0]

    def predict(self, x, top, seen, valid=None, c=None):
        """Embedded targets and the decoder's top states (B, T, D), what `encode` gave to look at, and what was seen of
        it before the cells, if it was -> logits (B, T, outputs)."""
        if self.look is not None and self.join is not None:
            keys, states = seen
            top = self.join(x, top, self.look(top, keys, states, valid) if c is None else c)
        return self.head(top).astype(jnp.float32)

    def __call__(self, inputs, *, valid=None, key=None):
        keys = [None] * (len(self.cells) + 2) if key is None else list(jax.random.split(key, len(self.cells) + 2))
        real_source, real_rest = (None, None) if valid is None else (valid[:, : self.source], valid[:, self.source :])
        real_source = self.real_source(inputs[:, : self.source], real_source)
        states, seen = self.encode(inputs[:, : self.source], valid=real_source, key=keys[0])
        x = top = drop(self.embedding(inputs[:, self.source :]), self.dropout, keys[1])
        c = None
        for at, (cell, state, key) in enumerate(zip(self.cells, states, keys[2:], strict=True)):
            if self.feeds and at == 0:
                top, c = self.fed(x, state, seen, real_source, real_rest)
            else:
                top = cell.run(top, real_rest, state)[0]
            top = drop(top, self.dropout, key)
        logits = self.predict(x, top, seen, real_source, c)
        return jnp.concatenate([jnp.zeros((len(x), self.source, self.outputs)), logits], 1), Aux()

    def init_cache(self, B: int, length: int):
        if length <= self.source:
            raise Refused(f"the source takes {self.source} tokens, so there is nothing to decode of {length}")
        rows = jnp.zeros((1, B, self.source, self.width), self.dtype)
        seen = None if self.look is None else (rows, rows)
        return {**self.unread(B), "seen": seen, "cells": super().init_cache(B, length)}

    def step(self, cache, tokens):
        """Tokens of the source are kept until it is whole; the first one after it has it encoded, once."""
        at = cache["at"]

        def reads(cache):
            return jnp.zeros((len(tokens), self.outputs)), self.take(cache, tokens)

        def encode():
            states, seen = self.encode(cache["read"][0], valid=cache["valid"][0])
            return stacked(states), jax.tree.map(lambda rows: rows[None], seen)

        def writes(cache):
            cells, seen = lax.cond(at == self.source, encode, lambda: (cache["cells"], cache["seen"]))
            x, (rows, valid) = self.embedding(tokens), jax.tree.map(lambda leaf: leaf[0], (seen, cache["valid"]))
            c = self.glimpse(jax.tree.map(lambda leaf: leaf[0], cells), rows, valid) if self.feeds else None
            top, cells = self.advance(cells, x if c is None else jnp.concatenate([x, c], -1))
            logits = self.predict(x[:, None], top[:, None], rows, valid, None if c is None else c[:, None])[:, 0]
            return logits, cache | {"seen": seen, "cells": cells}

        logits, cache = lax.cond(at < self.source, reads, writes, cache)
        return logits, cache | {"at": at + 1}


class Reader(nnx.Module):
    """A layer of the encoder: a cell for each direction, and a linear map where two are joined."""

    def __init__(self, size: Size, kind, reads: str, rngs: nnx.Rngs):
        self.backward, both = reads != "forward", reads == "both"
        self.cell = kind(size, rngs)
        self.other = kind(size, rngs) if both else None
        self.join = Linear(2 * size.dim, size.dim, dtype=size.dtype, rngs=rngs) if both else None

    def __call__(self, x, valid):
        """(B, S, D) -> (B, S, D) and the last state: that of the first position where it is read backward."""
        turn = (lambda y: y[:, ::-1]) if self.backward else (lambda y: y)
        y, state = self.cell.run(turn(x), None if valid is None else turn(valid))
        if self.other is None or self.join is None:
            return turn(y), state
        return self.join(jnp.concatenate([self.other(x, valid), turn(y)], -1)), state


class Look(nnx.Module):
    """Attention of the decoder's states to the encoder's."""

    def __init__(self, size: Size, *, additive: bool, rngs: nnx.Rngs):
        D, options = size.dim, {"dtype": size.dtype, "rngs": rngs}
        self.query = Linear(D, D, use_bias=False, **options) if additive else None
        self.key = Linear(D, D, **options) if additive else None
        self.v = nnx.Param(nnx.initializers.normal(D**-0.5)(rngs.params(), (D,)), decays=False) if additive else None

    def keys(self, states):
        """What of the source is the same for every position of the target."""
        return states if self.key is None else self.key(states)

    def __call__(self, x, keys, states, valid):
        """(B, T, D), (B, S, D) -> (B, T, D), means of the encoder's states."""
        scores = self.scores(x, keys)
        if valid is not None:
            scores = jnp.where(valid[:, None], scores, MASKED)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores).astype(x.dtype), states)

    def scores(self, x, keys):
        """(B, T, D), (B, S, D) -> (B, T, S) float32."""
        if self.v is None or self.query is None:
            return jnp.einsum("btd,bsd->bts", x, keys, preferred_element_type=jnp.float32)
        v = self.v[...].astype(x.dtype)
        one = lambda asked: jnp.dot(jnp.tanh(asked[:, None] + keys), v, preferred_element_type=jnp.float32)
        return lax.map(jax.checkpoint(one), self.query(x).swapaxes(0, 1)).swapaxes(0, 1)


class Tanh(nnx.Module):
    """Luong et al.: what the head reads of a state and of what it saw."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.out = Linear(2 * size.dim, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)

    def __call__(self, x, s, c):
        return jnp.tanh(self.out(jnp.concatenate([c, s], -1)))


class Maxout(nnx.Module):
    """Bahdanau et al.: the larger of each two of 2D linear units (Goodfellow et al., 2013, arXiv 1302.4389)."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.out = Linear(3 * size.dim, 2 * size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)

    def __call__(self, x, s, c):
        units = self.out(jnp.concatenate([x, s, c], -1))
        return units.reshape(*x.shape, 2).max(-1)
