import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab import spec
from xformers_lab.config import Config
from xformers_lab.depth import Context
from xformers_lab.depth._stack import in_turn
from xformers_lab.errors import Refused
from xformers_lab.model import Model
from xformers_lab.model._block import Block
from xformers_lab.model._source import EncoderInput
from xformers_lab.model._transformer import Transformer, of_pass, period
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size
from xformers_lab.position import _cycle
from xformers_lab.tasks import Task

APART = "this depth takes layers or tokens apart, and has no place for cross-attention: use depth=fixed"


class EncoderDecoder(EncoderInput, Transformer):
    """The Transformer of Vaswani et al. (2017, arXiv 1706.03762): an encoder of a source, a decoder that looks at it.

    Of every sequence the first `task.source_length` positions are the source, which sees both sides; the rest is the
    target, which sees what stands before it and, by cross-attention in every layer, the whole encoded source. Both
    stacks have the chosen attention, norm, feed-forward and depth, and number their positions from 0; the embedding is
    shared. Cross-attention knows no positions. Blanks that fill a source up are padding. Nothing is predicted at the
    source: its logits are zeros.

    Options:
        cross: the mechanism of cross-attention, any of the attention shelf that takes keys from elsewhere
        tied: whether the table of embeddings, which both sides share, is the head's matrix, too
    """

    causal = True

    def __init__(
        self, size: Size, *, cross: str = "full", tied: bool = False, config: Config, task: Task, rngs: nnx.Rngs
    ):
        source = task.source_length
        if task.target == "sequence" or not 0 < source < size.length:
            raise Refused("this task has no source and target apart: use model=decoder, or a task like mqar")
        if config.model.memory != "none":
            raise Refused(f"memory={config.model.memory} is for one text that goes on: use model=decoder")
        if config.model.predict > 1:
            raise Refused(f"predict={config.model.predict} is for one text of source and target: use model=decoder")
        mechanism = spec.entry("attention", spec.parse(cross).name, f"cross={cross}")
        if reason := mechanism.refuses.get("cross") or mechanism.refuses.get("bidirectional"):
            raise Refused(f"cross={cross} cannot look at a source: {reason}; use cross=full")
        if mechanism.carries():
            raise Refused(
                f"cross={cross} hands something to the layer above, which sees another source: use cross=full"
            )
        self.source, self.blank, self.cross, self.outputs = source, task.blank, cross, task.outputs
        target = dataclasses.replace(size, length=size.length - source, source_layers=size.layers)
        super().__init__(target, tied=tied, config=config, task=task, rngs=rngs)
        read = dataclasses.replace(size, length=source, target_layers=size.layers)
        self.source_position = _cycle.build(config.model.position, read, causal=False, rngs=rngs)
        mechanisms = spec.split(config.model.attention, "+")

        def make_block(index: int, rngs: nnx.Rngs, length: int | None = None):
            own = dataclasses.replace(read, length=source if length is None else length)
            of_layer = self.source_position.of_layer(index)
            options = {"config": config, "causal": False, "layer": index, "position": of_layer}
            return Block(own, mechanisms[index % len(mechanisms)], **options, rngs=rngs)

        stacked = {"make_block": make_block, "period": period(config.model), "target": "token", "rngs": rngs}
        self.encoder = spec.build("depth", config.model.depth, read, **stacked)
        self.source_final = None if self.final is None else spec.build("norm", config.model.norm, read, rngs=rngs)

    def block(self, size: Size, attention: str, **options) -> Block:
        return CrossBlock(size, attention, cross=self.cross, source=self.source, **options)

    def encode(self, inputs, *, valid=None, key=None):
        """Source tokens (B, S) -> their states (B, S, D), or (views, B, S, D) where each layer of the decoder looks at
        its own; aux."""
        keys = (None, None) if key is None else jax.random.split(key)
        position = of_pass(self.source_position, keys[0])
        x = position.embed(self.embedding(inputs), jnp.arange(inputs.shape[1]), valid=valid)
        context = Context(position, valid, tokens=inputs)
        x, aux = self.encoder(self.entering(x, keys[0]), context, key=keys[1])
        if self.source_final is None:
            return x, aux
        views, flat = max(1, self.encoder.views), x.reshape(-1, *x.shape[-2:])
        valid = None if valid is None else jnp.tile(valid, (views, 1))
        return self.source_final.final(flat, LayerContext(valid, key is not None)).reshape(x.shape), aux

    # No packed data: it names no `documents`.
    def __call__(self, inputs, *, valid=None, key=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, valid = jax.tree.map(jnp.asarray, (inputs, valid))  # a task's own arrays are numpy's
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        side = lambda x, part: None if x is None else x[:, part]
        first, rest = slice(None, self.source), slice(self.source, None)
        real_source = self.real_source(inputs[:, first], side(valid, first))
        states, aux = self.encode(inputs[:, first], valid=real_source, key=keys[0])
        x, real_rest = self.embedding(inputs[:, rest]), side(valid, rest)
        position = of_pass(self.position, keys[1])
        x = position.embed(x, jnp.arange(x.shape[1]), valid=real_rest)
        context = Context(position, real_rest, self.predict, states, real_source, inputs[:, rest])
        x, more = self.stack(self.entering(x, keys[1]), context, key=keys[2])
        logits = self.predict(x, valid=real_rest, train=key is not None)
        logits = jnp.concatenate([jnp.zeros((len(x), self.source, logits.shape[-1])), logits], 1)
        return logits, _of_both(aux, more)

    def init_cache(self, B: int, length: int):
        if length <= self.source:
            raise Refused(f"the source takes {self.source} tokens, so there is nothing to decode of {length}")
        states = jnp.zeros((max(1, self.encoder.views), B, self.source, self.size.dim), self.size.dtype)
        return {**self.unread(B), "states": states, "target": super().init_cache(B, length - self.source)}

    # The first token after the source has it encoded.
    step_several = Model.step_several
    check_draft = Model.check_draft

    def step(self, cache, tokens):
        """Tokens of the source are kept until it is whole; the first one after it has it encoded, once."""
        at, (graph, variables) = cache["at"], nnx.split(self)

        def reads(cache):
            return jnp.zeros((len(tokens), self.outputs)), self.take(cache, tokens)

        def writes(cache):
            valid = cache["valid"][0]

            def encode():
                # Of copies, for layers may write to their variables, which is not kept here.
                own = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))
                encoded = own.encode(cache["read"][0], valid=valid)[0]
                return encoded.reshape(-1, *encoded.shape[-3:]).astype(self.size.dtype)

            states = lax.cond(at == self.source, encode, lambda: cache["states"])
            source = states if self.encoder.views else states[0]
            logits, target = self.step_beside(cache["target"], tokens, source=source, source_real=valid)
            return logits, cache | {"states": states, "target": target}

        logits, cache = lax.cond(at < self.source, reads, writes, cache)
        return logits, cache | {"at": at + 1}


