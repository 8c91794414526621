from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.backward import values
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.plan import Plan
from xformers_lab.nn.size import Size

Streams = tuple[jax.Array, jax.Array]

# What a context says of rows, which the backward pass looks at again.
OF_ROWS = ("valid", "tokens", "documents", "marked")


class Reversible(Fixed):
    """Reversible layers: training keeps no activations, it computes them again from the layer's output (RevNet: Gomez
    et al., 2017, arXiv 1707.04585; Reformer: Kitaev et al., 2020, arXiv 2001.04451, section 3).

    Two streams, both the embeddings at first; F is a layer's attention and G its feed-forward, each with the normaliser
    before it, and what leaves the stack is the mean of both:

        y1 = x1 + F(x2)    y2 = x2 + G(y1)        backwards    x2 = y2 - G(y1)    x1 = y1 - F(x2)

    The parameters are those of depth=fixed, but not the function. What the gradient keeps of all layers is (B, T, D)
    twice, whatever their number, for one evaluation of every sub-layer more. The streams are float32, so that what is
    taken back is what was added up to rounding; sub-layers run in the model's dtype. The paper hands both streams to
    the head side by side; the mean leaves the head as it is.

    A normaliser that keeps statistics of gradients (powernorm) needs backward=store, and so does remat.
    A placement that normalises the sum (post, deepnorm) cannot be taken back and is refused, so are a mechanism that
    hands something to the layer above, which would have to be kept, and ffn=none, which leaves a stream as it was.

    Options:
        backward: recompute: activations from outputs; store: the same gradient by keeping them
    """

    documents_apart = True
    plain_step = False

    def __init__(
        self,
        size: Size,
        *,
        backward: Literal["recompute", "store"] = "recompute",
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        streams = lambda index, rngs: TwoStreams(size, make_block(index, rngs))
        super().__init__(size, make_block=streams, period=period, rngs=rngs)
        self.backward = backward
        if backward == "recompute" and self.plan.remat != "none":
            raise Refused(
                f"remat={self.plan.remat}: depth=reversible computes all that its layers gave again already, from the "
                "output of the last; use remat=none, or backward=store"
            )
        if backward == "recompute" and values(self):
            raise Refused(
                "a normaliser here keeps statistics of gradients, which backward=recompute does not hand on; use "
                "backward=store or another normaliser"
            )

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        wide = x.astype(jnp.float32)
        if self.backward == "store":
            (x1, x2), _, aux = self.run((wide, wide), {}, context, key=key)
        else:
            first, second = (None, None) if key is None else jax.random.split(key)
            streams, aux = recomputed(list(self.periods), (wide, wide), context, key=first, plan=self.plan)
            (x1, x2), more = recomputed(list(self.rest), streams, context, key=second, plan=self.plan)
            aux = aux + more
        return ((x1 + x2) / 2).astype(x.dtype), aux

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        wide = x.astype(jnp.float32)
        (x1, x2), layers, _ = self.run_step((wide, wide), cache["layers"], cache["below"], context, at=at)
        return ((x1 + x2) / 2).astype(x.dtype), cache | {"layers": layers}


class TwoStreams(nnx.Module):
    """A block whose sub-layers read one stream and add to the other; x is a pair of them."""

    def __init__(self, size: Size, block: Any):
        if block.ffn is None:
            raise Refused("two streams take turns between attention and feed-forward layers; ffn=none has none")
        for norm in (block.attention_norm, block.ffn_norm):
            if not norm.adds:
                raise Refused(
                    f"norm={type(norm).__name__.lower()} normalises the sum of a layer and its input, which cannot be "
                    "taken back; use norm=pre, sandwich or rezero"
                )
        if jax.eval_shape(lambda: block.initial_carries(1, size.length, size.length)):
            raise Refused(
                f"attention={block.name} hands something to the layer above, which a reversible stack would have to "
                "keep; use another attention"
            )
        self.block, self.dtype = block, size.dtype

    def attend(self, x: jax.Array, context: Context, keys: Sequence[jax.Array | None]) -> tuple[jax.Array, Aux]:
        """F of a stream (B, T, D), and aux."""
        y, _, aux = self.block.attend(x.astype(self.dtype), {}, context, keys=keys[:2])
        layer_context = LayerContext(context.valid, keys[0] is not None)
        return self.block.attention_norm.branch(y, layer_context).astype(jnp.float32), aux

    def apply_ffn(self, x: jax.Array, context: Context, keys: Sequence[jax.Array | None]) -> tuple[jax.Array, Aux]:
        """G of a stream (B, T, D), and aux."""
        y, aux = self.block.apply_ffn(x.astype(self.dtype), context, keys=keys[2:])
        layer_context = LayerContext(context.valid, keys[0] is not None)
        return self.block.ffn_norm.branch(y, layer_context).astype(jnp.float32), aux

    def __call__(
        self, x: Streams, carries: dict[str, Any], context: Context, *, key: jax.Array | None = None
    ) -> tuple[Streams, dict[str, Any], Aux]:
        (x1, x2), keys = x, _four(key)
        y, aux = self.attend(x2, context, keys)
        y1 = x1 + y
        y, more = self.apply_ffn(y1, context, keys)
        return (y1, x2 + y), carries, aux + more

    def initial_carries(self, B: int, T: int, S: int) -> dict[str, Any]:
        return {}

    def init_cache(self, B: int, length: int) -> Any:
        return self.block.init_cache(B, length)

    def step(
        self, x: Streams, cache: Any, carries: dict[str, Any], context: Context, at: jax.Array
    ) -> tuple[Streams, Any, dict[str, Any]]:
        x1, x2 = x
        y, cache, carries = self.block.step_attend(x2.astype(self.dtype), cache, carries, context, at)
        y1 = x1 + self.block.attention_norm.branch(y, LayerContext()).astype(jnp.float32)
        y, cache = self.block.step_ffn(y1.astype(self.dtype), cache, context, at)
        return (y1, x2 + self.block.ffn_norm.branch(y, LayerContext()).astype(jnp.float32)), cache, carries


def recomputed(
    blocks: list, streams: Streams, context: Context, *, key: jax.Array | None, plan: Plan
) -> tuple[Streams, Aux]:
    """`run_stack` on stacked modules of TwoStreams, whose gradient keeps the last streams alone -> streams, aux."""
    if not blocks:
        return streams, Aux()
    split = [nnx.split(block, nnx.Param, ...) for block in blocks]
    graphs = [graph for graph, _, _ in split]
    params, rest = [params for _, params, _ in split], [rest for _, _, rest in split]
    position_graph, of_position, position_rest = nnx.split(context.position, nnx.Param, ...)
    length = jax.tree.leaves(params)[0].shape[0]
    keys = None if key is None else jax.random.split(key, (length, len(blocks)))
    again = plan.unroll(length, len(blocks))

    def built(of_position, fixed):
        position = nnx.merge(position_graph, of_position, fixed["position"])
        return Context(position, **{name: fixed[name] for name in OF_ROWS})

    @jax.custom_vjp
    def run(params, of_position, fixed, streams):
        def period(streams, layer):
            params, rest, keys = layer
            where, total, changed = built(of_position, fixed), Aux(), []
            for place, graph in enumerate(graphs):
                block = nnx.merge(graph, params[place], rest[place])
                streams, _, aux = block(streams, {}, where, key=None if keys is None else keys[place])
                total = total + (computation(1) | aux)
                changed.append(nnx.split(block, nnx.Param, ...)[2])
            return streams, (total, changed)

        streams, (aux, changed) = lax.scan(period, streams, (params, fixed["rest"], fixed["keys"]), unroll=again)
        return streams, jax.tree.map(lambda values: jnp.sum(values, 0), aux), changed

    def forward(params, of_position, fixed, streams):
        out = run(params, of_position, fixed, streams)
        return out, (params, of_position, fixed, out[0])

    def backward(saved, grads):
        params, of_position, fixed, streams = saved
        of_streams, of_aux, _ = grads

        def branch(name, place, params, of_position, rest, x, keys):
            """One sub-layer of an input, as a function of what learns."""
            # Copies, for what a layer writes to belongs to the trace that differentiates it; the forward kept it.
            block = nnx.merge(graphs[place], params, jax.tree.map(lambda leaf: leaf, rest))
            return getattr(block, name)(x, built(of_position, fixed), keys)

        def pulled(name, place, params, rest, x, keys, grad, to_position):
            """What a sub-layer adds for x, and the gradients of parameters, position and x."""
            call = lambda params, of_position, x: branch(name, place, params, of_position, rest, x, keys)
            (y, aux), back = jax.vjp(call, params, of_position, x)
            of_params, more, of_x = back((grad, of_aux.among(aux)))
            return y, of_params, jax.tree.map(jnp.add, to_position, more), of_x

        def period(state, layer):
            (y1, y2), (d1, d2), to_position = state
            params, rest, keys = layer
            of_blocks = []
            for place in reversed(range(len(graphs))):
                four = _four(None if keys is None else keys[place])
                here = (place, params[place], rest[place])
                y, fed, to_position, more = pulled("apply_ffn", *here, y1, four, d2, to_position)
                y2, d1 = y2 - y, d1 + more
                y, attended, to_position, more = pulled("attend", *here, y2, four, d1, to_position)
                y1, d2 = y1 - y, d2 + more
                of_blocks.insert(0, jax.tree.map(jnp.add, fed, attended))
            return ((y1, y2), (d1, d2), to_position), of_blocks

        start = (streams, of_streams, jax.tree.map(jnp.zeros_like, of_position))
        layers = (params, fixed["rest"], fixed["keys"])
        (_, of_streams, to_position), of_params = lax.scan(period, start, layers, reverse=True, unroll=again)
        return of_params, to_position, None, of_streams

    run.defvjp(forward, backward)
    fixed = {"rest": rest, "position": position_rest, "keys": keys}
    fixed |= {name: getattr(context, name) for name in OF_ROWS}
    streams, aux, changed = run(params, of_position, fixed, streams)
    for block, variables in zip(blocks, changed, strict=True):
        nnx.update(block, variables)
    return streams, aux


def _four(key):
    """The keys of a block: attention's, its dropout's, the feed-forward layer's, its dropout's."""
    return [None] * 4 if key is None else list(jax.random.split(key, 4))
