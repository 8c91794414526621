"""The block-sparse kernel for GPUs computes the definition and leaks nothing, in Pallas' interpreter, without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab.attention._engine import pallas_gpu
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.pallas_gpu import Tuning, Tunings, blocks
from xformers_lab.attention._engine.pattern import Band, Causal, Global, Pattern, Residue
from xformers_lab.attention._engine.random_blocks import RandomBlocks

S = 72  # no multiple of a block
SMALL = Tunings(*[Tuning(16, 16)] * 3)


def run(q, k, v, **how):
    return pallas_gpu.attend(q, k, v, tunings=SMALL, interpret=True, **how)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def arrays(T: int = S, V: int = 8, dtype=jnp.float32):
    """Queries of 4 heads, keys and values of 2, and what outputs are weighed by."""
    random = np.random.default_rng(0)
    shapes = (2, T, 4, 8), (2, S, 2, 8), (2, S, 2, V), (2, T, 4, V)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def marks():
    """Padding in front of the second sample, and two documents in each."""
    at = jnp.arange(S)[None]
    return {"valid": at >= jnp.array([[0], [9]]), "documents": (at >= jnp.array([[40], [25]])).astype(jnp.int32)}


def definition(q, k, v, patterns: list[Pattern], valid=None, documents=None):
    N, shared = q.shape[2], q.shape[2] // k.shape[2]
    patterns = patterns * (N // len(patterns))

    def sample(q, k, v, valid, documents):
        of_head = lambda n: (q[:, n], k[:, n // shared], v[:, n // shared])
        how = {"valid": valid, "documents": documents}
        return jnp.stack([dense(*of_head(n), pattern=patterns[n], **how) for n in range(N)], 1)

    return jax.vmap(sample)(q, k, v, valid, documents)


def assert_alike(attend, expected, T: int = S, V: int = 8, atol: float = 5e-6):
    """Values and gradients."""
    q, k, v, weights = arrays(T, V)
    whole = lambda form: jax.jit(lambda *qkv: (form(*qkv), jax.vjp(form, *qkv)[1](weights)))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), whole(attend), whole(expected))


@pytest.mark.parametrize(
    ("pattern", "T", "marked"),
    [
        (Band(9) & Causal(), S, True),
        (Causal(), 40, False),
        # Two parts, one of them in an order of its own.
        ((Band(3) | Residue(7)) & Causal(), S, True),
        # A predicate that looks something up.
        (RandomBlocks(6, 12, 1, 1, 1, seed=0) & Causal(), S, False),
    ],
    ids=["band", "causal behind", "strided", "random"],
)
def test_computes_the_definition(pattern, T, marked):
    how = marks() if marked else {}
    given = {"patterns": [pattern]} | how
    assert_alike(functools.partial(run, **given), functools.partial(definition, **given), T)


def test_long_rows_are_computed_in_pieces(monkeypatch):
    monkeypatch.setattr(blocks, "SHORT", 1)
    monkeypatch.setattr(blocks, "LONGER", 1)
    pattern = Global(2) | Band(4)
    blocks.work.cache_clear()
    assert len(blocks.work(pattern, S, S, 16, 16)[0].programs.rows)
    given = {"patterns": [pattern]} | marks()
    assert_alike(functools.partial(run, **given), functools.partial(definition, **given))
    blocks.work.cache_clear()


def test_heads_with_patterns_of_their_own_and_values_of_another_size():
    given = {"patterns": [Causal(), Band(5), Causal(), Band(20) & Causal()]}
    assert_alike(functools.partial(run, **given), functools.partial(definition, **given), V=20)


def test_scores_are_capped():
    def capped(q, k, v):
        k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
        s = 2.0 * jnp.tanh(jnp.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5 / 2.0)
        s = jnp.where(Causal()(np.arange(S)[:, None], np.arange(S)), s, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s), v)

    assert_alike(functools.partial(run, patterns=[Causal()], softcap=2.0), capped)


def test_half_precision_is_rounded_as_the_definition_is():
    q, k, v, _ = arrays(dtype=jnp.bfloat16)
    pattern = (Band(3) | Residue(7)) & Causal()
    out = jax.jit(functools.partial(run, patterns=[pattern]))(q, k, v)
    assert out.dtype == jnp.bfloat16
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    wide = definition(q, k, v, [pattern])
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=0.03)


def test_what_is_not_seen_changes_nothing_to_the_bit():
    """Keys to come, of another document, and padding."""
    q, k, v, weights = arrays()
    masks, pattern, at = marks(), (Band(20) | Global(1)) & Causal(), 30
    attend = jax.jit(lambda q, k, v: run(q, k, v, patterns=[pattern], **masks))
    before = attend(q, k, v)
    # The second sample's query 30 sees its document from position 25 on; the first's, from position 0 on.
    hidden = (np.arange(S) > at)[None] | ~np.asarray(masks["valid"]) | (np.arange(S) < np.array([[0], [25]]))
    other = jnp.where(hidden[:, :, None, None], 100.0, 0.0)
    after = attend(q, k + other, v - other)
    np.testing.assert_array_equal(after[:, at], before[:, at])
    assert (np.asarray(after[:, at + 1 :]) != np.asarray(before[:, at + 1 :])).any()
    grads = jax.jit(jax.grad(lambda *kv: (attend(q, *kv) * weights).sum(), (0, 1)))(k, v)
    for grad in grads:
        assert not np.asarray(grad)[~np.asarray(masks["valid"])].any() and np.asarray(grad).any()


def test_queries_that_see_nothing_give_zeros():
    q, k, v, weights = arrays(T=S)
    nothing = jnp.zeros((2, S), bool)
    attend = functools.partial(run, patterns=[Band(9)], valid=nothing)
    out, pull = jax.vjp(jax.jit(attend), q, k, v)
    for each in (out, *pull(weights)):
        np.testing.assert_array_equal(each, jnp.zeros_like(each))
