"""What a forward pass keeps for the backward pass, in bytes, by the scope that made it: read from the jaxpr.

Nothing runs and nothing is compiled. It is what differentiation asks to be kept: a compiler may keep less, where it
computes something again or needs no copy of it, and it needs other buffers besides. So a figure is no part of the
temporary bytes that XLA plans, which tells sums alone; shares of it say whose arrays wait for the backward pass.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var


def kept_by_scope(fn: Callable, x: Any, *args: Any, scopes: Iterable[str]) -> dict[str, int]:
    """Bytes kept of fn(x, *args), a scalar that is differentiated by x, that were made under each `jax.named_scope`,
    and of the rest, under "rest". x and args, which are there anyway, do not count.

    args are arrays, ShapeDtypeStructs, or pytrees of them.
    """
    jaxpr = jax.make_jaxpr(lambda x, *args: jax.tree.leaves(jax.vjp(lambda x: fn(x, *args), x)[1]))(x, *args).jaxpr
    parts = dict.fromkeys([*scopes, "rest"], 0)
    seen = set()
    for var in jaxpr.outvars:
        if isinstance(var, Literal) or (origin := _origin(jaxpr, var, set(parts))) is None:
            continue
        source, scope = origin
        if source not in seen:  # a loop may give the same array twice
            seen.add(source)
            parts[scope] += _bytes(var)
    return parts


def _origin(jaxpr: Jaxpr, var: Any, scopes: set[str]) -> tuple[Var, str] | None:
    """Which variable of the innermost jaxpr holds what an output is made of, and the scope that made it; None of an
    input."""
    made = next((eqn for eqn in jaxpr.eqns if var in eqn.outvars), None)
    if made is None:
        return None
    named = set(re.split("[/()]", str(made.source_info.name_stack))) & scopes
    place, inside = made.outvars.index(var), _body(made)
    if inside is not None and place < len(inside.outvars) and not isinstance(inside.outvars[place], Literal):
        inner = inside.outvars[place]
        if (origin := _origin(inside, inner, scopes)) is not None:
            return origin[0], min(named, default=origin[1])
        if made.primitive.name != "scan" and inner in inside.invars and len(inside.invars) == len(made.invars):
            outer = made.invars[inside.invars.index(inner)]  # a call that hands an input through
            return None if isinstance(outer, Literal) else _origin(jaxpr, outer, scopes)
        return inner if isinstance(inner, Var) and made.primitive.name == "scan" else var, min(named, default="rest")
    return var, min(named, default="rest")


def _body(eqn: JaxprEqn) -> Jaxpr | None:
    """What an equation runs, whose outputs are its own: the body of a loop or a call, the first of branches."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inside = getattr(item, "jaxpr", item)  # a closed one has its constants beside it; newer JAX has one kind
            if isinstance(inside, Jaxpr):
                return inside
    return None


def _bytes(var: Any) -> int:
    """A random key, which is no number, counts as nothing."""
    plain = hasattr(var.aval, "shape") and not jax.numpy.issubdtype(var.aval.dtype, jax.dtypes.extended)
    return var.aval.size * var.aval.dtype.itemsize if plain else 0