def _of_both(source: Aux, target: Aux) -> Aux:
    """Results of both stacks added up; figures of each token side by side, as the tokens stand."""
    both = source.tokens.keys() & target.tokens.keys()
    beside = {name: jnp.concatenate([source.tokens[name], target.tokens[name]], 1) for name in both}
    without = lambda side: dataclasses.replace(side, tokens={})
    return dataclasses.replace(without(source) + without(target), tokens=beside)


class CrossBlock(Block):
    """A layer whose queries also look at an encoded source, between self-attention and feed-forward."""

    def __init__(
        self, size: Size, attention: str, *, cross: str, source: int, config: Config, rngs: nnx.Rngs, **options
    ):
        super().__init__(size, attention, config=config, rngs=rngs, **options)
        self.cross = spec.build("attention", cross, dataclasses.replace(size, length=source), rngs=rngs)
        # Short convolutions mix neighbours of one sequence: they are self-attention's.
        self.cross.prepare(qk_norm=config.model.qk_norm, log_n=config.model.log_n)
        self.cross_norm = spec.build("norm", config.model.norm, size, rngs=rngs)
        self.cross_norm.start(self.cross)
        self.source, self.projects, self.joined = source, self.cross.projects, False

    def __call__(self, x, carries, context, *, key=None):
        if context.source is None:
            raise Refused(APART)
        keys = [None] * 6 if key is None else list(jax.random.split(key, 6))
        aux = computation(self.share) if self.share != 1 else Aux()
        rows = LayerContext(context.valid, key is not None)
        if self.attention is not None:
            y, carries, more = super().attend(x, carries, context, keys=keys[:2])
            aux = aux | more
            if not self.joined:
                x = self.attention_norm.after(x, y, rows)
            options = {"valid": context.source_real, "causal": False, "key": keys[2]}
            with jax.named_scope("attention"):
                looked, _, more = self.cross(self._looking().before(x, rows), context.source, **options)
            looked, aux = drop(looked, self.dropout, keys[3]), aux + more
            x = self._looking().after(x, y + looked if self.joined else looked, rows)
        if self.ffn is not None:
            y, more = self.apply_ffn(x, context, keys=keys[4:])
            x, aux = self.ffn_norm.after(x, y, rows), aux + more
        return x, carries, aux

    def beside_source(self):
        self.joined = True
        del self.cross_norm
        return self

    def _looking(self):
        """The placement of cross-attention."""
        return self.attention_norm if self.joined else self.cross_norm

    def only(self, kept: str):
        """Cross-attention belongs to attention, and goes with it."""
        if kept == "ffn":
            del self.cross, self.cross_norm
        return super().only(kept)

    def attend(self, x, carries, context, *, source=None, keys=(None, None), alone: bool = True):
        raise Refused(APART)

    def init_cache(self, B: int, length: int):
        """Keys and values of the source are projected once, but for a mechanism with projections of its own."""
        own = super().init_cache(B, length)
        if self.attention is None or not self.projects:
            return {"own": own}
        rows = jnp.zeros((B, self.source, self.cross.size.key_heads, self.cross.size.head), self.dtype)
        return {"own": own, "k": rows, "v": rows}

    def step(self, x, cache, carries, context, at):
        if self.attention is not None:
            y, own, carries = self.step_attend(x, cache["own"], carries, context, at)
            cache = cache | {"own": own}
            if not self.joined:
                x = self.attention_norm.after(x, y, LayerContext())
            looked, cache = self._look(self._looking().before(x, LayerContext())[:, None], cache, context, at)
            x = self._looking().after(x, y + looked if self.joined else looked, LayerContext())
        if self.ffn is not None:
            y, own = self.step_ffn(x, cache["own"], context, at)
            x, cache = self.ffn_norm.after(x, y, LayerContext()), cache | {"own": own}
        return x, cache, carries

    def step_several(self, x, cache, context, at):
        return in_turn(self, x, cache, context, at)

    def _look(self, asked, cache, context, at):
        """Cross-attention of one token (B, 1, D) -> (B, D), and the cache, which the first token fills."""
        cross, source, options = self.cross, context.source, {"valid": context.source_real, "causal": False}
        if not self.projects:
            return cross(asked, source, **options)[0][:, 0], cache
        project = lambda: (cross.heads_of(cross.key(source)), cross.heads_of(cross.value(source)))
        k, v = lax.cond(at == 0, project, lambda: (cache["k"], cache["v"]))
        return cross.attend_projected(asked, k, v, source, **options)[0][:, 0], cache | {"k": k, "v": v}
