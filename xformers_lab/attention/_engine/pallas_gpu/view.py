"""Arrays in the order of one part of a pattern, in whole blocks, and back."""

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.attention._engine.block_sparse.view import places, taken
from xformers_lab.attention._engine.order import PAD
from xformers_lab.attention._engine.pallas_gpu.blocks import Work
from xformers_lab.attention._engine.pallas_gpu.tile import Marks, Rule
from xformers_lab.attention._engine.pallas_gpu.tuning import Tuning
from xformers_lab.attention._engine.softmax import EMPTY

# The label of a key that is padding, which no query has.
HIDDEN = np.iinfo(np.int32).min


class View:
    """Arrays (B, positions, ...) in the order of one part's positions, in whole blocks, and back."""

    def __init__(self, each: Work, tuning: Tuning, T: int, S: int):
        self.work, self.part, self.tuning, self.T, self.S = each, each.ordered, tuning, T, S

    def rule(self, scale: float, softcap: float | None) -> Rule:
        padded = len(self.part.keys) != self.S
        sizes = self.tuning.block_q, self.tuning.block_k
        return Rule(self.part.pattern, *sizes, scale, softcap, self.S - self.T, self.S if padded else None)

    def marks(self, valid, documents) -> Marks:
        part, q_label, k_label = self.part, None, None
        if documents is not None:
            k_label = documents.astype(jnp.int32)
            q_label = self.queries(k_label[:, np.maximum(np.arange(self.T) + self.S - self.T, 0)])
        if valid is not None:
            k_label = jnp.where(valid, 0 if k_label is None else k_label, HIDDEN).astype(jnp.int32)
        given = lambda x: None if x is None else jnp.asarray(x)
        return Marks(
            q_at=None if part.natural_queries else jnp.asarray(part.queries),
            k_at=None if part.natural_keys else jnp.asarray(part.keys),
            q_label=q_label,
            k_label=None if k_label is None else self.keys(k_label),
            masks=given(self.work.masks),
            numbers=given(self.work.programs.masks),
        )

    def queries(self, x, fill: float = 0, axis: int = 1):
        part = self.part
        if part.natural_queries:
            return padded(x, len(part.queries), fill, axis)
        return taken(x, np.where(part.queries == PAD, PAD, part.queries - (self.S - self.T)), fill, axis)

    def keys(self, x):
        part = self.part
        return padded(x, len(part.keys), 0, 1) if part.natural_keys else taken(x, part.keys, axis=1)

    def unqueries(self, x, axis: int = 1):
        if self.part.natural_queries:
            return jax.lax.slice_in_dim(x, 0, self.T, axis=axis)
        return jnp.take(x, places(self.part.queries, self.S - self.T, self.T), axis=axis)

    def unkeys(self, x):
        if self.part.natural_keys:
            return x[:, : self.S]
        return taken(x, places(self.part.keys, 0, self.S), axis=1)

    # ---- rows that several programs compute ------------------------------------------------------------------------

    def merged(self, out, lse):
        """Outputs (B, slots block, N, H) and log-sum-exps (B, N, slots block) -> of rows alone."""
        programs, block = self.work.programs, self.tuning.block_q
        if not len(programs.rows):
            return out, lse
        out, lse = out.reshape(out.shape[0], -1, block, *out.shape[2:]), lse.reshape(*lse.shape[:2], -1, block)
        parts = jnp.take(out, programs.pieces, axis=1, mode="fill", fill_value=0)  # (B, R, M, block, N, H)
        stats = jnp.take(lse, programs.pieces, axis=2, mode="fill", fill_value=EMPTY)  # (B, N, R, M, block)
        both = jax.nn.logsumexp(stats, 3)
        weights = jnp.exp(stats - both[:, :, :, None])
        mean = jnp.einsum("brmcnh,bnrmc->brcnh", parts, weights)
        out = out[:, : programs.count].at[:, programs.rows].set(mean)
        lse = lse[:, :, : programs.count].at[:, :, programs.rows].set(both)
        return out.reshape(out.shape[0], -1, *out.shape[3:]), lse.reshape(*lse.shape[:2], -1)

    def summed(self, x):
        """(B, slots block, heads, H) -> of rows alone."""
        programs = self.work.programs
        if not len(programs.rows):
            return x
        block = x.shape[1] // programs.slots
        x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
        totals = jnp.take(x, programs.pieces, axis=1, mode="fill", fill_value=0).sum(2)
        x = x[:, : programs.count].at[:, programs.rows].set(totals)
        return x.reshape(x.shape[0], -1, *x.shape[3:])


def padded(x, length: int, fill: float, axis: int):
    if x.shape[axis] == length:
        return x
    padding = [(0, length - x.shape[axis] if at == axis else 0) for at in range(x.ndim)]
    return jnp.pad(x, padding, constant_values=fill)
