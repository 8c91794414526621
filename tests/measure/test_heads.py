"""What heads do in numbers: cases whose answers are known."""

import numpy as np
import pytest

from xformers_lab.measure.heads import NOTHING, ONE_TOKEN, figures_of

T = 8


def figures(weights: np.ndarray, causal: bool = True, real=None, **more):
    """Of weights (T, S) or (L, N, T, S)."""
    weights = weights if weights.ndim == 4 else weights[None, None]
    real_keys = np.ones(weights.shape[3], bool) if real is None else np.asarray(real)
    real_queries = np.ones(weights.shape[2], bool) if real is None else real_keys
    return figures_of(weights, causal=causal, real_queries=real_queries, real_keys=real_keys, **more)


def uniform(causal: bool, real: int = T) -> np.ndarray:
    seen = (np.tri(T) if causal else np.ones((T, T))) * (np.arange(T) < real)
    return seen / seen.sum(-1, keepdims=True)


def test_equal_weights_have_the_logarithm_of_the_keys():
    """Query t of a causal text sees t + 1 keys: log2(t + 1) bits, t / 2 tokens away, 1 / (t + 1) on each; the first
    query has no choice and does not count."""
    found = figures(uniform(causal=True))
    at = np.arange(1, T)
    assert found.entropy[0, 0] == pytest.approx(np.log2(at + 1).mean())
    assert found.relative[0, 0] == pytest.approx(1)
    assert found.distance[0, 0] == pytest.approx((at / 2).mean())
    assert found.first[0, 0] == found.itself[0, 0] == found.fixed[0, 0] == pytest.approx((1 / (at + 1)).mean())
    assert found.total[0, 0] == pytest.approx(1) and found.padding[0, 0] == 0
    both = figures(uniform(causal=False), causal=False)
    assert both.entropy[0, 0] == pytest.approx(3) and both.relative[0, 0] == pytest.approx(1)
    assert both.distance[0, 0] == pytest.approx(np.abs(np.subtract.outer(np.arange(T), np.arange(T))).mean())


def test_a_head_that_looks_one_token_back():
    found = figures(np.eye(T, k=-1) + np.eye(T) * (np.arange(T) == 0))
    assert found.entropy[0, 0] == 0 and found.relative[0, 0] == 0 and found.distance[0, 0] == 1
    assert found.itself[0, 0] == 0 and found.first[0, 0] == pytest.approx(1 / 7) and not found.dead[0, 0]


def test_half_on_the_first_half_on_itself():
    weights = np.eye(T) / 2
    weights[:, 0] += 0.5
    found = figures(weights)
    assert found.entropy[0, 0] == pytest.approx(1) and found.distance[0, 0] == pytest.approx(2)
    assert found.first[0, 0] == found.itself[0, 0] == pytest.approx(0.5)


def test_padding_is_left_out_and_counted():
    real = np.arange(T) < 5
    found = figures(uniform(False, 5), causal=False, real=real)
    assert found.padding[0, 0] == 0 and found.entropy[0, 0] == pytest.approx(np.log2(5))
    assert found.relative[0, 0] == pytest.approx(1)
    leaking = figures(uniform(False), causal=False, real=real)  # a mechanism that looks at padding
    assert leaking.padding[0, 0] == pytest.approx(3 / 8)


def test_packed_documents_see_their_own_tokens_alone():
    documents = np.arange(T) // 4
    own = documents[:, None] == documents
    found = figures(own / 4, causal=False, documents=documents)
    assert found.relative[0, 0] == pytest.approx(1) and found.entropy[0, 0] == pytest.approx(2)


def test_the_first_token_is_the_first_that_is_no_padding():
    weights = np.zeros((T, T))
    weights[:, 2] = 1
    assert figures(weights, causal=False, real=np.arange(T) >= 2).first[0, 0] == 1


def test_signs_are_kept_in_the_sum_alone():
    weights = np.zeros((T, T))
    weights[:, 0], weights[:, 1] = 1.5, -0.5
    found = figures(weights, causal=False)
    assert found.total[0, 0] == pytest.approx(1) and found.first[0, 0] == pytest.approx(0.75)
    p = np.array([0.75, 0.25])
    assert found.entropy[0, 0] == pytest.approx(-(p * np.log2(p)).sum())


def test_dead_heads():
    """One is on the first token, one adds nothing, one is alive; the last key, which one query alone may look at, makes
    no head dead."""
    sink, last = np.zeros((T, T)), np.eye(T)
    sink[:, 0] = 1
    weights = np.stack([sink, uniform(True), uniform(True), last])[None]
    norms = np.ones((1, 4, T)) * np.array([1, 0.01, 1, 1])[:, None]
    found = figures(weights, norms=norms)
    assert found.reason.tolist() == [[ONE_TOKEN, NOTHING, "", ""]]
    assert found.dead.tolist() == [[True, True, False, False]]
    np.testing.assert_allclose(found.output[0], np.array([1, 0.01, 1, 1]) / 0.7525)
    assert not figures(weights).dead[0, 1] and np.isnan(figures(weights).output).all()
    assert figures(weights, norms=np.zeros((1, 4, T))).dead.all()


def test_without_a_choice_there_are_no_figures():
    found = figures(np.ones((1, 1)))
    assert np.isnan(found.entropy).all() and np.isnan(found.fixed).all() and not found.dead.any()


def test_of_another_sequence_there_is_no_distance():
    weights = np.full((1, 1, 3, 4), 0.25)
    found = figures_of(weights, causal=False, real_queries=np.ones(3, bool), real_keys=np.arange(4) < 4, crosses=True)
    assert np.isnan(found.distance).all() and np.isnan(found.itself).all() and found.entropy[0, 0] == 2
