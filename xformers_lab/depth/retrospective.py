import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab import memory
from xformers_lab.depth import Context, Depth, MakeBlock
from xformers_lab.depth._segments import at_once, in_turn
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.size import Size


class Retrospective(Depth):
    """ERNIE-Doc: an encoder reads a text segment by segment, and then once more, knowing all of it (Ding et al., 2020,
    arXiv 2012.15688).

        source = [stop_gradient(m); h],    m' = the last M rows of [m; layer(h)]

    for every layer and segment, h (B, k, D) being the layer's input of it: enhanced recurrence, where a layer looks at
    what it gave itself of the segments before, so that what it knows reaches back to the first one. A skimming pass
    over all segments fills m; the retrospective pass goes on from there, its first segment behind the last one, and
    gives the states. Attention never sees more than k + M positions, so that its work grows linearly with T.

    What the skimming pass gave is a constant for gradients, and so is m. Padding is not remembered. Positions count
    within what a layer sees; those that are added to embeddings are of the whole text. "computation" counts each pass.
    A decoder would be told the tokens that it is asked for: it has the recurrence alone, memory=same_layer. Deviations
    from the paper: segments of one sequence, in one step of training; its pretraining task of segments in another order
    is not here.

    Options:
        segment: k, states read at a time (none: a quarter of seq_len)
        length: M, remembered states per layer (none: as many as a segment has)
        skims: passes over the text before the one that counts
    """

    def __init__(
        self,
        size: Size,
        *,
        segment: int | None = None,
        length: int | None = None,
        skims: int = 1,
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        segment = max(1, size.length // 4) if segment is None else segment
        if not 1 <= segment <= size.length:
            raise Refused(f"segment={segment} must be from 1 to seq_len={size.length}")
        length = segment if length is None else length
        if length < 1 or skims < 0:
            raise Refused(f"length={length} skims={skims}: a state to remember, and no pass or more before the last")
        self.segment, self.skims = segment, skims

        def layer(index: int, rngs: nnx.Rngs):
            block = make_block(index, rngs, length=segment + length)
            if block.causal:
                raise Refused("it reads a text twice, and a decoder would be told what it is asked: use model=encoder")
            if reason := memory.why_not(block.attention):
                raise Refused(reason)
            if block.attention.first_values is not None:
                raise Refused("value_residual mixes values of one segment, to which others are added: leave it out")
            block.memory = nnx.data(Passed(size, length))
            block.memory_choice = "depth=retrospective"
            return block

        self.layers = Fixed(size, make_block=layer, period=period, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        if context.source is not None:
            raise Refused("this depth has no place for cross-attention: use depth=fixed")
        (B, T, _), k = x.shape, self.segment
        G, valid = -(-T // k), context.valid
        if T % k and valid is None:
            valid = jnp.ones((B, T), bool)
        graph, params, passed, rest = nnx.split(self.layers, nnx.Param, State, ...)
        whole = lambda leaf: jnp.repeat(leaf, B, 1)
        segments = [in_turn(y, k, G) for y in (x, valid, context.tokens)]

        def one(state, inputs, *, params):
            passed, rest = state
            x, valid, tokens, key = inputs
            layers = nnx.merge(graph, params, passed, rest)
            here = dataclasses.replace(context, valid=valid, tokens=tokens)
            y, _, aux = layers.run(x, layers.initial_carries(B, k, k), here, key=key)
            _, _, passed, rest = nnx.split(layers, nnx.Param, State, ...)
            return (passed, rest), (y, aux)

        state = jax.tree.map(whole, passed), rest

        def through(number, state, params, segments):
            """One pass over all segments."""
            keys = None if key is None else jax.random.split(jax.random.fold_in(key, number), G)
            return lax.scan(lambda state, inputs: one(state, inputs, params=params), state, [*segments, keys])

        for number in range(self.skims):
            state, _ = through(number, state, lax.stop_gradient(params), lax.stop_gradient(segments))
        state, (y, aux) = through(self.skims, state, params, segments)
        nnx.update(self.layers, state[1])
        aux = jax.tree.map(lambda values: values.mean(0), aux)
        return at_once(y, T), aux | computation(aux.scalars["computation"] * (self.skims + 1))


class State(nnx.Variable):
    """What goes from segment to segment of one pass; as the model keeps it, of one sequence and empty."""


class Passed(memory.Memory):
    """The last states that a layer gave of what is no padding."""

    of_outputs = True

    def __init__(self, size: Size, length: int):
        self.length = length
        self.states = State(jnp.zeros((1, length, size.dim), size.dtype))
        self.valid = State(jnp.zeros((1, length), bool))

    def read(self, B: int) -> tuple[jax.Array, jax.Array]:
        states, valid = self.states[...], self.valid[...]
        whole = lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape[1:]))
        return lax.stop_gradient(whole(states)), whole(valid)

    def write(self, x: jax.Array, valid: jax.Array | None) -> None:
        states, known = self.read(len(x))
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        states = jnp.concatenate([states, x.astype(states.dtype)], 1)
        known = jnp.concatenate([known, valid], 1)
        # Padding goes to the front, so that a text that ends early leaves its last states.
        latest = jnp.argsort(known, axis=1, stable=True)[:, -self.length :]
        self.states.set_value(lax.stop_gradient(jnp.take_along_axis(states, latest[..., None], 1)))
        self.valid.set_value(jnp.take_along_axis(known, latest, 1))
