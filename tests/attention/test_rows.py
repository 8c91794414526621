"""How softmax attention is run: rows in a batch with a backward of their own, rows filled up, several as one, heads."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.attention._engine.block_sparse import batch, block_sparse
from xformers_lab.attention._engine.block_sparse.layout import Sizes, layout, live_pairs
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.pattern import Band, Causal, Global
from xformers_lab.attention._engine.softmax import EMPTY, MASKED
from xformers_lab.attention.sparse import Random
from xformers_lab.check.subject import Wave
from xformers_lab.measure.flops import count_flops
from xformers_lab.nn.plan import Plan


def drawn(seed: int, *shapes):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def assert_alike(found, expected, atol=3e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=3e-5), found, expected)


@pytest.mark.parametrize("added", [None, "all", "of rows", "broadcast"])
def test_batch_is_softmax_attention_by_autodiff(added):
    """Outputs and log-sum-exps, and gradients through both; a query that sees nothing gets zeros and gives none."""
    R, C, n, H = 3, 4, 7, 5
    q, k, v, grad, of_lse, extra = drawn(0, (R, C, H), (R, n, H), (R, n, H), (R, C, H), (R, C), (R, C, n))
    hidden = np.random.default_rng(1).random((R, C, n)) < 0.4
    hidden[1, 2] = True
    masked = jnp.where(hidden, MASKED, 0.0)
    added = {None: None, "all": extra + masked, "of rows": masked[:, :1] + extra[:, :1], "broadcast": extra[:1, :1]}[
        added
    ]
    seeing = jnp.ones((R, C)) if added is None else (jnp.broadcast_to(added, (R, C, n)) > EMPTY).any(-1)
    of_lse = of_lse * seeing

    def plain(q, k, v, added):
        s = jnp.einsum("rch,rnh->rcn", q, k)
        s = s if added is None else s + added
        out = jnp.einsum("rcn,rnh->rch", jax.nn.softmax(s, -1), v)
        return out * seeing[..., None], jnp.where(seeing, jax.nn.logsumexp(s, -1), EMPTY)

    def both(function):
        found, pull = jax.vjp(function, q, k, v, added)
        return found, pull((grad, of_lse))

    with jax.default_matmul_precision("highest"):
        assert_alike(both(batch.attend), both(plain))


@pytest.mark.parametrize(
    "wanted", [14, pytest.param(15, marks=pytest.mark.full), pytest.param(16, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_filled_rows_change_nothing(wanted, padded):
    """Of 16 rows 14 are batched; their neighbours, which are run by themselves, join them and see nothing there."""
    pattern = Band(8) | Global(8) | Global(8, start=120) | Random(8, 1, 16, seed=3)
    T, H, blocks = 128, 4, (8, 8)
    sizes = Sizes(fused=wanted * blocks[0], filled=1.0)
    (part,) = layout(pattern, T, T, *blocks, sizes)
    assert [len(group.rows) for group in part.groups] == [wanted, 2]
    q, k, v, grad = drawn(1, *[(T, H)] * 4)
    valid = jnp.arange(T) < 100 if padded else None
    bias = Wave(jnp.float32(0.7), jnp.float32(-1.3))

    def both(function):
        found, pull = jax.vjp(
            lambda q, k, v, bias: function(q, k, v, pattern=pattern, valid=valid, bias=bias), q, k, v, bias
        )
        return found, pull(grad)

    with jax.default_matmul_precision("highest"):
        fast, slow = (both(run) for run in (functools.partial(block_sparse, blocks=blocks, sizes=sizes), dense))
    assert_alike(fast, slow)
    shape = jax.ShapeDtypeStruct((T, H), jnp.float32)
    attend = functools.partial(block_sparse, pattern=pattern, blocks=blocks, sizes=sizes)
    assert count_flops(attend, shape, shape, shape) == 4 * H * live_pairs(pattern, T, T, *blocks, sizes)


@pytest.mark.parametrize("queries, together", [(8, 1), (16, 2), (31, 3), (48, 6)])
def test_rows_that_see_the_same_keys_are_run_as_one(queries, together):
    pattern, T, blocks, sizes = Band(3) | Global(48), 128, (8, 8), Sizes(together=queries, narrow=64)
    (part,) = layout(pattern, T, T, *blocks, sizes)
    assert max(group.together for group in part.groups) == together
    q, k, v, grad = drawn(2, *[(T, 4)] * 4)

    def both(function):
        found, pull = jax.vjp(lambda q, k, v: function(q, k, v, pattern=pattern, valid=jnp.arange(T) != 5), q, k, v)
        return found, pull(grad)

    with jax.default_matmul_precision("highest"):
        assert_alike(both(functools.partial(block_sparse, blocks=blocks, sizes=sizes)), both(dense))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", [Causal(), Causal() & ~Band(3)], ids=["causal", "a hole"])
def test_keys_that_all_see_are_apart(pattern, padded):
    """The predicate is evaluated at the other keys alone; padding and a bias are what they are everywhere."""
    T, S, blocks, sizes = 64, 80, (8, 8), Sizes(unmasked=24, narrow=64, groups=4)
    (part,) = layout(pattern, T, S, *blocks, sizes)
    apart = [group.unmasked for group in part.groups]
    assert max(apart) * 8 >= 40 and all(count == 0 or count >= 3 for count in apart)
    q, grad, k, v = drawn(4, *[(T, 4)] * 2, *[(S, 4)] * 2)
    valid = jnp.arange(S) % 7 > 0 if padded else None
    bias = Wave(jnp.float32(0.7), jnp.float32(-1.3))

    def both(function):
        attend = functools.partial(function, pattern=pattern, valid=valid)
        found, pull = jax.vjp(lambda q, k, v, bias: attend(q, k, v, bias=bias), q, k, v, bias)
        return found, pull(grad)

    with jax.default_matmul_precision("highest"):
        assert_alike(both(functools.partial(block_sparse, blocks=blocks, sizes=sizes)), both(dense))


@pytest.mark.full
@pytest.mark.parametrize("choice, queries", kinds.every_third([*itertools.product(
    ["local:window=4", "block_local:block=8", "axial:shape=8x8", "full"], [64, 200, 1 << 20]
)]))  # fmt: skip
def test_heads_run_alone_or_together_alike(choice, queries):
    """In a loop over heads, of which few or all are run at once, with grouped keys, padding and slopes."""
    B, T, N, K, H = 3, 64, 4, 2, 8
    size: dict[str, Any] = {"length": T, "dim": N * H, "heads": N, "key_heads": K}
    plans = Plan(loop_from=None), Plan(loop_from=1, fused=queries, scores=queries * T)
    batch, loop = (spec.build("attention", choice, **size, plan=plan) for plan in plans)
    assert loop.heads_at_once(T, T, causal=True) == queries // T
    bias = spec.build("position", "alibi", length=T, dim=N * H, heads=N).bias()
    q, k, v, grad = drawn(3, (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    valid = jnp.arange(T) < jnp.array([64, 50, 3])[:, None]

    def both(layer, q, k, v):
        found, pull = jax.vjp(lambda q, k, v: layer.mix(q, k, v, valid=valid, causal=True, bias=bias)[0], q, k, v)
        return found, pull(grad)

    assert_alike(*(jax.jit(functools.partial(both, layer))(q, k, v) for layer in (loop, batch)))
