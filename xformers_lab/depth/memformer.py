import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.attention.full import Full
from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._segments import Carried, at_once, in_turn
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import LayerNorm
from xformers_lab.nn.size import Size


class Memformer(Depth):
    """Memformer: the layers read one segment at a time beside a few memory slots, which each segment rewrites (Wu et
    al., 2020, arXiv 2010.06891).

        read, in every layer:  x + attention(x),  x + softmax(q(x) k(m)^T / sqrt(H)) v(m),  x + ffn(x)
        write, after segment g:  a_i = softmax([q(m_i) . k(m_i), q(m_i) . k(h_1), ..., q(m_i) . k(h_L)] / (sqrt(H) tau))
        m'_i = a_i0 m_i + sum_t a_it v(h_t)
        forget:                m_i = (m'_i + b_i) / |m'_i + b_i|,    at first b_i / |b_i|

    h are the L = segment states that leave the layers, normalised; m are `slots` vectors (slots, D), b learned. A slot
    sees itself and the segment, no other slot; tau = temperature below 1 sharpens its choice. What is never written
    again turns into b, its start. Reading is full attention by heads; so is writing, without a projection behind it,
    so that a slot can keep what it has. A segment of padding alone leaves the memory as it was.

    Gradients flow through all segments of a sequence. Between forward and backward pass only the memory of each segment
    is kept (slots D numbers of T / L segments), and a segment is run again when the backward pass comes to it: the
    memory and work of the paper's memory replay back-propagation. Attention never sees more than a segment, so that its
    work grows linearly with T.

    Inside a segment positions count from its start. What a mechanism hands to the layer above ends with the segment.
    "computation" counts a layer with its reading as 1. Decoding writes the memory whenever a segment is full.
    With carry=true a text goes on over training steps: a sequence begins with the memory that the one before it in the
    same row of the batch left, without its gradient, and with the learned one where a new text begins. That needs a
    task that gives segments which follow one another (lm).
    Deviations from the paper: memory is read and written by one stack, not by an encoder for a decoder; without carry
    a sequence's first segment begins with the learned memory, and it ends with the sequence; no dropout on what is
    read.

    Options:
        segment: L, states read at a time (none: a quarter of seq_len)
        slots: vectors of memory
        temperature: tau, of writing
        carry: whether memory goes on from batch to batch
    """

    def __init__(
        self,
        size: Size,
        *,
        segment: int | None = None,
        slots: int = 16,
        temperature: float = 0.25,
        carry: bool = False,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        segment = max(1, size.length // 4) if segment is None else segment
        if not 1 <= segment <= size.length:
            raise Refused(f"segment={segment} must be from 1 to seq_len={size.length}")
        if slots < 1:
            raise Refused(f"slots must be at least 1, got {slots}: without them segments know nothing of another")
        if temperature <= 0:
            raise Refused(f"temperature must be above 0, got {temperature}")
        self.segment = segment
        make = lambda index, rngs: Reader(size, slots, make_block(index, rngs, length=segment), rngs=rngs)
        self.layers = Fixed(size, make_block=make, period=period, rngs=rngs)
        self.writer = Writer(size, slots, temperature, rngs=rngs)
        self.carried = Carried(slots, size.dim) if carry else None

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        (B, T, _), L = x.shape, self.segment
        G, valid = -(-T // L), context.valid
        if T % L and valid is None:
            valid = jnp.ones((B, T), bool)
        graph, params, rest = nnx.split(self.layers, nnx.Param, ...)

        @jax.checkpoint
        def one(state, inputs):
            memory, rest = state
            x, valid, tokens, key = inputs
            layers = nnx.merge(graph, params, rest)
            here = dataclasses.replace(context, valid=valid, tokens=tokens)
            y, _, aux = layers.run(x, layers.initial_carries(B, L, L), (here, memory), key=key)
            return (self.writer(memory, y, valid), nnx.split(layers, nnx.Param, ...)[2]), (y, aux)

        keys = None if key is None else jax.random.split(key, G)
        steps = [in_turn(y, L, G) for y in (x, valid, context.tokens)] + [keys]
        first = self.writer.begin(B) if self.carried is None else self.carried.read(self.writer.begin(B))
        (last, rest), (y, aux) = lax.scan(one, (first, rest), steps)
        nnx.update(self.layers, rest)
        if self.carried is not None:
            self.carried.write(last)
        return at_once(y, T), jax.tree.map(lambda values: values.mean(0), aux)

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Of the layers, for one segment; the memory (1, B, slots, D), and the segment's states so far (1, B, L, D)."""
        memory = self.writer.begin(B)
        states = jnp.zeros((1, B, self.segment, memory.shape[-1]), jnp.float32)
        return {"layers": self.layers.init_cache(B, self.segment), "memory": memory[None], "states": states}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        place, memory, layers = at % self.segment, cache["memory"][0], cache["layers"]
        y, stack, _ = self.layers.run_step(x, layers["layers"], layers["below"], (context, memory), at=place)
        states = cache["states"].at[0, :, place].set(y.astype(jnp.float32))
        cache = {"layers": layers | {"layers": stack}, "memory": memory[None], "states": states}
        graph, variables = nnx.split(self)

        def full(cache):
            depth = nnx.merge(graph, variables)
            fresh = depth.layers.init_cache(len(x), self.segment)
            return cache | {"layers": fresh, "memory": depth.writer(memory, states[0].astype(x.dtype), None)[None]}

        return y, lax.cond(place == self.segment - 1, full, lambda cache: cache, cache)


class Reader(nnx.Module):
    """A block that also looks at the memory, between attention and feed-forward: a layer of (context, memory)."""

    def __init__(self, size: Size, slots: int, block: Any, *, rngs: nnx.Rngs):
        self.block = block
        self.read = Full(dataclasses.replace(size, length=slots), rngs=rngs)
        self.norm = block.placed(self.read, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        carries: dict[str, Any],
        context: tuple[Context, jax.Array],
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any], Aux]:
        of_block, memory = context
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        y, carries, aux = self.block.attend(x, carries, of_block, keys=keys[:2])
        layer_context = LayerContext(of_block.valid, key is not None)
        x = self._read(self.block.attention_norm.after(x, y, layer_context), memory, layer_context)
        if self.block.ffn is not None:
            y, more = self.block.apply_ffn(x, of_block, keys=keys[2:])
            x, aux = self.block.ffn_norm.after(x, y, layer_context), aux + more
        return x, carries, aux

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return self.block.initial_carries(B, T, S)

    def init_cache(self, B: int, length: int) -> Any:
        return self.block.init_cache(B, length)

    def step(
        self, x: jax.Array, cache: Any, carries: dict[str, Any], context: tuple[Context, jax.Array], at: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        of_block, memory = context
        y, cache, carries = self.block.step_attend(x, cache, carries, of_block, at)
        x = self._read(self.block.attention_norm.after(x, y, LayerContext())[:, None], memory, LayerContext())[:, 0]
        if self.block.ffn is not None:
            y, cache = self.block.step_ffn(x, cache, of_block, at)
            x = self.block.ffn_norm.after(x, y, LayerContext())
        return x, cache, carries

    def _read(self, x: jax.Array, memory: jax.Array, context: LayerContext) -> jax.Array:
        return self.norm.after(x, self.read(self.norm.before(x, context), memory.astype(x.dtype))[0], context)


class Writer(nnx.Module):
    """What a segment's states (B, L, D) make of the memory (B, slots, D), float32."""

    def __init__(self, size: Size, slots: int, temperature: float, *, rngs: nnx.Rngs):
        linear = lambda: Linear(size.dim, size.dim, use_bias=False, rngs=rngs)
        self.query, self.key, self.value = linear(), linear(), linear()
        self.norm = LayerNorm(size.dim, rngs=rngs)
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (slots, size.dim)), decays=False)
        self.heads, self.temperature = size.heads, temperature

    def begin(self, B: int) -> jax.Array:
        """The memory of sequences that begin, (B, slots, D)."""
        start = self.table[...]
        return jnp.broadcast_to(unit(start), (B, *start.shape))

    def __call__(self, memory: jax.Array, states: jax.Array, valid: jax.Array | None) -> jax.Array:
        heads = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        states = self.norm(states.astype(jnp.float32))
        q, k, memory_k = heads(self.query(memory)), heads(self.key(states)), heads(self.key(memory))
        self_scores = (q * memory_k).sum(-1)[..., None]  # (B, slots, N, 1)
        scores = jnp.einsum("bmnh,blnh->bmnl", q, k)
        if valid is not None:
            scores = jnp.where(valid[:, None, None], scores, MASKED)
        scores = jnp.concatenate([self_scores, scores], -1) / (q.shape[-1] ** 0.5 * self.temperature)
        share = jax.nn.softmax(scores, -1)
        new = share[..., :1] * heads(memory) + jnp.einsum("bmnl,blnh->bmnh", share[..., 1:], heads(self.value(states)))
        new = unit(new.reshape(memory.shape) + self.table[...][None])
        return new if valid is None else jnp.where(valid.any(1)[:, None, None], new, memory)


def unit(y: jax.Array) -> jax.Array:
    """Vectors (..., D) of length 1."""
    return y * lax.rsqrt((y * y).sum(-1, keepdims=True) + 1e-12)
