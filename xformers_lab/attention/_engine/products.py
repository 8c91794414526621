"""Matrix products and inverses with gradients of their own.

XLA:CPU runs p.T @ do, which differentiation would give, three times slower than do.T @ p.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

EXACT: dict[str, Any] = {"preferred_element_type": jnp.float32}


@jax.custom_vjp
def products(q, k):
    """q k^T in float32: (T, H) (S, H) -> (T, S)."""
    return _product(q, k.T)


@jax.custom_vjp
def weighted(p, v):
    """p v in float32: (T, S) (S, H) -> (T, H)."""
    return _product(p.astype(v.dtype), v)


def _products_backward(saved, grad):
    q, k = saved
    grad = grad.astype(k.dtype)
    return _product(grad, k).astype(q.dtype), _transposed(q, grad).astype(k.dtype)


def _weighted_backward(saved, grad):
    p, v = saved
    grad = grad.astype(v.dtype)
    return _product(grad, v.T).astype(p.dtype), _transposed(grad, p.astype(v.dtype)).astype(v.dtype)


products.defvjp(lambda q, k: (products(q, k), (q, k)), _products_backward)  # pyright: ignore[reportFunctionMemberAccess]
weighted.defvjp(lambda p, v: (weighted(p, v), (p, v)), _weighted_backward)


def inverts(inverse, kept=lambda grad: grad):
    """Decorates a function of matrices (..., m, m) that gives their inverses: the gradient is products of these, of
    which `kept` keeps what belongs to the entries that the function reads."""
    inverse = jax.custom_vjp(inverse)

    def backward(inverse, grad):
        transposed = jnp.swapaxes(inverse, -1, -2)
        return (-kept(transposed @ grad @ transposed),)

    inverse.defvjp(lambda a: (inverse(a),) * 2, backward)
    return inverse


def laid_transposed(x):
    """x (T, H) as (H, T) in memory: else XLA:CPU reads it through the product, at half the speed and less."""
    return lax.optimization_barrier(x.T)


def _product(a, b):
    return jnp.dot(a, b, **EXACT)


def _transposed(x, p):
    """p.T x as (x.T p).T: (T, H) (T, S) -> (S, H); the barrier keeps XLA from turning it back into the slow form."""
    return lax.optimization_barrier(_product(x.T, p)).T
