import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._segments import at_once, in_turn
from xformers_lab.depth._stack import first
from xformers_lab.depth.transparent import Transparent
from xformers_lab.errors import Refused
from xformers_lab.memory import why_not
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size


class Feedback(Depth):
    """Feedback Transformer: every layer looks at one memory of all layers of earlier positions, so that what the top
    layer knew reaches the lowest of the next position (Fan et al., 2020, arXiv 2002.09402).

        m_t = sum over i = 0..L of softmax(w)_i h_t^i,   h^0 the embeddings, h^i the output of layer i
        layer i at t: its queries come from h_t^(i-1), its keys and values from W_k n(m_s), W_v n(m_s) of s < t

    W_k, W_v and n are shared by all layers, as in the paper, so that a position is projected once: n is what the
    residual placement of the first layer does before attention. A position is read when all before it have passed all
    layers: T steps one after the other in training as in decoding. Gradients flow through all of them.

    segment = k > 1 reads k positions at a time, in T / k steps: queries of a segment look at the memories of the
    segments before, and, where `own` says so, at the inputs of their own layer in the segment up to themselves,
    projected alike (as in any decoder; with one segment alone this would be a stack whose layers share W_k and W_v).

    Positions are those of the text. A mechanism sees the memory and the segment as one row of keys, the newest last: a
    pattern that is tied to places (strides, blocks) lies on that row. Padding is never seen. In the backward pass the
    memory is kept at the root of the T / k steps, and the steps between are run again. Decoding keeps three vectors per
    position of the window for all layers together; with `own` a layer's attention runs for all rows of the segment to
    get that of one token.

    Options:
        segment: k, positions read at a time; 1 is the paper
        own: whether queries also see their own layer in their segment, themselves included (none: where segment > 1;
            the paper's do not)
        window: how many memories are kept (none: those of all segments but one of seq_len)
    """

    def __init__(
        self,
        size: Size,
        *,
        segment: int = 1,
        own: bool | None = None,
        window: int | None = None,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if not 1 <= segment < size.length:
            raise Refused(
                f"segment={segment} must be from 1 to {size.length - 1}, less than seq_len: a segment looks at the "
                "memory of those before it"
            )
        if window is not None and window < 1:
            raise Refused(f"window must be at least 1, got {window}: depth=fixed has no memory")
        self.segment, self.own, self.size = segment, segment > 1 if own is None else own, size
        self.window = (-(-size.length // segment) - 1) * segment if window is None else window

        def make(index: int, rngs: nnx.Rngs):
            block = make_block(index, rngs, length=self.window + segment)
            if reason := refusal(block):
                raise Refused(reason)
            return block

        def keyless(index: int, rngs: nnx.Rngs):
            block = make(index, rngs)
            del block.attention.key, block.attention.value
            return block

        shared = make(0, rngs).attention
        self.key, self.value = shared.key, shared.value
        self.layers = Transparent(size, make_block=keyless, period=period, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        (B, T, _), k = x.shape, self.segment
        G = -(-T // k)
        outer = math.isqrt(G)
        inner = -(-G // outer)
        valid = jnp.ones((B, T), bool) if context.valid is None else context.valid
        graph, params, rest = nnx.split(self.layers, nnx.Param, ...)
        norm = self._norm()

        def one(state, inputs):
            memory, rest = state
            x, valid, tokens, key, at = inputs
            layers = nnx.merge(graph, params, rest)

            def among(y):
                rows = self._projected(y)
                return self._seen(memory, rows, valid if self.own else jnp.zeros_like(valid)) | {"at": at}

            here = dataclasses.replace(context, valid=valid, tokens=tokens, among=among)
            (y, mix, *_), _, aux = layers.run(layers.begin(x), {}, here, key=key)
            memory = self._pushed(memory, norm.before(mix.astype(x.dtype), LayerContext(valid)), valid)
            return (memory, nnx.split(layers, nnx.Param, ...)[2]), (y, aux)

        count = outer * inner
        keys = None if key is None else jax.random.split(key, count)
        steps = [in_turn(y, k, count) for y in (x, valid, context.tokens)] + [keys, k * jnp.arange(count)]
        nested = jax.tree.map(lambda leaf: leaf.reshape(outer, inner, *leaf.shape[1:]), steps)
        several = jax.checkpoint(lambda state, steps: lax.scan(one, state, steps))
        (_, rest), outputs = lax.scan(several, (self._empty(B), rest), nested)
        nnx.update(self.layers, rest)
        y, aux = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), outputs)
        return at_once(y, T), jax.tree.map(lambda values: values[:G].mean(0), aux)

    def _norm(self):
        """The placement whose `before` the memory passes."""
        stacked = [*self.layers.periods, *self.layers.rest][0]
        return first(stacked).block.attention_norm

    def _projected(self, y) -> dict:
        """Normalised states (B, S, D) and their keys and values."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.size.head)
        return {"k": heads(self.key(y)), "v": heads(self.value(y)), "source": y}

    def _empty(self, B: int) -> dict:
        size = self.size
        rows = jnp.zeros((B, self.window, size.key_heads, size.head), size.dtype)
        states = jnp.zeros((B, self.window, size.dim), size.dtype)
        return {"k": rows, "v": rows, "source": states, "valid": jnp.zeros((B, self.window), bool)}

    def _seen(self, memory: dict, rows: dict, valid) -> dict:
        """What queries of a segment look at: the memory, then the segment's own rows, where they are valid (B, k)."""
        return jax.tree.map(lambda old, new: jnp.concatenate([old, new], 1), memory, rows | {"valid": valid})

    def _pushed(self, memory: dict, states, valid) -> dict:
        """The memory with a segment's normalised memories (B, k, D) as its newest."""
        rows = self._seen(memory, self._projected(states), valid)
        return jax.tree.map(lambda leaf: leaf[:, -self.window :], rows)

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """The memory, (1, B, window, ...), the memories of the segment so far (1, B, k, D), and for `own` the layers'
        rows of the segment."""
        memory = jax.tree.map(lambda leaf: leaf[None], self._empty(B))
        rows = {name: leaf[0, :, :1].repeat(self.segment, 1) for name, leaf in memory.items() if name != "valid"}
        of_layer = rows if self.own else {}

        def caches(stacked):
            layers = jax.tree.leaves(nnx.state(stacked))[0].shape[0]
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), of_layer)

        layers = [[caches(stacked) for stacked in blocks] for blocks in (self.layers.periods, self.layers.rest)]
        pending = jnp.zeros((1, B, self.segment, self.size.dim), jnp.float32)
        return {"memory": memory, "pending": pending, "layers": layers}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        k, place = self.segment, at % self.segment
        memory = jax.tree.map(lambda leaf: leaf[0], cache["memory"])
        known = jnp.broadcast_to(self.own & (jnp.arange(k) <= place), (len(x), k))
        placed = lambda old, new: lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), place, 1)

        def among(y, cache):
            rows = jnp.zeros((len(y), k, y.shape[-1]), y.dtype)
            new = jax.tree.map(lambda leaf: leaf[:, 0], self._projected(y[:, None]))
            old = cache or jax.tree.map(lambda leaf: jnp.zeros((len(y), k, *leaf.shape[1:]), leaf.dtype), new)
            seen = jax.tree.map(placed, old, new)
            arguments = self._seen(memory, seen, known) | {"at": at - place}
            return placed(rows, y), place, arguments, seen if cache else cache

        here = dataclasses.replace(context, among=among)
        (y, mix, *_), layers, _ = self.layers.run_step(self.layers.begin(x), cache["layers"], {}, here, at=at)
        pending = placed(cache["pending"][0], mix)

        def push():
            states = self._norm().before(pending.astype(x.dtype), LayerContext())
            return self._pushed(memory, states, jnp.ones((len(x), k), bool))

        memory = lax.cond(place == k - 1, push, lambda: memory)
        memory = jax.tree.map(lambda leaf: leaf[None], memory)
        return y, {"memory": memory, "pending": pending[None], "layers": layers}


def refusal(block: Any) -> str | None:
    """Why a block cannot look at a memory of all layers; None where it can."""
    if not block.causal:
        return "an encoder sees both sides, so that no position is done before another: use model=decoder"
    name = type(block.attention).__name__.lower()
    if reason := why_not(block.attention):
        return reason
    if not block.attention.projects:
        return f"attention={name} makes its keys and values itself, but here they are the memory's, for all layers"
    if block.ffn is not None and block.ffn.looks_back:
        return (
            f"ffn={block.ffn_choice} looks back, but a segment's layers, by default of one position, know of those "
            "before what the memory tells their attention alone: use ffn=mlp"
        )
    if block.attention.tails(1) is not None:
        what = "conv= convolves" if block.attention.token_shift is None else "shift=input shifts"
        return f"{what} a layer's own keys and values, but here they are the memory's, for all layers"
    return None
