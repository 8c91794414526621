import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._segments import Carried, at_once, in_turn
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.size import Size


class RecurrentMemory(Depth):
    """Recurrent memory transformer: the layers read one segment at a time, and what one leaves to the next are a few
    memory tokens (Bulatov et al., 2022, arXiv 2207.06881).

        [_; h_g; m_(g+1)] = layers([m_g; x_g; m_g])    in a decoder
        [m_(g+1); h_g]    = layers([m_g; x_g])         in an encoder, whose memory tokens see the segment

    x_g are the L = segment states of segment g, m_g the states (tokens, D) of its memory, of which the first are
    learned. Gradients flow through all segments of a sequence, so the model learns what to write; attention never sees
    more than one segment, so that its work grows linearly with T. A segment of padding alone leaves the memory as it
    was.

    Inside a segment positions count from its first memory token: rotations and added scores are of that distance. What
    a mechanism hands to the layer above ends with the segment. "computation" counts memory tokens too. Decoding
    writes the memory whenever a segment is full.

    With carry=true, as in the paper, a text goes on over several training steps: a sequence begins with the memory that
    the one before it in the same row of the batch left, without its gradient, and with the learned one where a new text
    begins. That needs a task that gives segments which follow one another (lm).

    Options:
        segment: L, states read at a time (none: a quarter of seq_len)
        tokens: memory tokens
        carry: whether memory goes on from batch to batch
    """

    def __init__(
        self,
        size: Size,
        *,
        segment: int | None = None,
        tokens: int = 4,
        carry: bool = False,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        segment = max(1, size.length // 4) if segment is None else segment
        if not 1 <= segment <= size.length:
            raise Refused(f"segment={segment} must be from 1 to seq_len={size.length}")
        if tokens < 1:
            raise Refused(f"tokens must be at least 1, got {tokens}: without them segments know nothing of another")
        # Whether memory is written by tokens of its own shows once there is a block: rows for both are enough.
        rows = segment + 2 * tokens
        make = lambda index, rngs: make_block(index, rngs, length=rows)
        self.layers = Fixed(size, make_block=make, period=period, rngs=rngs)
        self.causal = [*self.layers.periods, *self.layers.rest][0].causal
        self.segment, self.tokens = segment, tokens
        self.table = nnx.Param(jax.random.normal(rngs.params(), (tokens, size.dim)), decays=False)
        self.carried = Carried(tokens, size.dim, size.dtype) if carry else None

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        B, T, D = x.shape
        M, L, G = self.tokens, self.segment, -(-T // self.segment)
        valid = context.valid
        if T % L and valid is None:
            valid = jnp.ones((B, T), bool)
        graph, params, rest = nnx.split(self.layers, nnx.Param, ...)

        def one(state, inputs):
            memory, rest = state
            x, valid, key = inputs
            layers = nnx.merge(graph, params, rest)
            around = [memory, x, memory] if self.causal else [memory, x]
            here = valid
            if valid is not None:
                always = jnp.ones((B, M), bool)
                here = jnp.concatenate([always, valid, always][: len(around)], 1)
            rows = jnp.concatenate(around, 1)
            where = dataclasses.replace(context, valid=here, tokens=None)
            y, _, aux = layers.run(rows, layers.initial_carries(B, *[rows.shape[1]] * 2), where, key=key)
            written = y[:, -M:] if self.causal else y[:, :M]
            memory = written if valid is None else jnp.where(valid.any(1)[:, None, None], written, memory)
            return (memory, nnx.split(layers, nnx.Param, ...)[2]), (y[:, M : M + L], aux)

        first = jnp.broadcast_to(self.table[...].astype(x.dtype), (B, M, D))
        first = first if self.carried is None else self.carried.read(first)
        keys = None if key is None else jax.random.split(key, G)
        (last, rest), (y, aux) = lax.scan(one, (first, rest), (in_turn(x, L, G), in_turn(valid, L, G), keys))
        nnx.update(self.layers, rest)
        if self.carried is not None:
            self.carried.write(last)
        aux = jax.tree.map(lambda values: values.mean(0), aux)
        spent = aux.scalars["computation"] * (L + M * (2 if self.causal else 1)) / L
        return at_once(y, T), aux | computation(spent)

    def init_cache(self, B: int, length: int) -> dict[str, Any]:
        """Of the layers, for the rows of one segment, and the memory that the segment began with (1, B, tokens, D)."""
        layers = self.layers.init_cache(B, self.segment + 2 * self.tokens)
        start = self.table[...]
        return {"layers": layers, "memory": jnp.broadcast_to(start, (1, B, *start.shape))}

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        M, place = self.tokens, at % self.segment
        context = dataclasses.replace(context, tokens=None)
        graph, variables = nnx.split(self.layers)

        def read(layers, rows, first):
            """Rows (B, M, D) one after the other, from row `first` of the segment on -> their states, the caches."""

            def one(layers, inputs):
                row, at = inputs
                y, layers = nnx.merge(graph, variables).step(row, layers, context, at=at)
                return layers, y

            layers, y = lax.scan(one, layers, (jnp.swapaxes(rows, 0, 1), first + jnp.arange(M)))
            return jnp.swapaxes(y, 0, 1), layers

        def begin(cache):
            memory = cache["memory"][0].astype(x.dtype)
            written = lambda: read(cache["layers"], memory, M + self.segment)[0]
            memory = lax.cond(at > 0, written, lambda: memory)
            fresh = nnx.merge(graph, variables).init_cache(len(x), self.segment + 2 * M)
            return {"layers": read(fresh, memory, 0)[1], "memory": memory[None].astype(cache["memory"].dtype)}

        cache = lax.cond(place == 0, begin, lambda cache: cache, cache)
        y, layers = self.layers.step(x, cache["layers"], context, at=M + place)
        return y, cache | {"layers": layers}
