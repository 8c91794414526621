"""Layers as one stacked pytree: built by vmap, run by scan, so that compile time does not grow with depth."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import one_by_one
from xformers_lab.attention._base.call import watching
from xformers_lab.depth import Context, MakeBlock
from xformers_lab.errors import Refused
from xformers_lab.nn import layer_number, layer_watch, on_mesh
from xformers_lab.nn.aux_results import Aux, computation
from xformers_lab.nn.parameters import layer_axes
from xformers_lab.nn.plan import Plan
from xformers_lab.nn.remat import rematerialised


def build_stack(make_block: MakeBlock, indices: list[int], rngs: nnx.Rngs) -> Any:
    """One module whose variables have a leading axis of len(indices); block i is made with its own random stream.

    Each variable keeps in its metadata how many of its leading axes count layers; `layer_axes` reads it.
    """

    @nnx.split_rngs(splits=len(indices))
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs):
        return make_block(indices[0], rngs)

    stacked = make(rngs)
    for _, variable in nnx.iter_graph(stacked):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(layer_axes=layer_axes(variable) + 1)
    layer_number.moved(stacked, [index - indices[0] for index in indices])
    return stacked


def initial_carries(blocks: Sequence[Any], B: int, T: int, S: int) -> dict[str, Any]:
    """What the mechanisms of a stack get below their first layer, for T queries and S keys."""
    carries = {}
    for block in blocks:
        carries |= first(block).initial_carries(B, T, S)
    return carries


def init_caches(blocks: Sequence[Any], B: int, length: int, *, written_out: bool = False) -> list:
    """What decoding remembers, for each place in the period one tree with a leading axis of layers, or where the layers
    of a step are written out a list of one tree for each layer, which a step then changes in place."""
    caches = []
    for block in blocks:
        layers, one = depth_of(block), first(block).init_cache(B, length)
        wide = lambda leaf, layers=layers: jnp.broadcast_to(leaf, (layers, *leaf.shape))
        caches.append([one] * layers if written_out else jax.tree.map(wide, one))
    return caches


def depth_of(block: Any) -> int:
    """How many layers a stacked module has."""
    return jax.tree.leaves(nnx.state(block))[0].shape[0]


def first(block: Any) -> Any:
    """The first layer of a stacked module."""
    graph, variables = nnx.split(block)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], variables))


def step_stack(
    blocks: Sequence[Any], x: Any, caches: list, carries: dict[str, Any], context: Any, at: jax.Array
) -> tuple[Any, list, dict[str, Any]]:
    """One token (B, D) at position `at` () through the layers of `run_stack` -> (B, D), the new caches, the carries."""
    if not blocks:
        return x, caches, carries
    split = [nnx.split(block) for block in blocks]

    def period(state, layer):
        x, carries = state
        variables, caches = layer
        changed = []
        for (graph, _), variable, cache in zip(split, variables, caches, strict=True):
            x, cache, carries = nnx.merge(graph, variable).step(x, cache, carries, context, at)
            changed.append(cache)
        return (x, carries), changed

    (x, carries), caches = _layer_by_layer(period, (x, carries), [variables for _, variables in split], caches)
    return x, caches, carries


def _layer_by_layer(period: Callable, state: Any, variables: list, caches: list) -> tuple[Any, list]:
    """`period(state, (variables, caches)) -> state, caches` along the layers of `init_caches`."""
    if not isinstance(caches[0], list):
        return jax.lax.scan(period, state, (variables, caches))
    after = []
    for number, of_layer in enumerate(zip(*caches, strict=True)):
        own = jax.tree.map(lambda leaf, number=number: leaf[number], variables)
        state, changed = period(state, (own, of_layer))
        after.append(changed)
    return state, [list(layers) for layers in zip(*after, strict=True)]


def several_stack(
    blocks: Sequence[Any], x: jax.Array, caches: list, context: Context, at: jax.Array
) -> tuple[jax.Array, list]:
    """T tokens (B, T, D), from position `at` () on, through layers that carry nothing: layer after layer, each of them
    with `step_several` where it has it, else `step` -> (B, T, D) and the new caches."""
    if not blocks:
        return x, caches
    split = [nnx.split(block) for block in blocks]

    def period(x, layer):
        variables, caches = layer
        changed = []
        for (graph, _), variable, cache in zip(split, variables, caches, strict=True):
            block = nnx.merge(graph, variable)
            x, cache = (
                block.step_several(x, cache, context, at)
                if hasattr(block, "step_several")
                else in_turn(block, x, cache, context, at)
            )
            changed.append(cache)
        return x, changed

    return _layer_by_layer(period, x, [variables for _, variables in split], caches)


def rounds(blocks: Sequence[Any], first: int, last: int | None = None) -> list[Any]:
    """Stacked modules of the rounds from `first` to `last` alone."""
    parts = []
    for block in blocks:
        graph, variables = nnx.split(block)
        parts.append(nnx.merge(graph, jax.tree.map(lambda leaf: leaf[first:last], variables)))
    return parts


def caches_of(caches: list, first: int, last: int | None = None) -> list:
    """Those of `init_caches` for the rounds from `first` to `last` alone."""
    of_rounds = lambda cache: jax.tree.map(lambda leaf: leaf[first:last], cache)
    return [cache[first:last] if isinstance(cache, list) else of_rounds(cache) for cache in caches]


def caches_with(caches: list, part: list, first: int) -> list:
    """The caches with those of the rounds from `first` on in their place."""
    into = lambda whole, some: jax.lax.dynamic_update_slice_in_dim(whole, some, first, 0)
    return [
        [*whole[:first], *some, *whole[first + len(some) :]]
        if isinstance(whole, list)
        else jax.tree.map(into, whole, some)
        for whole, some in zip(caches, part, strict=True)
    ]


def rewound(blocks: Sequence[Any], before: list, after: list, taken: jax.Array, *, read: int) -> list:
    """The caches behind the first `taken` () of the `read` tokens that made `after` of `before`; raises Refused where a
    block cannot go back."""
    caches = []
    for block, old, new in zip(blocks, before, after, strict=True):
        one = first(block)
        if not hasattr(one, "rewound"):
            raise Refused(f"{type(one).__name__.lower()} layers cannot go back behind tokens that were not accepted")
        back = lambda old, new, one=one: one.rewound(old, new, taken, read=read)
        caches.append([*map(back, old, new)] if isinstance(old, list) else jax.vmap(back)(old, new))
    return caches


def in_turn(block: Any, x: jax.Array, cache: Any, context: Context, at: jax.Array) -> tuple[jax.Array, Any]:
    """`block.step` of T tokens (B, T, D), which carry nothing -> (B, T, D), the new cache."""

    def one(cache, inputs, at):
        x, tokens = inputs
        return block.step(x, cache, {}, dataclasses.replace(context, tokens=tokens), at)[:2]

    return one_by_one(one, (x, context.tokens), cache, at)


def shared(aux: Aux, times: int) -> Aux:
    """What layers give whose rows are so many times fewer than the tokens: what they cost is shared by as many."""
    return aux | computation(aux.scalars["computation"] / times)


def run_stack(
    blocks: Sequence[Any], x: Any, carries: dict[str, Any], context: Any, *, key: jax.Array | None, plan: Plan
) -> tuple[Any, dict[str, Any], Aux]:
    """`run_watched`, without the states between -> x, carries, summed aux."""
    x, carries, aux, _ = run_watched(blocks, x, carries, context, key=key, plan=plan, watch=lambda x: None)
    return x, carries, aux


def run_watched(
    blocks: Sequence[Any],
    x: Any,
    carries: dict[str, Any],
    context: Any,
    *,
    key: jax.Array | None,
    plan: Plan,
    watch: Callable[[Any], Any] = lambda x: x,
) -> tuple[Any, dict[str, Any], Aux, Any]:
    """Run period after period: `blocks` holds one stacked module per place in the period, all of equal length. x and
    context are what the blocks take as them, (B, T, D) and a `Context` unless a depth has blocks of its own.

    Writes changed non-parameter variables back into the stacked modules. -> x, carries, summed aux with the
    "computation" that the blocks say or else 1 for each, and `watch(x)` of the state above every period, stacked.
    """
    if not blocks:
        return x, carries, Aux(), None
    split = [nnx.split(block, nnx.Param, ...) for block in blocks]
    graphs = [graph for graph, _, _ in split]
    length = jax.tree.leaves(split[0][1])[0].shape[0]
    keys = None if key is None else jax.random.split(key, (length, len(blocks)))
    unroll = plan.unroll(length, len(blocks))

    def period(state, layer):
        x, carries = state
        variables, keys = layer
        total, changed = Aux(), []
        for place, (graph, (params, rest)) in enumerate(zip(graphs, variables, strict=True)):
            of_layer = {"key": None if keys is None else keys[place], "plan": plan, "looped": unroll < length}
            of_layer["shown_to"] = layer_watch.watching()
            x, carries, aux, rest = run_layer(graph, params, rest, x, carries, context, **of_layer)
            total = total + aux
            changed.append(rest)
        return (x, carries), (total, changed, watch(x))

    variables = [(params, rest) for _, params, rest in split]
    scan = functools.partial(jax.lax.scan, unroll=unroll)
    scan = _written_out if _looked_at() else scan
    (x, carries), (aux, changed, watched) = scan(period, (x, carries), (variables, keys))
    for block, rest in zip(blocks, changed, strict=True):
        nnx.update(block, rest)
    return x, carries, jax.tree.map(lambda values: jnp.sum(values, 0), aux), watched


def run_layer(
    graph: nnx.GraphDef,
    params: Any,
    rest: Any,
    x: Any,
    carries: dict[str, Any],
    context: Any,
    *,
    key: jax.Array | None,
    plan: Plan,
    looped: bool,
    shown_to: layer_watch.LayerWatch | None = None,
) -> tuple[Any, dict[str, Any], Aux, Any]:
    """One layer, which `nnx.split(block, nnx.Param, ...)` gave the parts of, on what its block takes -> x, carries, aux
    with the "computation" that it says or else 1, and its other variables as it left them. What it computes again in
    the backward pass the plan says; looped: whether a loop of the program runs it; shown_to: who looks at it, which
    nobody can where one does."""

    def run(params, rest, x, carries, key):
        block = nnx.merge(graph, params, rest)
        if shown_to is not None:
            shown_to.enter(block)
        x, carries, aux = block(x, carries, context, key=key)
        x = x if shown_to is None else shown_to.leave(x)
        return x, carries, computation(1) | aux, nnx.split(block, nnx.Param, ...)[2]

    # What is within cannot be taken out by whoever looks at it.
    run = run if _looked_at() else rematerialised(run, plan.remat, looped=looped)
    x, carries, aux, rest = run(params, rest, x, carries, key)
    return on_mesh.states(x), carries, aux, rest


def _looked_at() -> bool:
    """Whether somebody looks at the layers, or at their attention, as they run."""
    return watching() or layer_watch.watching() is not None


def _written_out(body: Callable, state: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` as a loop in Python."""
    results = []
    for number in range(len(jax.tree.leaves(xs)[0])):
        state, result = body(state, jax.tree.map(lambda leaf, number=number: leaf[number], xs))
        results.append(result)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
