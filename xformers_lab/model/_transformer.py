"""The base transformer: every axis is a choice on a shelf, this file only joins them."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab import memory, spec
from xformers_lab.config import Config
from xformers_lab.config import Model as Axes
from xformers_lab.depth import Context, MakeBlock
from xformers_lab.errors import Refused
from xformers_lab.model import Model, _ahead
from xformers_lab.model._block import Block, check_norm
from xformers_lab.nn import on_mesh
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.documents import why_not
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.embedding import first_layer
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.position import Position, _cycle
from xformers_lab.tasks import Task

Pool = Literal["mean", "first", "last"]


class Transformer(Model):
    """Embedding, position, a stack of blocks, and a linear head on every position or on the pooled sequence.

    pools: what a sequence is pooled by, if nothing is said. tied: the table of embeddings is the head's matrix, too,
    which then has no bias (Press and Wolf, 2016, arXiv 1608.05859).
    """

    pools: ClassVar[Pool] = "mean"

    def __init__(
        self,
        size: Size,
        *,
        tied: bool = False,
        pool: Pool | None = None,
        config: Config,
        task: Task,
        rngs: nnx.Rngs,
    ):
        if tied and (task.target == "sequence" or task.outputs != task.vocab):
            raise Refused("tied=true: what this task asks for are no tokens of its inputs; leave the head untied")
        if pool is not None and task.target != "sequence":
            raise Refused(f"pool={pool}: this task asks for an answer at every position; leave the pool out")
        if pool == "first" and self.causal:
            raise Refused("pool=first: here the first position sees itself alone; use pool=last or mean")
        self.pooling = self.pools if pool is None else pool
        choice = config.model
        mechanisms = spec.split(choice.attention, "+")
        self.of_tokens = self.of_tokens and not task.channels
        self.size, self.dropout, self.target = size, choice.dropout, task.target
        self.depth_choice, self.norm_choice = choice.depth, choice.norm
        self.embedding = self.input_layer(size, task, rngs)
        self.embed_norm = None if choice.embed_norm == "none" else spec.build("normaliser", choice.embed_norm, size)
        # Each block builds a memory of its own; here it only says how far back positions reach.
        before = spec.build("memory", choice.memory, size, rngs=nnx.Rngs(0))
        reach = size if before is None else dataclasses.replace(size, length=size.length + before.length)
        self.position = _cycle.build(choice.position, reach, causal=self.causal, rngs=rngs)
        if before is not None:
            layers = spec.entry("depth", spec.parse(choice.depth).name).own_layers
            try:
                memory.check(self.position, layers, task.segments)
            except Refused as reason:
                raise Refused(f"memory={choice.memory}: {reason}") from None

        def make_block(index: int, rngs: nnx.Rngs, length: int | None = None):
            of_layer = self.position.of_layer(index)
            options = {"config": config, "causal": self.causal, "layer": index, "position": of_layer}
            own = dataclasses.replace(size, length=size.length if length is None else length)
            return self.block(own, mechanisms[index % len(mechanisms)], **options, rngs=rngs)

        options = {"make_block": make_block, "period": period(choice), "target": self.target, "rngs": rngs}
        self.stack = spec.build("depth", choice.depth, size, **options)
        remembers = bool(nnx.state(self.stack, memory.Remembered))
        self.endless = remembers and not self.position.embeds
        if remembers and not task.segments:
            raise Refused(f"depth={choice.depth} remembers texts from batch to batch: {memory.UNRELATED}")
        norm = spec.entry("norm", spec.parse(choice.norm).name)
        self.final = None if norm.final is None else spec.build("norm", choice.norm, size, rngs=rngs)
        if self.final is not None and self.final.streams > 1:
            self._check_streams(choice, self.final.streams)
        self.head = None if tied else Linear(size.dim, task.outputs, dtype=size.dtype, rngs=rngs)
        self.further = self._further(choice, task, make_block, rngs) if choice.predict > 1 else None
        self.further_weight = choice.predict_weight

    def _check_streams(self, choice: Axes, count: int) -> None:
        """Raises Refused where states that are several residual streams would meet what knows one alone."""
        several = f"norm={choice.norm} has {count} residual streams"
        if not type(self.stack).several_streams:
            raise Refused(f"{several}, and depth={choice.depth} looks at states as if they were one: use depth=fixed")
        if choice.memory != "none":
            raise Refused(f"{several}, and memory={choice.memory} remembers one: use memory=none")

    def _further(self, choice: Axes, task: Task, make_block: MakeBlock, rngs: nnx.Rngs) -> _ahead.Further:
        """Heads for the tokens behind the next one."""
        _ahead.refuse(choice, task, causal=self.causal, streams=1 if self.final is None else self.final.streams)
        return _ahead.Further(self.size, choice.predict - 1, choice.predict_by, make_block=make_block, rngs=rngs)

    def entering(self, x, key=None):
        """Embeddings with their positions, (..., D), as the first layer is given them: normalised where that is asked
        for, with dropout, and as all its residual streams (..., streams D)."""
        x = x if self.embed_norm is None else self.embed_norm(x)
        x = on_mesh.states(drop(x, self.dropout, key))
        return x if self.final is None else self.final.widened(x)

    def input_layer(self, size: Size, task: Task, rngs: nnx.Rngs) -> Any:
        """What makes vectors (B, S, D) of unit size, S the length of `size`, of the task's inputs."""
        return first_layer(task.vocab, task.channels, size.dim, dtype=size.dtype, rngs=rngs)

    def block(self, size: Size, attention: str, **options) -> Block:
        """One layer of the stack."""
        return Block(size, attention, **options)

    def __call__(self, inputs, *, valid=None, key=None, documents=None, marked=None):
        # A task's own arrays are numpy's.
        inputs, valid, documents, marked = jax.tree.map(jnp.asarray, (inputs, valid, documents, marked))
        if documents is not None:
            self._check_documents()
        embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x, position = self.embedding(inputs), of_pass(self.position, embed_key)
        x = position.embed_rows(x, valid=valid, documents=documents)
        x = self.entering(x, embed_key)
        tokens = inputs if self.of_tokens else None
        # Of other depths nobody knows that a layer's rows are those of the batch.
        if marked is not None and not type(self.stack).documents_apart:
            marked = None
        context = Context(position, valid, self.predict, tokens=tokens, documents=documents, marked=marked)
        x, aux = self.stack(x, context, key=stack_key)
        if self.further is not None and key is not None:
            states, more = self.further(x, self.embedding(inputs), context, key=jax.random.fold_in(key, 2))
            aux = aux + Aux(losses=more.losses, ahead={"ahead": (self.further_weight, states)})
        return self.predict(x, valid=valid, train=key is not None), aux

    def _check_documents(self) -> None:
        """Raises Refused where packed documents would be mixed; layers refuse what they cannot do themselves."""
        if self.target == "sequence":
            raise Refused("packed data has several documents in a row, and this task asks for one answer of a row")
        if not type(self.stack).documents_apart:
            reason = "it may mix the positions of a row otherwise than by attention"
            raise Refused(why_not(f"depth={self.depth_choice}", reason, "depth=fixed"))
        if self.final is not None:
            check_norm(self.final, self.norm_choice)

    def predict(self, x, *, valid=None, train: bool = False):
        """What the hidden states above the last layer say: (B, T, D) -> logits, (B, D) -> (B, outputs) of one token.

        train: whether statistics of these states are the model's own, for training to keep.
        """
        x = x if self.final is None else self.final.final(x, LayerContext(valid, train))
        if self.target == "sequence":
            x = self.pool(x, valid)
        return (self.likeness(x) if self.head is None else self.head(x)).astype(jnp.float32)

    def likeness(self, x):
        """(..., D) -> (..., V), products with the embeddings; of two matrices, as in linear.py."""
        return self.embedding.attend(on_mesh.flat(x)).reshape(*x.shape[:-1], -1)

    def init_cache(self, B: int, length: int):
        if not self.causal:
            raise Refused("an encoder sees both sides, so it cannot decode token by token; use model=decoder")
        if self.target == "sequence":
            raise Refused("this model gives one answer per sequence, not one per token: there is nothing to decode")
        # What the position looks back at of embeddings, as if of one layer: samples are the second axis of every leaf.
        before = jnp.zeros((1, B, self.position.before, self.size.dim), self.size.dtype)
        return {"at": jnp.zeros((), jnp.int32), "before": before, "layers": self.stack.init_cache(B, length)}

    def step(self, cache, tokens):
        return self.step_beside(cache, tokens)

    def step_beside(self, cache, tokens, *, source=None, source_real=None):
        """`step` beside an encoded source (B, S, D), of which source_real (B, S) is no padding, where there is one."""
        x, context, cache = self._next(cache, tokens, source=source, source_real=source_real)
        x, layers = self.stack.step(x, cache["layers"], context, at=cache["at"] - 1)
        return self.predict(x), cache | {"layers": layers}

    def _next(self, cache, tokens, **source):
        """What the first layer is given of one more token (B,), what all are told, and the cache with it but for what
        layers keep."""
        at, new = cache["at"], self.embedding(tokens)[:, None]
        newest = jnp.concatenate([cache["before"][0], new], 1)
        places = at - jnp.arange(self.position.before, -1, -1)
        x = self.position.embed(newest, places, valid=jnp.broadcast_to(places >= 0, newest.shape[:2]))[:, -1]
        context = Context(self.position, predict=self.predict, tokens=tokens, **source)
        return self.entering(x), context, cache | {"at": at + 1, "before": newest[None, :, 1:]}

    def step_several(self, cache, tokens):
        (_, T), at, before = tokens.shape, cache["at"], self.position.before
        newest = jnp.concatenate([cache["before"][0], self.embedding(tokens)], 1)
        places = at + jnp.arange(-before, T)
        x = self.position.embed(newest, places, valid=jnp.broadcast_to(places >= 0, newest.shape[:2]))[:, before:]
        context = Context(self.position, predict=self.predict, tokens=tokens)
        x, layers = self.stack.step_several(self.entering(x), cache["layers"], context, at=at)
        return self.predict(x[:, -1]), {"at": at + T, "before": newest[None, :, T:], "layers": layers}

    def check_draft(self, layers):
        self.stack.check_draft(layers)

    def draft(self, cache, tokens, layers):
        x, context, cache = self._next(cache, tokens)
        x, kept = self.stack.step_below(x, cache["layers"], context, at=cache["at"] - 1, layers=layers)
        return x, self.predict(x), cache | {"layers": kept}

    def verify(self, cache, states, tokens, layers):
        context = Context(self.position, predict=self.predict, tokens=tokens)
        at = cache["at"] - tokens.shape[1]
        x, kept = self.stack.step_above(states, cache["layers"], context, at=at, layers=layers)
        return self.predict(x), cache | {"layers": kept}

    def rewound(self, before, after, tokens, taken):
        newest = jnp.concatenate([before["before"][0], self.embedding(tokens)], 1)
        kept = jax.lax.dynamic_slice_in_dim(newest, taken, self.position.before, 1)
        layers = self.stack.rewound(before["layers"], after["layers"], taken, read=tokens.shape[1])
        return {"at": before["at"] + taken, "before": kept[None], "layers": layers}

    def pool(self, x, valid):
        """(B, T, D) -> (B, D) over valid positions."""
        if self.pooling == "mean":
            if valid is None:
                return x.mean(1)
            weights = valid[..., None].astype(x.dtype)
            return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
        first = self.pooling == "first"
        if valid is None:
            return x[:, 0 if first else -1]
        at = jnp.argmax(valid, 1) if first else x.shape[1] - 1 - jnp.argmax(valid[:, ::-1], 1)
        return jnp.take_along_axis(x, at[:, None, None], 1)[:, 0]


def period(choice: Axes) -> int:
    """After how many layers mechanisms and positions come again together."""
    return math.lcm(*(len(spec.split(cycle, "+")) for cycle in (choice.attention, choice.position)))


def of_pass(position: Position, key: jax.Array | None) -> Position:
    """A position as one pass has it: in training, with the key of dropout behind it, with what it draws; in evaluation,
    without one, as it is."""
    # Not the key itself, which is dropout's, nor a third of a split, which would draw another dropout.
    return position if key is None else position.drawn(jax.random.fold_in(key, 1))
