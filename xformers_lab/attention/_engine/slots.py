"""Softmax attention between a sequence and a few slots, of all heads of a batch: linear in the sequence."""

from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.pattern import All
from xformers_lab.nn.plan import Plan

# Queries at once: rows of as many scores as there are slots stay in the cache of a CPU.
ROWS = 512


def over_all(q, k, v, valid=None):
    """One head: (T, H) (S, H) (S, H) -> (T, H); zeros where nothing is valid."""
    T, S = q.shape[0], k.shape[0]
    return block_sparse(q, k, v, pattern=All(), valid=valid, blocks=(-(-T // -(-T // ROWS)), S))


def attended(q, k, v, valid=None, *, plan: Plan, method: str = "attend"):
    """(B, T, N, H), (B, S, K, H) and valid (B, S) or None -> (B, T, N, H)."""

    def one(q, k, v, _, valid, __):
        fast = over_all(q, k, v, valid) if method == "attend" else dense(q, k, v, pattern=All(), valid=valid)
        return fast, None

    return over_heads(one, q, k, v, None, valid, None, plan=plan)[0]
