"""The block-sparse kernel for GPUs computes the definition and leaks nothing, in Pallas' interpreter, without a GPU."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from xformers_lab import spec
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.pallas_gpu import blocks
from xformers_lab.attention._engine.pallas_gpu.flash import flash
from xformers_lab.attention._engine.pallas_gpu.tuning import Tuning, Tunings
from xformers_lab.attention._engine.pattern import Band, Causal, Global, Pattern, Residue
from xformers_lab.attention._engine.random_blocks import RandomBlocks
from xformers_lab.measure.flops import count_flops

S = 72  # no multiple of a block
SMALL = Tunings(*[Tuning(16, 16)] * 3)


def run(q, k, v, **how):
    return flash(q, k, v, tunings=SMALL, interpret=True, **how)


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


def patterned():
    """Mechanisms that are the average over a pattern, as it stands."""
    kinds = {name: spec.entry("attention", name) for name in spec.names("attention")}
    plain = lambda kind: kind.attend is Patterned.attend and kind.attend_heads is Patterned.attend_heads
    return [name for name, kind in kinds.items() if issubclass(kind, Patterned) and plain(kind)]


def first_brief(names):
    """The first, and one whose parts have orders of their own, in brief; the others where there is time."""
    brief = (names[0], "strided")
    return [pytest.param(name, marks=[] if name in brief else [pytest.mark.full]) for name in names]


@pytest.mark.parametrize("name", first_brief(patterned()))
def test_every_pattern_is_lowered_for_cuda(name):
    mechanism = spec.build("attention", name, length=512, dim=256, heads=4, kv_heads=2)
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    arrays = shape(2, 512, 4, 64), shape(2, 512, 2, 64), shape(2, 512, 2, 64)
    masks = shape(2, 512, dtype=bool), shape(2, 512, dtype=jnp.int32)
    for causal in (False, True):

        def total(q, k, v, valid, documents, causal=causal):
            how = {"patterns": mechanism.all_seen(causal), "valid": valid, "documents": documents}
            return flash(q, k, v, **how).astype(jnp.float32).sum()

        with on_hopper():
            traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays, *masks)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert all(f"attention_{kernel}" in text for kernel in ("forward", "backward_queries", "backward_keys"))


def on_hopper():
    """Newer versions of JAX want to know the GPU that Triton is to compile for."""
    if "platform" not in inspect.signature(AbstractDevice).parameters:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))


def test_its_products_are_counted_by_live_blocks():
    """Of 5 blocks of 16 queries, causal, 15 blocks are live: 2 products forward, then 3 and 4, each of 16 numbers."""
    shape = lambda heads: jax.ShapeDtypeStruct((2, 80, heads, 16), jnp.float32)
    total = lambda q, k, v: run(q, k, v, patterns=[Causal()]).sum()
    product = 2 * (2 * 4) * 15 * 16 * 16 * 16
    assert count_flops(lambda *qkv: run(*qkv, patterns=[Causal()]), shape(4), shape(2), shape(2)) == 2 * product
    delta = 2 * 2 * 80 * 4 * 16  # outputs times their gradients
    assert count_flops(jax.grad(total, (0, 1, 2)), shape(4), shape(2), shape(2)) == (2 + 3 + 4) * product + delta
