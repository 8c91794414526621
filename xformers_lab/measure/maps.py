"""Attention maps: how much each head of each layer takes of each position, of one example.

One way for every mechanism: where what a head adds up is linear in its values and weights all channels alike, its
weights can be read off by values that are 1 in one channel at one position, as many positions at once as a head has
channels. For softmax attention these are the weights of its scores; for linear attention and recurrences, which have no
scores, the effective weights. What stands before and behind the mean, a nonlinearity of each value, a norm, a gate, a
mechanism says itself: `summed` and `finished` of its class; and `own_values`, where heads also add up values that are
of no position, so that something is there without values too. That it is so is checked on the values themselves: the
weights have to give what the heads gave. A mechanism of another kind says why there is no map, refuses = {"map":
reason}.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Attention
from xformers_lab.attention._base.call import Call, watched
from xformers_lab.attention._base.samples import apart
from xformers_lab.errors import Refused
from xformers_lab.model import Model
from xformers_lab.nn.absent import Same

# Of mechanisms of these kinds no softmax over scores of single positions gives the weights.
IMPLIED = ("linearised", "memory compression", "low rank", "without attention")
CLOSE = 1e-3  # what weights may miss of the output, in units of its largest number
WHOLE = 255  # a weight of 1 in a record
AT_ONCE = 2**25  # scores of all heads that are computed side by side


@dataclasses.dataclass(frozen=True)
class Map:
    """One layer's weights (N, T, S) float32, and whether they are implied: the mechanism has no scores.

    norms (N, T) float32: the length of what each head adds to the layer's output at each query; None where the layer
    does not add up what heads give. causal: whether no query sees a key behind it; crosses: whether queries come from
    other states than keys.
    """

    weights: np.ndarray
    implied: bool
    norms: np.ndarray | None = None
    causal: bool = False
    crosses: bool = False


def of_model(
    model: Model,
    inputs: np.ndarray,
    valid: np.ndarray | None = None,
    documents: np.ndarray | None = None,
    marked: np.ndarray | None = None,
) -> list[Map]:
    """A map for each layer in the order in which they run, of one example (1, T), valid (1, T) bool or None, of packed
    data documents (1, T) int32, and marked (1, T) bool of a task that marks positions.

    Raises Refused where a layer gives no weighted mean of its values, or has no values.
    """
    graph, variables = nnx.split(model)
    try:
        besides = model.given({"documents": documents, "marked": marked})
        told = jax.tree.map(jnp.asarray, {"inputs": inputs, "valid": valid} | besides)
        found = _of_model(graph, variables, told)
    except jax.errors.UnexpectedTracerError:
        raise Refused("the layers of this model run within a loop of its depth, so there is no map") from None
    if not found:
        for _, layer in nnx.iter_modules(model):
            _refuse_declared(layer)
        name = type(model).__name__.lower()
        raise Refused(f"no layer of this model ({name}) gives a mean of values, so there is no map")
    return [_checked(*each) for each in jax.device_get(found)]


def of_call(layer: Any, call: Call) -> Map:
    """The map of one layer on a call of one sample; raises Refused."""
    graph, variables = nnx.split(layer)
    names = ("q", "k", "v", "x", "x_q", "valid", "bias", "carry", "documents", "marked")
    arrays = {name: value for name in names if (value := getattr(call, name)) is not None}
    found = jax.jit(lambda variables, arrays: _read_off(nnx.merge(graph, variables), call.replace(**arrays)))
    return _checked(*jax.device_get(found(variables, arrays)))


def _checked(
    weights: np.ndarray, implied: np.ndarray, missed: np.ndarray, norms: np.ndarray | None, causal: Any, crosses: Any
) -> Map:
    if not missed <= CLOSE:
        raise Refused(
            "a layer gives no weighted mean of its values, for there is a gate, a norm or a choice by them that its "
            "class does not tell apart from the mean (`summed`, `finished`): no map"
        )
    norms = None if norms is None else np.asarray(norms, np.float32)
    return Map(np.asarray(weights, np.float32), bool(implied), norms, bool(causal), bool(crosses))


@functools.partial(jax.jit, static_argnums=0)
def _of_model(graph: nnx.GraphDef, variables: Any, given: dict[str, jax.Array]) -> list[tuple]:
    found = []
    with watched(lambda layer, call: found.append(_read_off(layer, call))):
        nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))(**given)
    return found


def _read_off(layer: Any, call: Call) -> tuple:
    """What `_checked` makes a `Map` of; missed: how much the weights (N, T, S) miss of what the layer gives."""
    _refuse_declared(layer)
    name, crosses = type(layer).__name__.lower(), call.x_q is not None and call.x_q is not call.x
    if call.v.ndim != 4 or call.v.shape[0] != 1:
        raise Refused(f"{name} has no values of single positions: no map")
    call = _in_float32(call)
    real = layer.values_of(call)
    _, S, M, H = real.shape
    graph, variables = nnx.split(layer)
    compared = bool(jax.tree.leaves(call.bias)) and _of_samples(call, layer)

    def given(one):
        # Not shown to who watches: these calls are no layers.
        own = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))
        return (apart(own, one) if compared else own.attend_heads(one))[0].astype(jnp.float32)

    out = given(call)[0]
    if out.shape[-1] != H:
        raise Refused(f"{name} gives {out.shape[-1]} channels of values of {H}: no map")
    count = -(-S // H)
    at = jnp.arange(count * H).reshape(count, H)
    basis = (at[:, None, :] == jnp.arange(S)[None, :, None]).astype(real.dtype)  # (chunks, S, H)
    values = jnp.broadcast_to(basis[:, None, :, None], (count, 1, S, M, H))
    values = jnp.concatenate([values, jnp.zeros_like(real)[None]])
    together = max(1, AT_ONCE // (call.q.shape[2] * call.q.shape[1] * S))
    mean = lambda values: given(layer.with_values(call, values))
    means = jax.vmap(mean)(values) if together > count else jax.lax.map(mean, values, batch_size=together)
    T, N = means.shape[2:4]
    constant = layer.own_values or call.pair_values is not None
    rest = means[-1, 0] if constant else jnp.zeros_like(means[-1, 0])  # what is there without values
    weights = (means[:-1, 0] - rest).transpose(2, 1, 0, 3).reshape(N, T, count * H)[..., :S]
    again = jnp.einsum("nts,snh->tnh", weights, jnp.repeat(real[0], N // M, 1)) + rest
    again = layer.finish(again[None], call)[0]
    missed = jnp.abs(again - out).max() / jnp.maximum(jnp.abs(out).max(), 1e-6)
    return weights, type(layer).kind in IMPLIED, missed, _norms(layer, out), call.causal, crosses


def _refuse_declared(layer: Any) -> None:
    if isinstance(layer, Attention) and (reason := layer.refusals().get("map")):
        raise Refused(f"{type(layer).__name__.lower()} has no map: {reason}")


def _norms(layer: Any, given: jax.Array) -> jax.Array | None:
    """(N, T), the length of what each head adds to the layer's output: what it gives (T, N, H), through the projection
    `out` of all heads."""
    if not hasattr(layer, "out") or isinstance(layer.out, Same):
        return None
    T, N, H = given.shape
    alone = jnp.swapaxes(given[:, :, None] * jnp.eye(N)[None, :, :, None], 0, 1).reshape(N, T, N * H)
    return jnp.linalg.norm(layer.out(alone) - layer.out(jnp.zeros_like(alone)), axis=-1)


def _in_float32(call: Call) -> Call:
    """The call with all its numbers in float32: weights rounded to bfloat16 would miss what the layer gives."""
    wide = lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    names = ("q", "k", "v", "x", "x_q", "carry")
    return call.replace(**{name: jax.tree.map(wide, getattr(call, name)) for name in names})


def drawn(maps: list[Map], tokens: list[str]) -> dict:
    """Maps of one length as a record has them: whole numbers, WHOLE for a weight of 1, or for the largest where one is
    above; of a weight below 0 its size."""
    sizes = [np.abs(each.weights) for each in maps]
    most = max(1.0, *(float(each.max()) for each in sizes))
    layers = [np.rint(WHOLE / most * each).astype(int).tolist() for each in sizes]
    return {"tokens": tokens, "queries": len(tokens), "layers": layers, "implied": any(each.implied for each in maps)}


def _of_samples(call: Call, layer: Any) -> bool:
    """Whether the bias is one of every sample: its leaves then begin with B = 1 and N, not with N."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(call.bias)]
    return all(shape[:2] == (1, layer.size.heads) for shape in shapes)
