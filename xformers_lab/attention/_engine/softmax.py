"""The masked softmax, and the number that stands for a score that is not there."""

import functools

import jax.numpy as jnp
from jax import lax

# Finite, so that the difference of two masked scores is 0 and not NaN.
MASKED = -1e30
# The log-sum-exp of a row that sees no key. Its maximum counts as this, so that its exponentials are 0.
EMPTY = MASKED / 2


def masked_softmax(s, seen=None):
    """Softmax of scores (..., S) -> (..., S); zeros for a row that sees no key.

    seen: which scores count, booleans that broadcast; None: those that do not are MASKED already, or less.
    """
    if seen is None:
        p, _, total = exponentials(s)
    else:
        # Without a least maximum XLA:CPU runs the maximum, the difference and the exponential as one kernel.
        s = jnp.where(seen, s, MASKED)
        p = jnp.where(seen, jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True))), 0)
        total = p.sum(-1, keepdims=True)
        total = jnp.where(total > 0, total, 1)
    return p / total


def exponentials(s):
    """exp(s - m) of masked scores (..., S), the maximum m and the sum of each row (..., 1); m + log(sum) is the
    log-sum-exp, EMPTY of a row that sees no key.

    The derivative of m is not followed, for it cancels where exponentials are divided by their sum.
    """
    (p,), m, total = exponentials_apart([s])
    return p, m, total


def exponentials_apart(scores):
    """As `exponentials` of rows whose scores are in pieces (..., S1), (..., S2), ..., with a list of exponentials."""
    most = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores))
    m = lax.stop_gradient(jnp.maximum(most, EMPTY))
    p = [jnp.exp(s - m) for s in scores]
    # A row that sees a key has a sum of at least 1.
    return p, m, jnp.maximum(sum(p.sum(-1, keepdims=True) for p in p), 0.5)


def softmax_average(s, seen, v):
    """The average of values (S, H) by the masked softmax of float32 scores (T, S) -> (T, H), in v's type."""
    p = masked_softmax(jnp.where(seen, s, MASKED))
    return jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(v.dtype)


def same_document(documents, q_at, k_at):
    """Which keys stand in the query's own document: documents (S,), positions that broadcast -> booleans."""
    of = lambda at: documents[jnp.clip(at, 0, len(documents) - 1)]
    return of(q_at) == of(k_at)


def hiding(seen):
    """What is added to scores so that those that are not seen are masked: 0 or MASKED, in float32."""
    return jnp.where(seen, 0.0, MASKED)


def on_data(at, x):
    """Positions, or a number that is added to them, as if they hung on x: else differentiation sees that masks do not,
    and a loop stores every one of them for the backward, a T x S array in all."""
    return lax.optimization_barrier((at, x.ravel()[:1]))[0]
