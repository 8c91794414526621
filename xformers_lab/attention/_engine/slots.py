"""Softmax attention between a sequence and a few slots, of all heads of a batch: linear in the sequence."""

import jax
import jax.numpy as jnp

from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.pattern import All
from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.nn.plan import Plan

# Queries at once: rows of as many scores as there are slots stay in the cache of a CPU.
ROWS = 512


def over_all(q, k, v, valid=None):
    """One head: (T, H) (S, H) (S, H) -> (T, H); zeros where nothing is valid."""
    T, S = q.shape[0], k.shape[0]
    return block_sparse(q, k, v, pattern=All(), valid=valid, blocks=(-(-T // -(-T // ROWS)), S))


def attended(q, k, v, valid=None, *, plan: Plan, method: str = "attend"):
    """(B, T, N, H), (B, S, K, H) and valid (B, S) or None -> (B, T, N, H)."""
    if method == "reference":
        return _by_definition(q, k, v, valid)
    one = lambda q, k, v, _, valid, __: (over_all(q, k, v, valid), None)
    return over_heads(one, q, k, v, None, valid, None, plan=plan)[0]


def _by_definition(q, k, v, valid):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[3] ** 0.5
    if valid is None:
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s, -1), v)
    p = jax.nn.softmax(jnp.where(valid[:, None, None], s, MASKED), -1) * valid[:, None, None]
    return jnp.einsum("bnts,bsnh->btnh", p, v).astype(v.dtype)
