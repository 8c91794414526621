"""One layer: attention and feed-forward, each inside a residual placement."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab import memory, spec
from xformers_lab.attention import Attention
from xformers_lab.config import Config
from xformers_lab.depth._stack import in_turn
from xformers_lab.errors import Refused
from xformers_lab.model import _segments
from xformers_lab.nn import layer_number
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.documents import why_not
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._each_layer import EachLayer

# What carries the first layer's values, beside the carries of mechanisms.
VALUES = "values of the first layer"


class Block(nnx.Module):
    """The mechanisms and placements of one layer; the context has the position of every layer.

    layer: the layer's number, or that of another one which is at the same place of the cycles of mechanisms and
    positions. position: the model's for this layer, of which the block builds its own where every layer has one.
    """

    def __init__(
        self,
        size: Size,
        attention: str,
        *,
        config: Config,
        causal: bool,
        layer: int = 0,
        position: Position | None = None,
        rngs: nnx.Rngs,
    ):
        build = lambda shelf, choice: spec.build(shelf, choice, size, rngs=rngs)
        self.memory = build("memory", config.model.memory)
        keys = size if self.memory is None else dataclasses.replace(size, length=size.length + self.memory.length)
        self.attention = spec.build("attention", attention, keys, rngs=rngs)
        self.attention.check_kernel()
        choice = config.model
        prepared = {"conv": choice.conv, "qk_norm": choice.qk_norm, "log_n": choice.log_n}
        self.attention.prepare(**prepared, value_residual=choice.value_residual, causal=causal)
        if self.memory is not None and self.attention.first_values is not None:
            raise Refused("value_residual mixes values of one segment, to which a memory adds others: leave it out")
        if self.memory is not None and (reason := memory.why_not(self.attention, self.memory.learns)):
            raise Refused(f"memory={config.model.memory} cannot be read: {reason}")
        self.attention_norm = build("norm", config.model.norm)
        self.attention_norm.start(self.attention)
        self.ffn = build("ffn", config.model.ffn)
        if self.ffn is not None:
            self.ffn_norm = build("norm", config.model.norm)
            self.ffn_norm.start(self.ffn)
            if causal and (reason := self.ffn.not_causal()):
                raise Refused(f"ffn={config.model.ffn} cannot be causal: {reason}")
        self.name, self.causal, self.dropout, self.dtype = attention, causal, config.model.dropout, size.dtype
        self.dim, self.length, self.heads, self.size = size.dim, size.length, size.heads, size
        # A feed-forward layer that looks back begins anew with every segment, also in a block that has it alone.
        self.segment = None if self.memory is None else size.length
        self.layer, self.share = layer, 1.0
        self.key_terms = None if position is None else position.key_terms
        self.own_position = position.own(rngs) if isinstance(position, EachLayer) else None
        layer_number.moved(self, layer)
        # As a refusal of packed data names them.
        self.norm_choice, self.ffn_choice, self.memory_choice = config.model.norm, config.model.ffn, config.model.memory

    def position(self, context):
        """The layer's own of the context's positions."""
        found = None if context.position is None else context.position.of_layer(self.layer)
        return self.own_position if isinstance(found, EachLayer) and self.own_position is not None else found

    def initial_carries(self, B: int, T: int, S: int) -> dict:
        """{mechanism: carry below the first layer} for mechanisms that carry something from layer to layer."""
        if self.attention is None:
            return {}
        own = {self.name: self.attention.initial_carry(B, T, S)} if self.attention.carries() else {}
        return own if self.attention.first_values is None else own | {VALUES: self.attention.no_values(B, T)}

    def _carry(self, carries, context):
        """What attention is given of carries: that of its mechanism, and the first layer's values where it has them."""
        own = carries.get(self.name)
        if self.attention.first_values is None:
            return own
        if context.among is not None or VALUES not in carries:
            raise Refused(
                "value_residual mixes values of the same positions, and this depth has layers look at others: use "
                "depth=fixed, or leave value_residual out"
            )
        return own, carries[VALUES]

    def _carried(self, carries, carry):
        """Carries for the layer above, with what attention gave."""
        if self.attention.first_values is not None:
            carry, values = carry
            carries = carries | {VALUES: values}
        return carries | {self.name: carry} if self.name in carries else carries

    def __call__(self, x, carries, context, *, key=None):
        """(B, T, D) and {mechanism: carry} -> the same, and auxiliary results."""
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        aux, layer = Aux(), LayerContext(context.valid, key is not None)
        if self.attention is not None:
            y, carries, aux = self.attend(x, carries, context, keys=keys[:2], alone=False)
            x = self.attention_norm.after(x, y, layer)
        if self.ffn is not None:
            y, more = self.apply_ffn(x, context, keys=keys[2:])
            x = self.ffn_norm.after(x, y, layer)
            aux = aux + more
        if self.memory is not None and self.memory.of_outputs:
            self.memory.write(x, context.valid)
        return x, carries, aux if self.share == 1 else computation(self.share) | aux

    def placed(self, layer, *, rngs: nnx.Rngs):
        """A placement as those of the block are, around a sub-layer that a depth adds."""
        norm = spec.build("norm", self.norm_choice, self.size, rngs=rngs)
        norm.start(layer)
        return norm

    def only(self, kept: str):
        """The block with one sub-layer alone, kept = "attention" or "ffn"; it counts as half a layer."""
        other = {"attention": "ffn", "ffn": "attention"}[kept]
        if getattr(self, kept) is None:
            raise Refused(f"this depth orders attention and feed-forward layers, but there is no {kept} here")
        if getattr(self, other) is not None:
            setattr(self, other, None)
            delattr(self, f"{other}_norm")
            self.share = 0.5
        if kept == "ffn":
            self.memory = None
        return self

    def beside_source(self):
        """The block with cross-attention, where it has that, on the same states as its attention, and both added up."""
        return self

    @jax.named_scope("attention")  # what `train.sizes` and profiles tell apart
    def attend(self, x, carries, context, *, source=None, keys=(None, None), alone: bool = True):
        """What attention on x, normalised as its placement asks, hands to `attention_norm.after`; carries, aux.

        source (B, S, D): states whose keys and values x looks at in place of its own, normalised alike, and
        their valid. alone: whether a depth runs this sub-layer by itself, so that the block learns of no output.
        """
        if alone and self.memory is not None and self.memory.of_outputs:
            raise Refused(
                f"memory={self.memory_choice} remembers what a layer gives, and this depth takes layers apart: use "
                "depth=fixed or memory=xl"
            )
        train = keys[0] is not None
        self._check_documents(context, self.attention_norm)
        before = lambda states: self.attention_norm.before(states, LayerContext(context.valid, train))
        options = {"causal": self.causal, "carry": self._carry(carries, context), "key": keys[0]}
        options["position"] = self.position(context)
        if context.documents is not None:
            self.attention.check_documents(context.documents)
            options["documents"] = context.documents
        if self.attention.marks:
            options["marked"] = self._marked(context)
        if context.among is not None:
            y = before(x)
            y, carry, aux = self.attention.attend_projected(y, **context.among(y), **options)
        elif self.memory is None:
            source = None if source is None else before(source)
            y, carry, aux = self.attention(before(x), source, valid=context.valid, **options)
        else:
            source, valid, memory_aux = self._source(x, context.valid, train)
            y, carry, aux = self.attention(source[:, -x.shape[1] :], source, valid=valid, **options)
            aux = aux + memory_aux
        carries = self._carried(carries, carry)
        return drop(y, self.dropout, keys[1]), carries, aux

    @jax.named_scope("ffn")
    def apply_ffn(self, x, context, *, keys=(None, None)):
        """What the feed-forward layer on x, normalised, hands to `ffn_norm.after`, and aux."""
        self._check_documents(context, self.ffn_norm)
        if context.documents is not None and not self.ffn.documents_apart:
            reason = "what becomes of a token depends on the others"
            raise Refused(why_not(f"ffn={self.ffn_choice}", reason, "another ffn"))
        x = self.ffn_norm.before(x, LayerContext(context.valid, keys[0] is not None))
        options = self._tokens(context)
        if context.documents is not None and self.ffn.takes("documents"):
            options["documents"] = context.documents
        y, aux = self.ffn(x, valid=context.valid, key=keys[0], **options)
        return drop(y, self.dropout, keys[1]), aux

    def _marked(self, context):
        """Which rows the task marks; raises Refused where nobody knows."""
        where = f"attention={self.name} looks at positions that the task marks, and "
        if self.memory is not None:
            raise Refused(f"{where}memory={self.memory_choice} has rows in front of them: use memory=none")
        if context.marked is None:
            raise Refused(f"{where}here nobody says which: give the model `marked`, and use depth=fixed")
        return context.marked

    def _check_documents(self, context, norm) -> None:
        """Raises Refused where packed documents would be mixed by the layer's placement, or by its memory."""
        if context.documents is None:
            return
        if self.memory is not None:
            reason = "what it keeps is of whole rows"
            raise Refused(why_not(f"memory={self.memory_choice}", reason, "memory=none"))
        check_norm(norm, self.norm_choice)

    def _source(self, x, valid, train: bool):
        """What keys and values come from with a memory, the segment last; which of it is valid; the memory's aux."""
        assert self.memory is not None
        old, known = self.memory.read(len(x))
        aux = self.memory.loss(x, valid, memory.looking(self.attention, self.attention_norm, x))
        if not self.memory.of_outputs:
            self.memory.write(x, valid)
        valid = jnp.concatenate([known, jnp.ones(x.shape[:2], bool) if valid is None else valid], 1)
        return self.attention_norm.before(jnp.concatenate([old, x], 1), LayerContext(valid, train)), valid, aux

    def init_cache(self, B: int, length: int):
        """What decoding remembers in this layer of up to `length` tokens of B sequences: of its attention, and where
        its feed-forward layer looks back {"attention": that, "ffn": what this one remembers}."""
        own = self._init_attention(B, length)
        return {"attention": own, "ffn": self.ffn.init_cache(B, self.dtype)} if self._looks_back() else own

    def _init_attention(self, B: int, length: int):
        if self.memory is not None:
            return _segments.init_cache(self, B)
        if self.attention is None:
            return {}
        return self._with_rows(self.attention.init_cache(B, length, self.dtype), B, length)

    def _looks_back(self) -> bool:
        return self.ffn is not None and self.ffn.looks_back

    def _of_attention(self, cache):
        return cache["attention"] if self._looks_back() else cache

    def _with_attention(self, cache, own):
        return cache | {"attention": own} if self._looks_back() else own

    def begun(self, B: int, length: int, empty):
        """The cache of attention for `length` places of B sequences of which the first `empty` () hold nothing, and the
        position of the first token behind them."""
        own, first = self.attention.begin(self.attention.init_cache(B, length, self.dtype), empty)
        return self._with_rows(own, B, length), first

    def _with_rows(self, own, B: int, length: int):
        """The cache of attention, with what the position keeps of the keys and convolutions of their inputs."""
        kept, tails = {}, self.attention.tails(B, self.dtype)
        if self.key_terms is not None:
            kept["of_keys"] = jnp.zeros((B, length, self.heads, self.key_terms), jnp.float32)
        if tails is not None:
            kept["tails"] = tails
        return {"own": own} | kept if kept else own

    def step(self, x, cache, carries, context, at):
        """One token (B, D) at position `at` () -> (B, D), the new cache, the carries of this token."""
        if self.attention is not None:
            y, cache, carries = self.step_attend(x, cache, carries, context, at)
            x = self.attention_norm.after(x, y, LayerContext())
        if self.ffn is not None:
            y, cache = self.step_ffn(x, cache, context, at)
            x = self.ffn_norm.after(x, y, LayerContext())
        if self.memory is not None and self.memory.of_outputs:
            own = _segments.kept(self, x, self._of_attention(cache), self.position(context), at)
            cache = self._with_attention(cache, own)
        return x, cache, carries

    def step_several(self, x, cache, context, at):
        """`step` of T tokens (B, T, D), from position `at` () on, which carry nothing -> (B, T, D), the new cache."""
        several = self.attention is None or isinstance(self.attention, Attention)
        anew = self.segment is not None and self._looks_back()
        if self.memory is not None or anew or context.among is not None or not several:
            return in_turn(self, x, cache, context, at)
        if self.attention is not None:
            y, own = self.attention_norm.before(x, LayerContext()), self._of_attention(cache)
            y, own = self.attention.decode_several(y, own, at=at, position=self.position(context))
            x, cache = self.attention_norm.after(x, y, LayerContext()), self._with_attention(cache, own)
        if self.ffn is not None:
            y, cache = self._step_ffn("step_several", x, cache, context, at)
            x = self.ffn_norm.after(x, y, LayerContext())
        return x, cache

    def rewound(self, before, after, taken, *, read: int):
        """The cache behind the first `taken` () of the `read` tokens that made `after` of `before`; raises Refused
        where it cannot go back."""
        if self.memory is not None:
            raise Refused(f"memory={self.memory_choice} cannot go back behind tokens that were not accepted")
        if self._looks_back():
            of_ffn = self.ffn.rewound(before["ffn"], after["ffn"], taken, read=read)
            own = self._rewound_attention(before["attention"], after["attention"], taken, read=read)
            return {"attention": own, "ffn": of_ffn}
        return self._rewound_attention(before, after, taken, read=read)

    def _rewound_attention(self, before, after, taken, *, read: int):
        if self.attention is None:
            return after
        if "own" not in before:
            return self.attention.rewound(before, after, taken, read=read)
        # What a position keeps of keys that are not there yet is not looked at.
        return after | {"own": self.attention.rewound(before["own"], after["own"], taken, read=read)}

    def step_attend(self, x, cache, carries, context, at):
        """`attend` for one token (B, D), with the layer's cache."""
        y, own = self.attention_norm.before(x, LayerContext()), self._of_attention(cache)
        options = {"position": self.position(context), "carry": self._carry(carries, context)}
        if context.among is not None:
            rows, row, parts, own = context.among(y, own)
            y, carry, _ = self.attention.attend_projected(rows, **parts, causal=True, **options)
            y = jnp.take(y, row, 1)
        elif self.memory is not None:
            y, own = _segments.step(self, x, y, own, options["position"], at)
            return y, self._with_attention(cache, own), carries
        else:
            y, own, carry = self.attention.decode(y, own, at=at, **options)
        return y, self._with_attention(cache, own), self._carried(carries, carry)

    def step_ffn(self, x, cache, context, at):
        """`apply_ffn` for one token (B, D), with the layer's cache -> (B, D), the new cache."""
        return self._step_ffn("step", x, cache, context, at)

    def _step_ffn(self, way: str, x, cache, context, at):
        """`step` or `step_several` of the feed-forward layer on x, normalised."""
        y, state = self.ffn_norm.before(x, LayerContext()), cache["ffn"] if self._looks_back() else {}
        if self.segment is not None and self._looks_back():
            new = self.ffn.init_cache(len(x), self.dtype)
            state = jax.tree.map(lambda new, old: jnp.where(at % self.segment == 0, new, old), new, state)
        y, state = getattr(self.ffn, way)(y, state, **self._tokens(context))
        return y, cache | {"ffn": state} if self._looks_back() else cache

    def _tokens(self, context) -> dict:
        """The tokens, where the feed-forward layer takes them."""
        if not self.ffn.takes("tokens"):
            return {}
        if context.tokens is None:
            raise Refused(
                f"ffn={type(self.ffn).__name__.lower()} looks at the tokens, but here are layers whose rows are none; "
                "use depth=fixed or another ffn"
            )
        return {"tokens": context.tokens}


def check_norm(norm, choice: str) -> None:
    """Raises Refused where a placement, which a config calls `choice`, would mix packed documents."""
    if not norm.documents_apart:
        reason = "its normaliser takes statistics over the tokens of a batch"
        raise Refused(why_not(f"norm={choice}", reason, "another normaliser"))
