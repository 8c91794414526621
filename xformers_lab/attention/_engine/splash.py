"""Splash attention, JAX's own block-sparse kernel for TPUs, over our patterns, forward and backward.

The kernel computes the blocks of pairs in which any is live, and masks those in which some are not by one of the
different partly live blocks that it is given. Heads of one pattern are one call, in the pattern's order of positions
where fewer blocks are live then.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from xformers_lab.attention._engine.algebra import DEAD, MIXED, WHOLE, Pattern
from xformers_lab.attention._engine.asked import Asked
from xformers_lab.attention._engine.block_sparse.layout import ordered
from xformers_lab.attention._engine.block_sparse.view import places
from xformers_lab.attention._engine.by_device import by_device
from xformers_lab.attention._engine.order import NATURAL, PAD, Order
from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.layouts import SEQUENCE
from xformers_lab.nn import counted_blocks, on_mesh

name: str = "splash"
# Queries, and keys, of a block: multiples of a TPU's 128 lanes.
SIZES = (128, 256, 512)
LEAST = SIZES[0]
# What one block costs beside its pairs, in pairs, for a step of the grid has a cost of its own. An estimate: it was not
# timed on a TPU.
STEP = 256 * 256
# Most blocks of one pattern, live or not, for what the kernel must know of each lies in a TPU's scalar memory.
MOST = 1 << 16
# Most elements of the different partly live blocks of one pattern, a byte each in the program.
MOST_MASKED = 1 << 25


def why_not(asked: Asked) -> str | None:
    """Why it cannot run a call, None where it can. What takes evaluation comes last."""
    reasons = (
        (f"it is for TPUs, and this is a {asked.platform}", asked.platform != "tpu" and not asked.interpret),
        ("it takes no bias: use position=rope, learned, sinusoidal or none", asked.bias),
        ("it takes float32 or bfloat16", asked.dtype not in ("float32", "bfloat16")),
        (f"it computes {LEAST} queries and keys at a time, and here are fewer", min(asked.T, asked.S) < LEAST),
        ("devices share out positions, which it needs all of", on_mesh.shares(SEQUENCE)),
    )
    reason = next((reason for reason, holds in reasons if holds), None)
    if reason is None:
        reasons = (_why_no_map(pattern, asked.T, asked.S) for pattern in dict.fromkeys(asked.patterns))
        reason = next(filter(None, reasons), None)
    return reason


def attend(q, k, v, *, asked: Asked, valid=None, documents=None):
    """softmax(q k^T / sqrt(H)) v of q (B, T, N, H), k (B, S, K, H) and v (B, S, K, V), see `kernels.Kernel`."""
    q = (q * asked.H**-0.5).astype(q.dtype)
    run = functools.partial(_of_batch, asked=asked)
    return by_device(run, q, k, v, valid, documents, alike=asked.pattern is not None)


def _of_batch(q, k, v, *, valid, documents, asked: Asked):
    """`attend` as one device does it, on scaled queries."""
    N, K = q.shape[2], k.shape[2]
    patterns = asked.patterns if len(asked.patterns) == N else asked.patterns[:1] * N
    outputs = []
    for pattern, group in itertools.groupby(range(N), lambda head: patterns[head]):
        heads = np.array(list(group))
        if len(heads) == N:
            outputs.append(_of_pattern(q, k, v, valid, documents, pattern, asked))
            continue
        keys = heads // (N // K)
        outputs.append(_of_pattern(q[:, :, heads], k[:, :, keys], v[:, :, keys], valid, documents, pattern, asked))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, 2)


def _of_pattern(q, k, v, valid, documents, pattern: Pattern, asked: Asked):
    """Heads of one pattern, (B, T, N, H) -> (B, T, N, V)."""
    blocks, T, S, N = _map(pattern, asked.T, asked.S), asked.T, asked.S, q.shape[2]
    if blocks is None or not len(blocks.live):
        return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype)
    b = blocks.size
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask((_Mask(pattern, T, S),) * N),
        block_sizes=splash.BlockSizes(b, b, b, b, b, b, b, b),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=asked.softcap,
        interpret=asked.interpret,
    )
    queries = np.where(blocks.queries == PAD, PAD, blocks.queries - (S - T))
    heads_first = lambda x, at: jnp.swapaxes(_ordered(x, at), 1, 2)
    segments = None
    if valid is not None or documents is not None:
        own = jnp.zeros((len(q), S), jnp.int32) if documents is None else documents.astype(jnp.int32)
        # A document of nobody's for keys that are padding.
        of_keys = own if valid is None else jnp.where(valid, own, -1)
        of_queries = own[:, np.maximum(np.arange(T) + S - T, 0)]
        segments = splash.SegmentIds(_ordered(of_queries, queries), _ordered(of_keys, blocks.keys))
    # One more score of every row, too small to weigh beside any other: a row that sees no key has it, and no value.
    nothing = jnp.full(N, MASKED, jnp.float32)
    run = jax.vmap(kernel, (0, 0, 0, None if segments is None else 0, None))
    with counted_blocks.saying(len(q) * N * len(blocks.live)):
        out = run(heads_first(q, queries), heads_first(k, blocks.keys), heads_first(v, blocks.keys), segments, nothing)
    return _ordered(jnp.swapaxes(jnp.asarray(out), 1, 2), places(queries, 0, T)).astype(v.dtype)


# ---- which blocks are live --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Map:
    """A pattern in square blocks of `size` positions: positions in order, PAD where a block is filled up; the state of
    each pair of blocks (rows, columns), and of those that are not dead (n,)."""

    size: int
    queries: np.ndarray
    keys: np.ndarray
    state: np.ndarray
    live: np.ndarray

    @property
    def cost(self) -> int:
        return len(self.live) * (self.size**2 + STEP)


@functools.lru_cache(maxsize=64)
def _map(pattern: Pattern, T: int, S: int) -> _Map | None:
    """The cheapest order and size of blocks; None where every size has too many."""
    found = (_in_blocks(pattern, order, T, S, size) for order in {pattern.order, NATURAL} for size in SIZES)
    return min(filter(None, found), key=lambda blocks: blocks.cost, default=None)


def _in_blocks(pattern: Pattern, order: Order, T: int, S: int, size: int) -> _Map | None:
    if -(-T // size) * -(-S // size) > MOST:
        return None
    found = ordered(pattern, T, S, size, size, order)
    state = np.full((len(found.queries) // size, len(found.keys) // size), DEAD, np.int8)
    if state.size > MOST:
        return None
    state[found.live.rows, found.live.columns] = found.live.state
    return _Map(size, found.queries, found.keys, state, found.live.state)


def _why_no_map(pattern: Pattern, T: int, S: int) -> str | None:
    """Why a pattern cannot be given to the kernel."""
    blocks = _map(pattern, T, S)
    if blocks is None:
        return f"it takes at most {MOST:,} blocks of {SIZES[-1]} x {SIZES[-1]}, and here are more"
    different = _different(pattern, T, S)
    if different * blocks.size**2 > MOST_MASKED:
        return f"the pattern has {different:,} different blocks that are partly live, more than can be held"
    return None


@functools.lru_cache(maxsize=64)
def _different(pattern: Pattern, T: int, S: int) -> int:
    """How many different partly live blocks the kernel would be given."""
    blocks, seen = _map(pattern, T, S), set()
    assert blocks is not None
    for row, column in zip(*np.nonzero(blocks.state == MIXED), strict=True):
        seen.add(hash(_cut(pattern, blocks, row, column).tobytes()))
        if len(seen) * blocks.size**2 > MOST_MASKED:
            break
    return len(seen)


def _cut(pattern: Pattern, blocks: _Map, row: int, column: int) -> np.ndarray:
    """Which pairs of a block are live, (size, size)."""
    of = lambda positions, at: positions[at * blocks.size :][: blocks.size]
    q, k = of(blocks.queries, row)[:, None], of(blocks.keys, column)[None]
    return np.asarray(pattern(q, k)) & (q != PAD) & (k != PAD)


@dataclasses.dataclass(frozen=True)
class _Mask(masks.Mask):
    """A pattern as the kernel's maker asks for it, block by block: most are dead or whole, and not evaluated."""

    pattern: Pattern
    T: int
    S: int

    @property
    def blocks(self) -> _Map:
        blocks = _map(self.pattern, self.T, self.S)
        assert blocks is not None
        return blocks

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.blocks.queries), len(self.blocks.keys)

    def __getitem__(self, idx) -> np.ndarray:
        blocks = self.blocks
        row, column = (each.start // blocks.size for each in idx)
        state = blocks.state[row, column]
        if state == MIXED:
            return _cut(self.pattern, blocks, row, column)
        return np.broadcast_to(state == WHOLE, (blocks.size, blocks.size)).view(_Uniform)


class _Uniform(np.ndarray):
    """A block of one value, which need not be looked through to say so: there are as many blocks as T S / size^2."""

    def any(self, *args, **options):
        return self.flat[0]

    all = any


# ---- orders of positions ----------------------------------------------------------------------------------------


def _ordered(x, at: np.ndarray):
    """x (B, n, ...) by positions (m,), zeros where one is PAD."""
    n, real = x.shape[1], np.flatnonzero(at != PAD)
    if np.array_equal(at[real], np.arange(len(real))) and np.array_equal(real, np.arange(len(real))):
        return jnp.pad(x[:, : len(real)], [(0, 0), (0, len(at) - len(real))] + [(0, 0)] * (x.ndim - 2))
    return _gathered(x, jnp.asarray(at), jnp.asarray(places(at, 0, n)))


@jax.custom_vjp
def _gathered(x, at, back):
    """x (B, n, ...) at places (m,), zeros where there is none; back (n,) says where each of x went, so that a gradient
    is gathered, too."""
    return jnp.take(x, jnp.where(at < 0, x.shape[1], at), 1, mode="fill", fill_value=0)


_gathered.defvjp(
    lambda x, at, back: (_gathered(x, at, back), (at, back)),
    lambda saved, grad: (_gathered(grad, *reversed(saved)), None, None),
)
