import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost, MultiHead
from xformers_lab.attention._base.cache import pushed
from xformers_lab.attention._base.recurrent import rms
from xformers_lab.attention._engine.heads import over_samples
from xformers_lab.attention._engine.products import EXACT
from xformers_lab.attention._engine.query_blocks import ROWS, by_blocks, seen_from
from xformers_lab.attention._engine.softmax import masked_softmax, same_document
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

# Heads whose weights are mixed, at most, unless the option says how many.
MIXED = 16


class MultiToken(MultiHead):
    """Multi-token attention: scores are convolved over queries, keys and heads (Golovneva et al., 2025, arXiv
    2504.00927, section 3).

    A = softmax(sum_ij theta_ij s_(t-i, s-j)) of the scores s_ts = q_t . k_s / sqrt(H), over the last `queries` queries
    and the `keys` keys around a key, with a theta of every head; out_m = g * rms(sum_l W_ml A_l v_m) over the heads l
    of its group. So a weight may depend on several words that stand together.

    Scores that a query may not see count as 0 in the convolution, as the paper has it, and so do those of padding. A
    bias is added to what was convolved. Not causally, queries still look at those before them.
    Deviations from the paper: every layer convolves keys and queries, where the paper's do so in each fourth; heads
        are mixed behind the softmax alone; their norm has learned weights in the place of a gate that grows with depth.

    Options:
        queries: scores of so many queries, the newest and those before it, make one
        keys: and of so many keys, half of them on either side
        group: heads whose weights are mixed; none: the most that divide all heads, up to 16
        norm: rms: what a head gives is brought to unit root mean square; none: as it is
    """

    kind = "multi-head"
    exact = True
    documents_apart = True
    keeps_keys = False
    complexity = Complexity(
        time="O(T S (H + queries keys + group))",
        memory="O(S)",
        decoding="every key and value, and queries - 1 queries",
        time_note="a head",
        memory_note="per block of queries",
    )
    refuses: ClassVar = {"cross": "its scores are convolved with those of queries before, so every key has a query"}

    def __init__(
        self,
        size: Size,
        *,
        queries: int = 6,
        keys: int = 11,
        group: int | None = None,
        norm: Literal["rms", "none"] = "rms",
        rngs: nnx.Rngs,
    ):
        if queries < 1 or keys < 1:
            raise Refused(f"queries and keys must be at least 1, got {queries} and {keys}")
        group = max(n for n in range(1, MIXED + 1) if size.heads % n == 0) if group is None else group
        if group < 1 or size.heads % group:
            raise Refused(f"group must divide the {size.heads} heads, got {group}")
        super().__init__(size, rngs=rngs)
        self.queries, self.keys, self.group, self.norm = queries, keys, group, norm
        taps = jnp.zeros((size.heads, queries, keys)).at[:, 0, keys // 2].set(1)
        self.taps = nnx.Param(taps, decays=False)
        self.mixing = nnx.Param(jnp.tile(jnp.eye(group), (size.heads // group, 1, 1)), decays=True)
        self.gain = nnx.Param(jnp.ones((size.heads, size.head)), decays=False) if norm == "rms" else None

    @staticmethod
    def limit(length: int):
        return {"norm": "none"}

    def attend_heads(self, call: Call):
        if call.q.shape[1] != call.k.shape[1]:
            raise Refused(f"multitoken cannot attend to another sequence: {self.refuses['cross']}")
        q, k, v = (jnp.swapaxes(y, 1, 2) for y in (call.q, *self._repeated(call)))
        function = _reference if call.method == "reference" else functools.partial(_attend, self.at_once)

        def one(q, k, v, of_sample):
            valid, documents = of_sample
            return function(q, k, v, self._leaves(call), valid=valid, documents=documents, causal=call.causal)

        out = over_samples(one, q, k, v, (call.valid, call.documents), plan=plan_of(self.size))
        out = jnp.swapaxes(out, 1, 2)
        return out if call.values is not None else self.finish(out, call), call.carry, Aux()

    def finish(self, mean, call: Call):
        return mean if self.gain is None else (self.gain[...] * rms(mean)).astype(call.v.dtype)

    def _repeated(self, call: Call):
        return (jnp.repeat(y, call.q.shape[-2] // y.shape[-2], -2) for y in (call.k, call.v))

    def _leaves(self, call: Call):
        return {"taps": self.taps[...], "mixing": self.mixing[...], "bias": call.bias}

    @property
    def at_once(self) -> int:
        """Queries per block: all heads' scores together are as large as one head's would be."""
        return max(16, ROWS // self.size.heads)

    def cost(self, T: int, S: int) -> Cost:
        H, more = self.size.head, self.queries - 1
        blocks = -(-T // min(self.at_once, T))
        memory = max((-(-T // blocks) + more) * (S + self.keys - 1), S * H)
        return Cost(flops=2 * S * ((T + blocks * more) * H + T * (H + self.group)), memory=memory, state=2 * S * H)

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        newest = jnp.zeros((B, self.queries - 1, self.size.heads, self.size.head), dtype)
        return super().init_cache(B, length, dtype) | {"q": newest}

    def decode_heads(self, cache, call: Call):
        q = jnp.concatenate([cache["q"], call.q[:, None]], 1)
        kept, call = pushed({name: rows for name, rows in cache.items() if name != "q"}, call.as_row())
        k, v = (jnp.swapaxes(y, 1, 2) for y in self._repeated(call))
        at = jnp.full((1, 1), k.shape[2] - 1)
        row = functools.partial(_block, at=at, leaves=self._leaves(call), documents=None, causal=True)
        out = jax.vmap(lambda q, k, v, valid: row(q, k, v, valid=valid))(jnp.swapaxes(q, 1, 2), k, v, call.valid)
        return self.finish(jnp.swapaxes(out, 1, 2), call)[:, 0], kept | {"q": q[:, 1:]}, call.carry


def _attend(at_once: int, q, k, v, leaves, *, valid, documents, causal: bool):
    """(N, T, H), (N, T, H), (N, T, H) -> (N, T, H), one block of queries after the other."""
    T, before = q.shape[1], leaves["taps"].shape[1] - 1
    # Zeros stand where a block reaches beyond either end.
    wide = jnp.pad(q, ((0, 0), (before, min(T, at_once)), (0, 0)))

    def row(queries, at, keys):
        rows = lax.dynamic_slice_in_dim(wide, at[0, 0], len(queries) + before, 1)
        options = {"valid": valid, "documents": documents, "causal": causal}
        return jnp.swapaxes(_block(rows, k[:, :keys], v[:, :keys], at=at, leaves=leaves, **options), 0, 1)

    return jnp.swapaxes(by_blocks(row, jnp.swapaxes(q, 0, 1), T, causal, at_once=at_once), 0, 1)


def _block(q, k, v, *, at, leaves, valid, documents, causal: bool):
    """The outputs (N, C, H) of the queries at positions `at` (C, 1), whose predecessors stand in front of them:
    q (N, C + queries - 1, H)."""
    taps, keys = leaves["taps"], k.shape[1]
    s = jnp.matmul(q * q.shape[2] ** -0.5, jnp.swapaxes(k, 1, 2), **EXACT)
    before = taps.shape[1] - 1
    rows_at = at[0] + jnp.arange(-before, len(at))[:, None]
    s = jnp.where(seen_from(rows_at, keys, valid, causal, documents), s, 0)
    s = _convolved(_widened(s, taps.shape[2]), taps, _near(at, before, valid, documents))
    if leaves["bias"] is not None:
        s = s + jax.vmap(lambda bias: bias(at, jnp.arange(keys)[None]))(leaves["bias"])
    p = masked_softmax(s, seen_from(at, keys, valid, causal, documents))
    mixing = leaves["mixing"]
    groups = p.reshape(len(mixing), mixing.shape[1], -1)
    p = jnp.matmul(mixing, groups, **EXACT).reshape(p.shape)
    return jnp.matmul(p.astype(v.dtype), v, **EXACT).astype(v.dtype)


def _near(at, before: int, valid, documents):
    """(C, before + 1) of 0 and 1: which of a query and those in front of it count, no padding and none of another
    document; None: all of them, those before the first being zeros."""
    if valid is None and documents is None:
        return None
    back = jnp.arange(before + 1)[None]
    counts = back >= 0 if valid is None else (back == 0) | valid[jnp.clip(at - back, 0, len(valid) - 1)]
    counts = counts if documents is None else counts & same_document(documents, at, at - back)
    return jnp.broadcast_to(counts, (len(at), before + 1)).astype(jnp.float32)


def _widened(s, taps: int):
    """Zeros on either side of keys (N, R, S), for `taps` of them to look at: (N, R, S + taps - 1)."""
    return jnp.pad(s, ((0, 0), (0, 0), ((taps - 1) // 2, taps // 2)))


@jax.custom_vjp
def _convolved(s, taps, near):
    """sum_ij taps_ij s_(r-i, m-j) near_ri: s (N, R + I - 1, M + J - 1), taps (N, I, J), near (R, I) or None -> (N, R,
    M).

    Sums of shifted arrays, which XLA runs as loops; differentiated, they would be a hundred times slower on a CPU.
    """
    I, J = taps.shape[1:]
    R, M = s.shape[1] - I + 1, s.shape[2] - J + 1

    def query(total, i):
        row = lax.dynamic_slice_in_dim(s, I - 1 - i, R, 1)
        part = sum(taps[:, i, j, None, None] * row[:, :, J - 1 - j : J - 1 - j + M] for j in range(J))
        return total + _counted(part, near, i), None

    return lax.scan(query, jnp.zeros((len(s), R, M)), jnp.arange(I))[0]


def _counted(x, near, i):
    """x (N, R, M) of the queries that are i before their own, where these count."""
    return x if near is None else x * jnp.take(near, i, 1)[:, None]


def _convolved_backward(saved, grad):
    s, taps, near = saved
    (I, J), (_, R, M) = taps.shape[1:], grad.shape

    def query(ds, i):
        wide = jnp.pad(_counted(grad, near, i), ((0, 0), (0, 0), (J - 1, J - 1)))
        part = sum(taps[:, i, j, None, None] * wide[:, :, j : j + M + J - 1] for j in range(J))
        rows = lax.dynamic_slice_in_dim(ds, I - 1 - i, R, 1) + part
        return lax.dynamic_update_slice_in_dim(ds, rows, I - 1 - i, 1), None

    def tap(_, number):
        i, j = number // J, number % J
        seen = lax.dynamic_slice(s, (0, I - 1 - i, J - 1 - j), (len(s), R, M))
        return None, (seen * _counted(grad, near, i)).sum(1).sum(1)

    ds = lax.scan(query, jnp.zeros_like(s), jnp.arange(I))[0]
    dtaps = lax.scan(tap, None, jnp.arange(I * J))[1]
    return ds, dtaps.T.reshape(taps.shape), None


_convolved.defvjp(lambda s, taps, near: (_convolved(s, taps, near), (s, taps, near)), _convolved_backward)


def _reference(q, k, v, leaves, *, valid, documents, causal: bool):
    T, taps = q.shape[1], leaves["taps"]
    at, keys = jnp.arange(T)[:, None], jnp.arange(T)[None]
    seen = (keys <= at) | (not causal)
    seen = seen if documents is None else seen & same_document(documents, at, keys)
    seen = seen if valid is None else seen & valid
    s = jnp.einsum("nth,nsh->nts", q, k, preferred_element_type=jnp.float32) / q.shape[2] ** 0.5
    s = jnp.where(seen, s, 0)

    def tap(total, number):
        i, j = number // taps.shape[2], number % taps.shape[2]
        query, key = at - i, keys - (j - taps.shape[2] // 2)
        there = (query >= 0) & (key >= 0) & (key < T)
        there = there if documents is None else there & same_document(documents, at, query)
        there = there if valid is None else there & ((i == 0) | valid[jnp.clip(query, 0)])
        term = s[:, jnp.clip(query, 0), jnp.clip(key, 0, T - 1)]
        return total + taps[:, i, j, None, None] * jnp.where(there, term, 0), None

    total = lax.scan(jax.checkpoint(tap), jnp.zeros_like(s), jnp.arange(taps[0].size))[0]
    if leaves["bias"] is not None:
        total += jax.vmap(lambda bias: bias(at, keys))(leaves["bias"])
    p = masked_softmax(total, seen)
    mixing = leaves["mixing"]
    p = jnp.einsum("gml,glts->gmts", mixing, p.reshape(len(mixing), -1, T, T)).reshape(p.shape)
    return jnp.einsum("nts,nsh->nth", p, v).astype(v.dtype)
