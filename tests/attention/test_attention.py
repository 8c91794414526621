"""What the kit does not ask: other implementations' numbers, the algebra of patterns, what the engine computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close

from xformers_lab import spec
from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.layout import layout, live_pairs
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.linear.recurrence import linear_recurrence
from xformers_lab.attention._engine.order import NATURAL, Runs
from xformers_lab.attention._engine.pattern import (
    All,
    Band,
    Causal,
    Global,
    Residue,
    block_local,
    dilated_band,
)
from xformers_lab.attention.sparse import Local2D, Random, parsed
from xformers_lab.check.subject import Wave
from xformers_lab.measure.flops import count_flops


def build(choice: str, length: int, dim: int, heads: int, kv_heads: int | None = None):
    return spec.build("attention", choice, length=length, dim=dim, heads=heads, kv_heads=kv_heads)


def time_first(x):
    """(B, N, T, H) -> (B, T, N, H), and back."""
    return np.swapaxes(x, 1, 2)


# ---- other implementations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_full_is_torch_multi_head_attention(golden, method):
    peer = golden("dense_mha")
    x, N = peer["x"], peer["meta"]["heads"]
    weights, biases = peer["w.in_proj_weight"].reshape(3, 32, 32), peer["w.in_proj_bias"].reshape(3, 32)
    q, k, v = ((x @ w.T + b).reshape(2, 12, N, -1) for w, b in zip(weights, biases, strict=True))
    full = build("full", 12, 32, N)

    def out(**options):
        mixed = full.mix(q, k, v, method=method, **options)[0].reshape(2, 12, 32)
        return mixed @ peer["w.out_proj.weight"].T + peer["w.out_proj.bias"]

    assert_close(out(), peer["y"])
    assert_close(out(causal=True), peer["y_causal"])
    assert_close(out(valid=jnp.asarray(~peer["kpm"])), peer["y_padded"])


def test_grouped_heads_are_torch_enable_gqa(golden):
    peer = golden("sdpa_gqa")
    q, q_causal, k, v = (time_first(peer[name]) for name in ("q", "q_causal", "k", "v"))
    full = build("full", 14, 128, 8, 2)
    assert_close(time_first(full.mix(q, k, v)[0]), peer["y"])
    assert_close(time_first(full.mix(q_causal, k, v, causal=True)[0]), peer["y_causal"])


@dataclasses.dataclass(frozen=True)
class Buckets(Pattern):
    """Keys of a query's own bucket of `size` positions and of the two beside it."""

    size: int

    def __call__(self, q, k):
        return abs(q // self.size - k // self.size) <= 1


@pytest.mark.parametrize("run", [block_sparse, dense])
@pytest.mark.parametrize("name", ["local_attention_bidir", "local_attention_causal"])
def test_engine_runs_the_pattern_of_the_local_attention_package(golden, name, run):
    peer = golden(name)
    near = Buckets(peer["meta"]["window_size"])
    pattern = near & Causal() if peer["meta"]["causal"] else near
    options = {"blocks": (8, 8)} if run is block_sparse else {}
    q, k, v = (peer[x].reshape(8, 24, 16) for x in "qkv")
    out = jax.vmap(lambda q, k, v: run(q, k, v, pattern=pattern, **options))(q, k, v)
    assert_close(out, peer["y"].reshape(8, 24, 16))


def test_local_with_a_bias_is_longt5(golden):
    """LongT5's radius 3: |t - s| < block_len; with the learned bias given as scores to add."""
    peer = golden("longt5_local")
    meta, x = peer["meta"], peer["x"]
    q, k, v = ((x @ peer[f"w.{name}.weight"].T).reshape(2, 24, 4, 8) for name in "qkv")
    table = jnp.asarray(peer["w.relative_attention_bias.weight"].T)  # (N, 32)
    local = build(f"local:window={meta['local_radius']}", 24, 32, 4)
    # T5 does not scale its scores; the lab divides by sqrt(H).
    out = local.mix(q * 8**0.5, k, v, bias=T5(table))[0].reshape(2, 24, 32) @ peer["w.o.weight"].T
    assert_close(out, peer["y"])


@jax.tree_util.register_pytree_node_class
class T5:
    """The bias of T5's buckets, bidirectional, 32 buckets up to a distance of 128: exact below 8."""

    def __init__(self, table):
        self.table = table

    def __call__(self, q_at, k_at):
        ahead = k_at - q_at
        return self.table[jnp.abs(ahead) + 16 * (ahead > 0)]

    def tree_flatten(self):
        return (self.table,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_linear_recurrence_is_fla(golden):
    peer = golden("linear_attn_naive")
    q, k, v = (np.swapaxes(peer[name], 1, 2).reshape(8, 18, -1) for name in "qkv")
    q = q * q.shape[-1] ** -0.5
    out, total = jax.vmap(lambda q, k, v: linear_recurrence(q, k, v, chunk=5))(q, k, v)
    back = lambda x: np.swapaxes(np.asarray(x).reshape(2, 4, 18, -1), 1, 2)
    assert_close(back(out), peer["y"])
    assert_close(back(out / total[..., None]), peer["y_norm"])


def test_rope_is_llama(golden):
    peer = golden("rope")
    rope = spec.build("position", "rope", length=12, dim=64, heads=4)
    for name in ("q", "k"):
        out = rope.rotate(jnp.asarray(time_first(peer[name])), jnp.arange(12))
        assert_close(time_first(out), peer[f"{name}_half"])


def test_rope_is_gemma(golden):
    peer = golden("rope_gemma_fixture")
    rope = spec.build("position", "rope:base=100", length=2, dim=4, heads=1)
    rows = [rope.rotate(jnp.ones((1, 1, 1, 4)), jnp.array([at]))[0] for at in (1, 0)]
    # Its shape is (B, L, N, H) with one position per sample, broadcast over N.
    assert_close(jnp.stack(rows), peer["expected_full"][:, :1, :1])


def test_axial_rows_and_columns_are_the_axial_attention_package(golden):
    """Its two axes, each with its own projections, are `axis=column` and `axis=row` of ours, summed."""
    peer = golden("axial_attention_sum")
    x, N = peer["x"], peer["meta"]["heads"]
    flat, total = x.reshape(2, 30, 16), np.zeros((2, 30, 16))
    for number, axis in enumerate(("column", "row")):
        weight = lambda name, number=number: peer[f"w.axial_attentions.{number}.fn.{name}"]
        q, kv = flat @ weight("to_q.weight").T, flat @ weight("to_kv.weight").T
        q, k, v = (y.reshape(2, 30, N, -1) for y in (q, *np.split(kv, 2, -1)))
        out = build(f"axial:shape=5x6:axis={axis}", 30, 16, N).mix(q, k, v)[0].reshape(2, 30, 16)
        total = total + out @ weight("to_out.weight").T + weight("to_out.bias")
    assert_close(total.reshape(x.shape), peer["y"])


# ---- patterns ----------------------------------------------------------------------------------------------------

PATTERNS = {
    "all": All(),
    "causal": Causal(),
    "band": Band(3),
    "causal band": Band(5) & Causal(),
    "strided": Band(4) | Residue(4),
    "causal strided": (Band(4) | Residue(4)) & Causal(),
    "grid": block_local(6) | Residue(6),
    "causal grid": (block_local(6) | Residue(6)) & Causal(),
    "row": block_local(5),
    "column": Residue(5),
    "outside": ~Band(2),
    "hole": Band(9) & ~Band(3) & Causal(),
    "three parts": Band(2) | Residue(3) | Residue(5),
    "global": Band(2) | Global(2),
    "sinks": (Band(3) | Global(2, queries=False)) & Causal(),
    "random": Random(4, 2, 8),
    "causal random": Random(4, 2, 8, seed=2) & Causal(),
    "bigbird": block_local(4) | Global(3) | Random(4, 1, 8, seed=1),
    "fixed": parsed("fixed(6,2)", 32) & Causal(),
    "plane": Local2D(6, 1, 2),
    "causal plane": Local2D(5, 2, 1) & Causal(),
    "dilated": dilated_band(2, 3),
    "causal tree": parsed("tree(2,3)", 32) & Causal(),
}
SHAPES = [(29, 29), (7, 29), (29, 7), (24, 24), (1, 13), (3, 3)]


def pair_mask(pattern, T, S):
    at = np.arange(T)[:, None] + S - T
    return np.broadcast_to(np.asarray(pattern(at, np.arange(S)[None])), (T, S))


@pytest.mark.parametrize("T, S", SHAPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_parts_are_disjoint_and_make_the_pattern(name, T, S):
    pattern = PATTERNS[name]
    parts = [pair_mask(part, T, S) for part in pattern.parts()]
    np.testing.assert_array_equal(sum(part.astype(int) for part in parts), pair_mask(pattern, T, S))
    assert len({part.order for part in pattern.parts()}) == len(parts)


@pytest.mark.parametrize("name", PATTERNS)
def test_states_never_lie_about_a_rectangle(name):
    pattern, random = PATTERNS[name], np.random.default_rng(0)
    for _ in range(200):
        low = random.integers(-10, 40, 2)
        high = low + random.integers(0, 12, 2)
        seen = np.asarray(pattern(np.arange(low[0], high[0] + 1)[:, None], np.arange(low[1], high[1] + 1)[None]))
        seen = np.broadcast_to(seen, high - low + 1)
        q, k = (Runs(NATURAL, np.asarray(a), np.asarray(b)) for a, b in zip(low, high, strict=True))
        state = int(pattern.state(q, k))
        assert state == 1 or (state == 2 and seen.all()) or (state == 0 and not seen.any())


@pytest.mark.parametrize("T, S", SHAPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_layout_covers_every_live_pair_once(name, T, S):
    """Live pairs of all parts' blocks, by the predicate where a block is mixed, add up to the dense mask."""
    np.testing.assert_array_equal(pair_counts(PATTERNS[name], T, S, 4, 8), pair_mask(PATTERNS[name], T, S))


def pair_counts(pattern, T, S, block_q, block_k):
    """How often each pair is counted: in live blocks, by the predicate where a block is mixed."""
    count = np.zeros((T, S), int)
    for part in layout(pattern, T, S, block_q, block_k):
        queries, keys = part.queries.reshape(-1, block_q), part.keys.reshape(-1, block_k)
        for row, column, whole in computed_blocks(part):
            q_at, k_at = np.meshgrid(queries[row], keys[column], indexing="ij")
            inside = (q_at >= S - T) & (q_at < S) & (k_at >= 0) & (k_at < S)
            seen = inside if whole else inside & np.asarray(part.pattern(q_at, k_at))
            np.add.at(count, (q_at[seen] - (S - T), k_at[seen]), 1)
    return count


def computed_blocks(part):
    """(row, column, whole) of the blocks that a part counts."""
    for group in part.groups:
        for at, place in np.argwhere(np.ones(group.columns.shape, bool) if group.live is None else group.live):
            yield group.rows[at], group.columns[at, place], group.whole or place < group.unmasked


@pytest.mark.parametrize(
    "name", ["all", "causal", "causal band", "strided", "causal grid", "column", "bigbird", "fixed"]
)
def test_computed_products_are_the_live_pairs(name):
    """Forward 2 products, forward and backward 7 (scores again, dP, dQ, dK, dV), 2 H for each computed pair."""
    T, H, blocks = 256, 8, (16, 16)
    pairs = live_pairs(PATTERNS[name], T, T, *blocks)
    shape = jax.ShapeDtypeStruct((T, H), jnp.float32)
    attend = lambda q, k, v: block_sparse(q, k, v, pattern=PATTERNS[name], blocks=blocks)
    assert count_flops(attend, shape, shape, shape) == 4 * H * pairs
    both = lambda *arrays: jax.vjp(attend, *arrays)[1](arrays[0])
    assert count_flops(both, shape, shape, shape) == 14 * H * pairs
    assert pair_mask(PATTERNS[name], T, T).sum() <= pairs


@pytest.mark.parametrize("T, S", [(29, 29), (5, 29), (29, 13)])
@pytest.mark.parametrize("name", ["causal", "causal strided", "grid", "outside", "hole", "three parts"])
def test_engine_is_dense_in_value_and_gradients(name, T, S):
    """With padding and a bias, gradients of its leaves too."""
    random = np.random.default_rng(T)
    q, k, v = (jnp.asarray(random.standard_normal((n, 4)), jnp.float32) for n in (T, S, S))
    bias = Wave(jnp.float32(0.7), jnp.float32(-1.3))
    options = {"pattern": PATTERNS[name], "valid": jnp.asarray(random.random(S) < 0.7)}
    grad = jnp.asarray(random.standard_normal((T, 4)), jnp.float32)

    @jax.jit
    def both(q, k, v, bias):
        fast, pull = jax.vjp(lambda *x: block_sparse(*x[:3], bias=x[3], blocks=(8, 8), **options), q, k, v, bias)
        slow, reference_pull = jax.vjp(lambda *x: dense(*x[:3], bias=x[3], **options), q, k, v, bias)
        return (fast, pull(grad)), (slow, reference_pull(grad))

    with jax.default_matmul_precision("highest"):
        fast, slow = both(q, k, v, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5), fast, slow)


def test_short_input_leaves_a_part_of_the_pattern_without_blocks():
    """Five positions of a stride of eight: nothing is live but the band, and gradients exist all the same."""
    strided = build("strided", 67, 32, 4)
    q = jnp.ones((1, 5, 4, 8))
    grad = jax.jit(jax.grad(lambda q: (strided.mix(q, q, q, causal=True)[0] ** 2).sum()))(q)
    assert grad.shape == q.shape and np.isfinite(grad).all()


def test_equal_patterns_share_one_layout():
    one = layout(Band(3) & Causal(), 16, 16, 8, 8)
    assert layout(Band(3) & Causal(), 16, 16, 8, 8) is one
    assert layout(Band(4) & Causal(), 16, 16, 8, 8) is not one


def test_a_union_of_many_orders_counts_every_pair_once():
    union = Residue(3) | Residue(4) | Residue(5) | Residue(7) | Band(1)
    at = np.arange(60)
    masks = [part(at[:, None], at[None]) for part in union.parts()]
    assert len(masks) == 5
    np.testing.assert_array_equal(np.sum(masks, 0), union(at[:, None], at[None]))


def test_one_query_behind_many_keys_in_half_precision():
    """What decoding and cross-attention ask for: XLA:CPU compiled, and could not run, the product of earlier keys."""
    linear = build("linear", 32, 64, 2)
    q, k, v = (x.astype(jnp.bfloat16) for x in jax.random.normal(jax.random.key(0), (3, 8, 31, 2, 32)))
    out = jax.jit(lambda q, k, v: linear.mix(q, k, v, causal=True)[0])(q[:, -1:], k, v)
    whole = linear.mix(*(x.astype(jnp.float32) for x in (q, k, v)), causal=True)[0]
    np.testing.assert_allclose(out.astype(jnp.float32), whole[:, -1:], atol=0.03)


@pytest.mark.parametrize("pattern", [Causal(), Causal() & Band(100)])
def test_a_large_bias_beyond_the_last_query_gives_finite_gradients(pattern):
    """The last block of queries is padded: the bias there, 700, is larger than exp can take."""
    T = 600
    q, k, v, grad = (jax.random.normal(jax.random.key(i), (T, 8)) for i in range(4))
    distance = Wave(jnp.asarray(18.0), jnp.asarray(1.0))

    def run(q, k, v, distance):
        return block_sparse(q, k, v, pattern=pattern, valid=None, bias=distance, blocks=(256, 256))

    gradients = jax.jit(lambda *inputs: jax.vjp(run, *inputs)[1](grad))(q, k, v, distance)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
