"""Softmax attention of a batch of rows, each of C queries to n keys of its own.

The forward is written so that XLA:CPU runs all of it as one kernel, whose scores never leave the caches: scores are
masked by adding, and nothing but the outputs is taken from it. To have log-sum-exps as well costs half as much again,
so the backward computes them anew where nothing else needs them.
"""

import jax
import jax.numpy as jnp

from xformers_lab.attention._engine.softmax import EMPTY


def forward(q, k, v, added=None):
    """Outputs (R, C, H) and log-sum-exps (R, C) in float32; zeros and EMPTY for a query that sees nothing.

    q (R, C, H), scaled; k and v (R, n, H); added, broadcasting to (R, C, n): what is added to scores, MASKED or less
    where nothing is seen.
    """
    p, m, l = _softmax(scores(q, k, added))
    o, lse = weighed(p, v) / l, (m + jnp.log(l))[..., 0]
    if added is not None:
        seeing = added.max(-1) > EMPTY
        o, lse = o * seeing[..., None], jnp.where(seeing, lse, EMPTY)
    return o, lse


def backward(q, k, v, added, lse, delta, grad):
    """The gradient of the scores (R, C, n), and the weights, which keys' and values' gradients are made of.

    lse: None where it is to be computed again. delta (R, C): the sum of outputs times their gradients, less the
    gradient of lse. grad: of the outputs.
    """
    s = scores(q, k, added)
    if lse is not None:
        p = jnp.exp(s - lse[..., None])
    else:
        p, _, l = _softmax(s)
        p = p / l if added is None else p * ((added.max(-1, keepdims=True) > EMPTY) / l)
    return p * (scores(grad, v) - delta[..., None]), p


def scores(q, k, added=None):
    """(R, C, H) (R, n, H) -> (R, C, n)."""
    s = jnp.einsum("rch,rnh->rcn", q, k, preferred_element_type=jnp.float32)
    return s if added is None else s + added


def weighed(p, v):
    """(R, C, n) (R, n, H) -> (R, C, H)."""
    return jnp.einsum("rcn,rnh->rch", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


def returned(x, p):
    """x^T p, the gradient of keys or values transposed: (R, C, H) (R, C, n) -> (R, H, n)."""
    return jnp.einsum("rch,rcn->rhn", x, p.astype(x.dtype), preferred_element_type=jnp.float32)


def _softmax(s):
    """exp(s - m), the rows' maxima m and sums l: of a row that sees nothing, of scores that are all hidden.

    As `exponentials` of softmax.py but for a least maximum, with which XLA:CPU would run the forward as more kernels.
    """
    m = s.max(-1, keepdims=True)
    p = jnp.exp(s - m)
    return p, m, p.sum(-1, keepdims=True)


@jax.custom_vjp
def attend(q, k, v, added=None):
    """`forward`, differentiable."""
    return forward(q, k, v, added)


def _attend_forward(q, k, v, added):
    o, lse = forward(q, k, v, added)
    return (o, lse), (q, k, v, added, o)


def _attend_backward(residuals, grads):
    q, k, v, added, o = residuals
    grad, of_lse = grads
    delta, grad = (o * grad).sum(-1) - of_lse, grad.astype(v.dtype)
    ds, p = backward(q, k, v, added, None, delta, grad)
    transposed = lambda x, y: jnp.swapaxes(returned(x, y), 1, 2)
    dq, dk, dv = weighed(ds, k), transposed(q, ds), transposed(grad, p)
    added_to = lambda x: jnp.broadcast_to(x, ds.shape)
    of_added = None if added is None else jax.vjp(added_to, added)[1](ds)[0]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), of_added


attend.defvjp(_attend_forward, _attend_backward)
