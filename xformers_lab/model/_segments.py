"""Decoding with a memory: a layer decodes a segment behind what it remembers, and remembers it when it is full.

A segment has as many tokens as training gives one. In front of its keys and values the cache holds those of the
memory's rows; when its last token came, the memory is written as between two segments of training, and a new cache
begins with the new rows. So what is decoded is what the model says of the text segment by segment, however long it is.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.memory import Memory, Remembered
from xformers_lab.nn.layer_context import LayerContext


def init_cache(block, B: int) -> dict:
    """The cache of the first segment of B sequences: own, that of attention; first, the position of the segment's first
    token in it; inputs (B, T, D), what the layer read of the segment, or gave where the memory is of that; and memory,
    the variables of an empty one."""
    memory, T = block.memory, block.length
    own, first = block.begun(B, memory.length + T, jnp.full((), memory.length, jnp.int32))
    remembered = nnx.to_pure_dict(nnx.state(memory, Remembered))
    empty = jax.tree.map(lambda leaf: jnp.zeros((B, *leaf.shape[1:]), leaf.dtype), remembered)
    inputs = jnp.zeros((B, T, block.dim), block.dtype)
    return {"own": own, "first": first, "inputs": inputs, "memory": empty}


def step(block, x, y, cache: dict, position, at):
    """`decode` of the layer's attention for one token x (B, D), y of it normalised, at `at` () of the whole text."""
    y, own, _ = block.attention.decode(y, cache["own"], at=cache["first"] + at % block.length, position=position)
    cache = cache | {"own": own}
    return y, cache if block.memory.of_outputs else kept(block, x, cache, position, at)


def kept(block, x, cache: dict, position, at) -> dict:
    """The cache with what the memory is given of one token x (B, D), at `at` () of the whole text."""
    place = at % block.length
    cache = cache | {"inputs": cache["inputs"].at[:, place].set(x)}
    full = lambda: _next(block, cache, position)
    return lax.cond(place == block.length - 1, full, lambda: cache)


def _next(block, cache: dict, position) -> dict:
    """The cache of the segment after a full one."""
    graph, _, fixed = nnx.split(block.memory, Remembered, ...)
    memory: Memory = nnx.merge(graph, cache["memory"], fixed)
    memory.write(cache["inputs"], None)
    B = len(cache["inputs"])
    states, known = memory.read(B)
    # All sequences are as long, and what a memory does not know yet is the oldest of it.
    empty = memory.length - known[0].sum(dtype=jnp.int32)
    own, first = block.begun(B, memory.length + block.length, empty)
    rows = block.attention_norm.before(states, LayerContext(known))

    def one(own, state):
        row, index = state
        at = first + index - empty
        read = lambda: block.attention.decode(row, own, at=at, position=position)[1]
        return lax.cond(index >= empty, read, lambda: own), None

    own, _ = lax.scan(one, own, (jnp.swapaxes(rows, 0, 1), jnp.arange(memory.length)))
    remembered = nnx.to_pure_dict(nnx.state(memory, Remembered))
    first = first + memory.length - empty
    return cache | {"own": own, "first": first, "memory": remembered}
