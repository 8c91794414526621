"""What is attended to by content, each algorithm written down once more: loops over positions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab import spec

pytestmark = pytest.mark.full

T, D, N, H = 23, 8, 2, 4


def build(choice: str, length: int = T):
    return spec.build("attention", choice, length=length, dim=D, heads=N)


def arrays(seed: int = 0, length: int = T):
    random = np.random.default_rng(seed)
    return [random.standard_normal((1, length, N, H)).astype(np.float32) for _ in range(3)]


def mixed(layer, q, k, v, **options):
    """Outputs (T, N, H) of the fast form."""
    return np.asarray(jax.jit(lambda q, k, v: layer.mix(q, k, v, **options)[0])(q, k, v))[0]


def attend(q, keys, values, scale: float = H**-0.5):
    """One query's softmax over a list of keys and of their values; zeros where there are none."""
    if not len(keys):
        return np.zeros(len(q))
    weights = np.exp(scale * (np.asarray(keys) @ q))
    return weights @ np.asarray(values) / weights.sum()


def assert_each(out, expected):
    """expected(t, n) is what query t of head n gives."""
    expected_out = np.array([[expected(t, n) for n in range(out.shape[1])] for t in range(out.shape[0])])
    np.testing.assert_allclose(out, expected_out, atol=3e-5, rtol=1e-4)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("causal", [False, True])
