"""What a function computes, counted in its jaxpr: exact where XLA's `cost_analysis` counts the body of a loop once.

Nothing runs and nothing is compiled, so a length that would not fit into memory can be counted. What a compiler may
remove later (a value nobody reads) is still counted.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn

from xformers_lab.nn import counted_blocks, counted_trips

# Primitives that compute products without a jaxpr inside: counting them as nothing would be a lie.
OPAQUE = ("dot_product_attention", "ffi_call", "ragged_dot")


def count_flops(fn: Callable, *args: Any) -> int:
    """Matmul FLOPs of one call of `fn`: 2 M N K for each product and convolution, times the lengths of its loops.

    args are arrays, ShapeDtypeStructs, or pytrees of them. A `cond` counts as its dearest branch. A shard_map counts
    the work of all its devices; a Pallas kernel what of its grid it says it computes (`nn/counted_blocks.py`), or its
    cost estimate, else all of its grid. Only products count: a softmax or a triangular solve is 0. A `while_loop`,
    whose trip count the jaxpr does not hold, counts as often as is said that it runs on average
    (`nn/counted_trips.py`); a `fori_loop` with static bounds is a scan. Raises ValueError at a product inside one of
    which nothing is said, and at a kernel whose inside it cannot see (cuDNN's attention, a foreign function).
    """
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr, None, None)


def flops_by_scope(fn: Callable, *args: Any, scopes: Iterable[str]) -> dict[str, int]:
    """`count_flops` of what runs under each `jax.named_scope`, with what differentiation made of it, and of the rest,
    under "rest"."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    parts = {scope: _flops(jaxpr, scope, None) for scope in scopes}
    return parts | {"rest": _flops(jaxpr, None, None) - sum(parts.values())}


def largest_intermediate(fn: Callable, *args: Any) -> int:
    """Elements of the largest array that `fn` makes anywhere, in loops and branches too; its inputs do not count.

    A T x S array is seen even where XLA would fuse it away; the stacked outputs of a loop count at their stacked size.
    A scalar that is broadcast does not count, for it is never stored.
    """
    return _largest(jax.make_jaxpr(fn)(*args).jaxpr)


def _flops(jaxpr: Jaxpr, scope: str | None, live: int | None) -> int:
    """live: how many blocks kernels in here say that they compute."""
    return sum(_flops_of(eqn, scope, live) for eqn in jaxpr.eqns)


def _flops_of(eqn: JaxprEqn, scope: str | None, live: int | None) -> int:
    name, scopes = eqn.primitive.name, str(eqn.source_info.name_stack)
    # A scope reads transpose(jvp(attention)) in a backward pass; jaxprs inside do not repeat that of their equation.
    if scope is not None and scope in re.split("[/()]", scopes):
        scope = None
    live = counted_blocks.said(scopes) or live
    if scope is not None and not any(_inside(eqn)):
        return 0
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = _shape(eqn.invars[0])
        return 2 * _elements(eqn.outvars[0]) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # Each output sums over the kernel's window and the input features of its group; batch groups split neither.
        _, inputs, *window = eqn.params["dimension_numbers"].rhs_spec
        kernel = _shape(eqn.invars[1])
        return 2 * _elements(eqn.outvars[0]) * kernel[inputs] * math.prod(kernel[axis] for axis in window)
    if name.startswith(OPAQUE):
        raise ValueError(f"cannot count FLOPs: the kernel {name} is opaque")
    if name == "pallas_call" and live is None and (cost := eqn.params.get("cost_estimate")) is not None:
        return cost.flops if scope is None else 0  # of one whose loops go by lists of its own
    inside = [_flops(jaxpr, scope, live) for jaxpr in _inside(eqn)]
    if name == "cond":
        return max(inside)
    if name == "while" and any(inside):
        if (trips := counted_trips.said(scopes)) is not None:
            return trips * sum(inside)
        body = eqn.params["body_jaxpr"].jaxpr.debug_info.func_src_info
        raise ValueError(f"cannot count FLOPs: while_loop over {body} has products and no known trip count (use scan)")
    return _times(eqn, live) * sum(inside)


def _largest(jaxpr: Jaxpr) -> int:
    largest = 0
    for eqn in jaxpr.eqns:
        scalar = eqn.primitive.name == "broadcast_in_dim" and _elements(eqn.invars[0]) == 1
        made = [] if scalar else [_elements(out) for out in eqn.outvars]
        largest = max([largest, *made, *map(_largest, _inside(eqn))])
    return largest


def _times(eqn: JaxprEqn, live: int | None) -> int:
    """How often the jaxprs inside an equation run."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) if live is None else live
    return 1


def _inside(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs that an equation runs: bodies of loops, branches, calls; a custom_vjp holds its forward rule."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)  # JAX 0.10 has closed ones too
            if isinstance(inner, Jaxpr):
                yield inner


def _shape(atom) -> tuple[int, ...]:
    """The shape of a value; a token or a key's bookkeeping has none and counts as a scalar."""
    return getattr(atom.aval, "shape", ())


def _elements(atom) -> int:
    return math.prod(_shape(atom))
