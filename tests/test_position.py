"""Positions against other implementations, and what each of them promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.position.alibi import slopes
from xformers_lab.position.t5 import bucket


def build(choice: str, **size):
    given: dict[str, Any] = {"length": 16, "dim": 32, "heads": 4} | size
    return spec.build("position", choice, **given)


def read(shared, name: str):
    path = shared / "golden" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no {path.name} here")
    return np.load(path)


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 16, 20])
def test_alibi_is_bloom_and_mpt(shared, heads):
    """BLOOM adds slope * s, MPT slope * (s - last): both differ from -slope * (t - s) by what a softmax forgets."""
    found = read(shared, "alibi")
    np.testing.assert_allclose(slopes(heads), found[f"slopes_{heads}"], rtol=1e-6)
    bias = build("alibi", heads=heads, dim=4 * heads).bias()
    last = jax.vmap(lambda head: head(jnp.array([[15]]), jnp.arange(16)[None]))(bias)[:, 0]
    theirs = found[f"bloom_{heads}"]
    np.testing.assert_allclose(last, theirs - theirs[:, -1:], atol=2e-5, rtol=1e-4)
    if f"mpt_{heads}" in found and heads & (heads - 1) == 0:
        np.testing.assert_allclose(last, found[f"mpt_{heads}"][:, 0], atol=2e-5, rtol=1e-4)


def test_rope_in_pairs_is_gptj(shared):
    found = read(shared, "rope")
    rope = build("rope:pairs=interleaved", length=12, dim=64)
    out = rope.rotate(jnp.asarray(np.swapaxes(found["q"], 1, 2)), jnp.arange(12))
    np.testing.assert_allclose(np.swapaxes(out, 1, 2), found["q_interleaved"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rope_scores_depend_on_the_distance_alone(pairs):
    rope = build(f"rope:pairs={pairs}:scale=2")
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 4, 8)).astype(np.float32)
    score = lambda t, s: (rope.rotate(q, jnp.array([t])) * rope.rotate(k, jnp.array([s]))).sum(-1)
    np.testing.assert_allclose(score(9, 4), score(105, 100), atol=1e-4)
    assert np.abs(score(9, 4) - score(9, 5)).max() > 1e-2


def test_t5_buckets():
    """Exact up to a quarter of the buckets a side, then wider, capped; the future apart from the past."""
    back = np.arange(-200, 201)
    both = np.asarray(bucket(back, 32, 128, True))
    assert list(both[200:208]) == list(range(8)) and both[200 + 8] == 8
    assert (np.diff(both[200:]) >= 0).all() and both[200 + 127] == 15 and both[-1] == 15
    assert both[199] == 17 and both[0] == 31
    past = np.asarray(bucket(back, 32, 128, False))
    assert (past[:201] == 0).all() and list(past[200:216]) == list(range(16)) and past[-1] == 31


@pytest.mark.parametrize("choice", ["alibi", "t5"])
@pytest.mark.parametrize("attention", ["full", "local:window=5", "strided:stride=3"])
def test_bias_is_added_blockwise_as_by_definition(attention, choice):
    """Per block in the engine, as a whole matrix in the reference, also with fewer queries than keys."""
    bias = build(choice).bias()
    mechanism = spec.build("attention", attention, length=16, dim=32, heads=4)
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 16, 4, 8)).astype(np.float32)
    for queries in (q, q[:, -5:]):
        fast, slow = (
            mechanism.mix(queries, k, v, causal=True, bias=bias, method=m)[0] for m in ("attend", "reference")
        )
        np.testing.assert_allclose(fast, slow, atol=2e-5)
    assert np.abs(fast - mechanism.mix(q[:, -5:], k, v, causal=True)[0]).max() > 1e-3


@pytest.mark.parametrize("choice, message", [
    ("t5:buckets=2", "buckets must be even and at least 4"),
    ("t5:farthest=4", "must be above 8"),
    ("rope:scale=0", "scale must be above 0"),
])  # fmt: skip
def test_bad_options(choice, message):
    with pytest.raises(Exception, match=message):
        build(choice)