def test_topk_is_the_best_of_a_sort(causal):
    q, k, v = arrays()

    def expected(t, n):
        seen = range(t + 1 if causal else T)
        best = sorted(seen, key=lambda s: -q[0, t, n] @ k[0, s, n])[:5]
        return attend(q[0, t, n], k[0, best, n], v[0, best, n])

    assert_each(mixed(build("topk:keys=5"), q, k, v, causal=causal), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_moba_is_its_own_block_and_the_best_means(causal):
    q, k, v = arrays(1)
    blocks = [range(start, min(start + 4, T)) for start in range(0, T, 4)]

    def expected(t, n):
        current = t // 4
        others = [b for b in range(len(blocks)) if (b < current if causal else b != current)]
        best = sorted(others, key=lambda b: -q[0, t, n] @ k[0, blocks[b], n].mean(0))[:2]
        seen = [s for b in [current, *best] for s in blocks[b] if s <= t or not causal]
        return attend(q[0, t, n], k[0, seen, n], v[0, seen, n])

    assert_each(mixed(build("moba:block=4:chosen=3"), q, k, v, causal=causal), expected)


def test_sinkhorn_sorts_blocks_by_balanced_weights():
    length, block, turns = 20, 5, 3
    q, k, v = arrays(2, length)
    x = np.random.default_rng(3).standard_normal((1, length, D)).astype(np.float32)
    layer = build(f"sinkhorn:block={block}:iterations={turns}:temperature=0.5:noise=none", length)
    means = x[0].reshape(-1, block, D).mean(1)
    first, second = (np.asarray(weights[...]) for weights in (layer.first, layer.second))

    def expected(t, n):
        order = np.exp(np.maximum(means @ first[n], 0) @ second[n] / 0.5)
        for _ in range(turns):
            order /= order.sum(0, keepdims=True)
            order /= order.sum(1, keepdims=True)
        current = t // block
        in_blocks = lambda y: y[0, :, n].reshape(-1, block, H)
        keys, values = (
            np.concatenate([np.einsum("j,jbh->bh", order[current], in_blocks(y)), in_blocks(y)[current]])
            for y in (k, v)
        )
        return attend(q[0, t, n], keys, values)

    assert_each(mixed(layer, q, k, v, x=jnp.asarray(x)), expected)


def test_routing_attends_to_the_best_keys_of_the_nearest_centroid():
    q, k, v = arrays(4)
    layer = build("routing:clusters=3:window=6")
    centroids = unit(np.asarray(layer.centroids[...]))

    def expected(t, n):
        cluster = np.argmax(centroids[n] @ q[0, t, n])
        best = np.argsort(-unit(k[0, :, n]) @ centroids[n, cluster])[:6]
        return attend(q[0, t, n], k[0, best, n], v[0, best, n])

    assert_each(mixed(layer, q, k, v), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_routing_beside_local_heads_of_normalised_queries_and_keys(causal):
    """The first half of the heads see neighbours, the others a cluster; scores are of vectors of mean 0, variance 1."""
    q, k, v = arrays(4)
    layer = build("routing:clusters=3:window=6:local=0.5:normalised=true")
    centroids = unit(np.asarray(layer.centroids[...]))
    standard = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    queries, keys = standard(q), standard(k)

    def expected(t, n):
        if n < N // 2:
            seen = range(max(0, t - 5), t + 1) if causal else range(max(0, t - 3), min(T, t + 4))
        elif causal:
            own = [
                s
                for s in range(t + 1)
                if np.argmax(centroids[n] @ keys[0, s, n]) == np.argmax(centroids[n] @ queries[0, t, n])
            ]
            seen = own[-6:]
        else:
            seen = np.argsort(-unit(keys[0, :, n]) @ centroids[n, np.argmax(centroids[n] @ queries[0, t, n])])[:6]
        seen = list(seen)
        return attend(queries[0, t, n], keys[0, seen, n], v[0, seen, n]) if seen else np.zeros(H)

    assert_each(mixed(layer, q, k, v, causal=causal), expected)


def test_local_heads_leave_their_centroids_where_they_are():
    q, k, v = arrays(5)
    layer = build("routing:clusters=3:window=6:local=0.5:decay=0.5")
    before = np.asarray(layer.centroids[...])
    layer.mix(q, k, v, key=jax.random.key(0))
    moved = np.abs(np.asarray(layer.centroids[...]) - before).max((1, 2)) > 1e-3
    np.testing.assert_array_equal(moved, np.arange(N) >= N // 2)


def test_training_moves_routing_centroids_to_an_average_of_their_members():
    q, k, v = arrays(5)
    layer = build("routing:clusters=3:window=6:decay=0.75")
    before = np.asarray(layer.centroids[...])
    valid = np.arange(T)[None] < 17
    mixed(layer, q, k, v, valid=jnp.asarray(valid))
    np.testing.assert_array_equal(layer.centroids[...], before)  # not in evaluation

    graph, variables = nnx.split(layer)

    def step(q, k, v):
        trained = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))
        trained.mix(q, k, v, valid=jnp.asarray(valid), key=jax.random.key(0))
        return trained.centroids[...]

    after = np.asarray(jax.jit(step)(q, k, v))
    for n in range(N):
        rows = unit(np.concatenate([q[0, :17, n], k[0, :17, n]]))
        nearest = (rows @ unit(before[n]).T).argmax(1)
        for c in range(3):
            mine = rows[nearest == c]
            expected = 0.75 * before[n, c] + 0.25 * mine.mean(0) if len(mine) else before[n, c]
            np.testing.assert_allclose(after[n, c], expected, atol=1e-5)


def lsh(q, rotations):
    """The bucket of each token in each round by argmax [q R, -q R]."""
    turned = np.einsum("th,rhf->rtf", q, rotations)
    return np.concatenate([turned, -turned], -1).argmax(-1)


@pytest.mark.parametrize("rounds", [1, 3])
def test_reformer_attends_within_hash_buckets_and_neighbouring_chunks(rounds):
    chunk = 4
    q, _, v = arrays(6)
    layer = build(f"reformer:rounds={rounds}:chunk={chunk}:buckets=6")
    rotations = np.asarray(layer.rotations[...])

    def expected(t, n):
        seen = set()
        for bucket in lsh(q[0, :, n], rotations[n]):
            order = sorted(range(T), key=lambda s: (bucket[s], s))
            chunk_of = {s: place // chunk for place, s in enumerate(order)}
            near = lambda s, chunk_of=chunk_of: chunk_of[t] - chunk_of[s] in (0, 1)
            seen |= {s for s in range(T) if bucket[s] == bucket[t] and near(s)}
        seen = sorted(seen - {t}) or [t]
        return attend(q[0, t, n], unit(q[0, seen, n]), v[0, seen, n], 1.0)

    assert_each(mixed(layer, q, q, v), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_reformer_with_one_bucket_is_attention_to_all_others(causal):
    """The limit of its algorithm, with queries as keys and no look at oneself: not softmax attention as elsewhere."""
    q, _, v = arrays(7)

    def expected(t, n):
        seen = [s for s in range(t if causal else T) if s != t] or [t]
        return attend(q[0, t, n], unit(q[0, seen, n]), v[0, seen, n], 1.0)

    assert_each(mixed(build(f"reformer:rounds=1:chunk={T}:buckets=1"), q, q, v, causal=causal), expected)


def test_reformer_comes_near_its_limit_with_rounds():
    q, _, v = arrays(8)
    gap = lambda choice: np.abs(mixed(build(choice), q, q, v) - mixed(build(f"reformer:chunk={T}:buckets=1"), q, q, v))
    few, many = (gap(f"reformer:rounds={rounds}:chunk={T}:buckets=4").mean() for rounds in (1, 32))
    assert many < 0.05 * few
