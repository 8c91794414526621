"""Kernels, random features and landmarks: other implementations' numbers, and what makes each algorithm itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close

from xformers_lab import spec
from xformers_lab.attention import nystrom
from xformers_lab.attention._engine.landmarks import inverse, means, probabilities, segments
from xformers_lab.attention._engine.linear import features
from xformers_lab.attention.linear import taylor
from xformers_lab.errors import UsageError

pytestmark = pytest.mark.full


def build(choice: str, length: int, dim: int, heads: int, kv_heads: int | None = None):
    return spec.build("attention", choice, length=length, dim=dim, heads=heads, kv_heads=kv_heads)


def time_first(x):
    """(B, N, T, H) -> (B, T, N, H), and back."""
    return np.swapaxes(x, 1, 2)


def draw(seed: int, *shapes: tuple[int, ...], scale: float = 1.0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(scale * random.standard_normal(shape), jnp.float32) for shape in shapes]


def softmax(q, k, v):
    return jax.nn.softmax(q @ k.T * q.shape[1] ** -0.5, -1) @ v


# ---- other implementations ---------------------------------------------------------------------------------------


def test_taylor_features_are_based(golden):
    peer = golden("based_taylor_naive")
    scale = peer["q"].shape[-1] ** -0.25

    def head(q, k, v):
        q, k = taylor(q * scale), taylor(k * scale)
        out, total = features.sums(q, k, v, valid=None, causal=True, chunk=5)
        return out / (total + 1e-6)[:, None]

    assert_close(jax.vmap(jax.vmap(head))(peer["q"], peer["k"], peer["v"]), peer["y"])


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_softmax_features_are_efficient_attention(golden, method):
    """The package divides by sqrt(H) = 4 as well; the paper does not, and neither do we."""
    peer = golden("shen_linear_attention")
    q, k, v = (time_first(peer[name]) for name in "qkv")
    out = build("linear:features=softmax", 24, 64, 4).mix(q, k, v, method=method)[0]
    assert_close(out / 4, time_first(peer["y"]))


def test_causal_efficient_attention_differs_by_its_normaliser(golden):
    """The package's causal form is another one: softmax(q) and exp(k) as features of linear attention, normalised by
    the sum of weights, over the buckets of 6 before the query's own. Ours is the paper's softmax over positions,
    restricted to those the query sees, so that the last query's output is that of the bidirectional form."""
    peer = golden("shen_linear_attention")

    def head(q, k, v):
        rows = [jnp.zeros((6, 16))]
        for end in (6, 12, 18):
            options = {"valid": None, "causal": False, "chunk": 4}
            out, total = features.sums(jax.nn.softmax(q[end : end + 6], -1), jnp.exp(k[:end]), v[:end], **options)
            rows.append(features.divided(out, total))
        return jnp.concatenate(rows)

    assert_close(jax.vmap(jax.vmap(head))(peer["q"], peer["k"], peer["v"]), peer["y_causal"])
    linear = build("linear:features=softmax:chunk=5", 24, 64, 4)
    q, k, v = (time_first(peer[name]) for name in "qkv")
    causal, both = (linear.mix(q, k, v, causal=causal)[0] for causal in (True, False))
    assert_close(causal[:, -1], both[:, -1])


def whole_batch(q, k, landmarks: int):
    """1 / the largest column sum over all matrices of a batch, from which both packages start their inverses; here
    every head starts from its own, so that samples do not depend on each other."""

    def middle(q, k):
        member = segments(None, len(q), landmarks)
        return probabilities(means(q, member), means(k, member))

    per_head = jax.vmap(jax.vmap(middle, in_axes=1), in_axes=0)
    return 1 / per_head(q, k).sum(-2).max()


@pytest.mark.parametrize("package", ["nystrom_lucidrains", "nystromformer_noconv"])
def test_nystrom_is_both_packages(golden, package, monkeypatch):
    peer = golden(package)
    x, meta = peer["x"], peer["meta"]
    N, m = meta["heads"], meta["num_landmarks"]
    if package == "nystrom_lucidrains":
        q, k, v = np.split(x @ peer["w.to_qkv.weight"].T, 3, -1)
        finish = lambda y: y @ peer["w.to_out.0.weight"].T + peer["w.to_out.0.bias"]
    else:
        q, k, v = (x @ peer[f"w.{name}.weight"].T + peer[f"w.{name}.bias"] for name in ("query", "key", "value"))
        finish = lambda y: y
    q, k, v = (y.reshape(2, 32, N, 8) for y in (q, k, v))
    scale = whole_batch(q, k, m)
    monkeypatch.setattr(nystrom, "inverse", lambda a, iterations: inverse(a, iterations, scale))
    out = build(f"nystrom:landmarks={m}:kernel=0", 32, 32, N).mix(q, k, v)[0]
    assert_close(finish(out.reshape(2, 32, 32)), peer["y"])


def test_inverse_is_nystromformers(golden):
    peer = golden("nystromformer_noconv")
    scale = 1 / peer["mat"].sum(-2).max()
    ours = jax.vmap(jax.vmap(lambda a: inverse(a, 6, scale)))(peer["mat"])
    np.testing.assert_allclose(ours, peer["pinv"], atol=2e-4, rtol=1e-4)


def test_inverse_converges():
    a = jnp.eye(7) + draw(0, (7, 7), scale=0.1)[0]
    assert_close(inverse(a, 12) @ a, jnp.eye(7))
    assert np.abs(inverse(a, 2) @ a - jnp.eye(7)).max() > 0.01
    rank_one = jnp.ones((5, 5))  # its Moore-Penrose inverse is itself / 25
    assert_close(inverse(rank_one, 10), rank_one / 25)


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_yoso_is_the_expectation_of_transformers(golden, method):
    peer = golden("yoso_expectation")
    x, N, bits = peer["x"], peer["meta"]["heads"], peer["meta"]["hash_code_len"]
    q, k, v = (x @ peer[f"w.{name}.weight"].T + peer[f"w.{name}.bias"] for name in ("query", "key", "value"))
    out = build(f"yoso:bits={bits}", 16, 32, N).mix(*(y.reshape(2, 16, N, 8) for y in (q, k, v)), method=method)[0]
    assert_close(out.reshape(2, 16, 32), peer["y"])


# ---- feature maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H", [1, 2, 5, 8])
def test_taylor_counts_every_product_once(H):
    q, k = draw(H, (3, H), (4, H))
    s = q @ k.T
    assert_close(taylor(q) @ taylor(k).T, 1 + s + s**2 / 2)


def test_cosformer_weights_fall_with_distance():
    linear = build("linear:features=cosformer", 12, 8, 1)
    one = jnp.ones((12, 8))
    weights = linear.attend(one, one, jnp.eye(12, 8), causal=False)  # the weights of keys 0 .. 7
    expected = np.cos(np.pi / 2 * (np.arange(12)[:, None] - np.arange(12)) / 12)
    assert_close(weights, (expected / expected.sum(1, keepdims=True))[:, :8])


def test_hedgehog_learns_and_begins_as_the_identity():
    linear = build("linear:features=hedgehog", 9, 8, 1)
    q, k, v = draw(0, (9, 8), (9, 8), (9, 8))
    weights = jnp.exp(q) @ jnp.exp(k).T + jnp.exp(-q) @ jnp.exp(-k).T
    out = linear.attend(q, k, v, causal=False, maps=linear.per_head()["maps"][0])
    assert_close(out, weights @ v / weights.sum(1, keepdims=True))


@pytest.mark.parametrize(
    "choice, message",
    [
        ("linear:chunk=0", "chunk must be at least 1"),
        ("linear:nu=2", "nu is an option of features=dpfp, got features=elu"),
        ("linear:features=dpfp:nu=16", "nu must be between 1 and 15 for heads of 8"),
        ("linear:features=taylor:width=9", "width must be between 0 and 8"),
        ("linear:features=relu:width=4", "width is an option of features=taylor and features=hedgehog"),
        ("linear:features=rellu", "relu"),
        ("performer:features=0", "features must be at least 1"),
        ("performer:chunk=0", "chunk must be at least 1"),
        ("performer:epsilon=-1", "epsilon must be at least 0"),
        ("performer:kernel=relu:epsilon=0.001", "epsilon is an option of kernel=softmax"),
        ("nystrom:landmarks=0", "landmarks must be at least 1"),
        ("nystrom:kernel=4", "kernel must be 0 or odd, got 4: 5 is the next"),
        ("nystrom:iterations=0", "iterations must be at least 1"),
        ("csalr:landmarks=0", "landmarks must be at least 1"),
        ("skyformer:landmarks=1", "landmarks must be at least 2, a query and a key"),
        ("skyformer:ridge=0", "ridge must be above 0"),
        ("low_rank_band:rank=0", "rank must be at least 1"),
        ("yoso:bits=0", "bits must be at least 1"),
    ],
)
def test_impossible_options_are_refused(choice, message):
    with pytest.raises(UsageError, match=message):
        build(choice, 16, 16, 2)


# ---- keys of very different size ---------------------------------------------------------------------------------


def test_an_exponential_key_is_not_drowned_by_a_later_one():
    """Features relative to the largest of all keys would be 0 for the first ones, and so would the output."""
    performer = build("performer:chunk=4", 11, 16, 1)
    q, k, v = draw(1, (11, 16), (11, 16), (11, 16))
    k = k * (30.0 - 3 * jnp.arange(11))[:, None]  # exp(-|k|^2 / 2): small keys, by hundreds of powers of e, come first
    W = performer.per_head()["projection"][0]
    out = performer.attend(q, k, v, causal=True, projection=W)
    assert_close(out[0], v[0])
    longer = performer.attend(q, k.at[6:].set(0), v, causal=True, projection=W)
    np.testing.assert_array_equal(longer[:6], out[:6])
    assert np.abs(performer.attend(q, k, v, causal=False, projection=W)[0] - v[0]).max() > 0.1


@pytest.mark.parametrize("T, S, chunk", [(9, 9, 4), (4, 9, 3), (9, 4, 2), (1, 5, 8)])
def test_scaled_recurrence_is_its_sum(T, S, chunk):
    q, k, v, log = draw(2, (T, 3), (S, 3), (S, 5), (S,))
    q, k, log = jnp.abs(q), jnp.abs(k), 4 * log
    out, total = features.scaled_recurrence(q, k, v, log, chunk=chunk)
    weights = jnp.tril(q @ (k * jnp.exp(log)[:, None]).T, S - T)
    seen = np.asarray(weights.sum(1)) > 0
    assert_close((out / total[:, None])[seen], (weights @ v / weights.sum(1, keepdims=True))[seen])
    assert not np.asarray(out)[~seen].any()


# ---- random features ---------------------------------------------------------------------------------------------


def test_performer_rows_are_orthogonal_with_gaussian_lengths():
    W = np.asarray(build("performer:features=300", 8, 16, 2).projection[...])
    assert W.shape == (2, 300, 8)
    blocks = W[:, :296].reshape(-1, 8, 8)
    gram = blocks @ blocks.transpose(0, 2, 1)
    off = gram - np.einsum("bii->bi", gram)[..., None] * np.eye(8)
    assert np.abs(off).max() < 1e-4
    lengths = np.square(W).sum(-1)
    assert abs(lengths.mean() - 8) < 0.6 and abs(lengths.var() - 16) < 5  # chi squared with 8 degrees of freedom
    assert np.abs(W.mean((0, 1))).max() < 0.2


def test_performer_comes_near_the_softmax_with_many_features():
    q, k, v = draw(3, (24, 8), (24, 8), (24, 8))
    q, k, expected = q / 2, k / 2, softmax(q / 2, k / 2, v)

    def error(features):
        performer = build(f"performer:features={features}", 24, 64, 8)
        out = jax.vmap(lambda W: performer.attend(q, k, v, causal=False, projection=W))(performer.projection[...])
        return float(jnp.sqrt(jnp.square(out - expected).mean()))

    few, many = error(32), error(2048)
    assert many < 0.05 and 4 < few / many < 16  # 8 = sqrt(2048 / 32)


def favor(q, k, v, W, epsilon):
    """softmax_kernel and linear_attention of the performer-pytorch package, for one head."""
    scaled = lambda x: x * x.shape[1] ** -0.25

    def phi(x, axes):
        dash, half = scaled(x) @ W.T, (scaled(x) ** 2).sum(1, keepdims=True) / 2
        return len(W) ** -0.5 * (np.exp(dash - half - dash.max(axes, keepdims=True)) + epsilon)

    weights = phi(q, 1) @ phi(k, None).T
    return weights @ v / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("method", ["attend", "reference", "step"])
def test_performer_with_epsilon_is_that_of_performer_pytorch(method):
    """Causally a query's keys are scaled by the largest among them alone: the package's formula on what it sees."""
    layer, T = build("performer:epsilon=0.01:features=12:chunk=4", 9, 8, 1), 9
    q, k, v = (2 * np.random.default_rng(i).standard_normal((T, 8)) for i in range(3))
    W = np.asarray(layer.projection[0], np.float64)
    rows = np.concatenate([favor(q[t : t + 1], k[: t + 1], v[: t + 1], W, 0.01) for t in range(T)])
    if method == "step":
        one = lambda state, new: layer.step(state, *new, projection=layer.projection[0])[::-1]
        steps = lambda *new: jax.lax.scan(one, layer.init_state(T), new)[1]
        return assert_close(jax.jit(steps)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v))), rows)
    run = lambda *x: [layer.mix(*x, causal=causal, method=method)[0][0, :, 0] for causal in (True, False)]
    causal, both = jax.jit(run)(*(jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k, v)))
    assert_close(causal, rows)
    assert_close(both, favor(q, k, v, W, 0.01))
    assert np.abs(both - favor(q, k, v, W, 0)).max() > 0.01


def test_performer_redraws_in_training_alone():
    q, k, v = draw(4, (1, 6, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8))
    once, step = (build(f"performer:redraw={when}", 6, 16, 2) for when in ("once", "step"))
    out = lambda layer, seed: layer.mix(q, k, v, key=None if seed is None else jax.random.key(seed))[0]
    np.testing.assert_array_equal(out(once, 0), out(once, None))
    assert np.abs(out(step, 0) - out(step, 1)).max() > 1e-3
    np.testing.assert_array_equal(out(step, None), out(once, None))


# ---- landmarks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["nystrom:landmarks=4:kernel=3", "csalr:landmarks=4", "skyformer:landmarks=8"])
def test_padding_is_as_if_it_were_not_there(choice):
    """Landmarks, inverses and convolutions of 13 positions and 6 of padding are those of 13 positions."""
    layer = build(choice, 19, 32, 4, kv_heads=2)
    q, k, v = draw(5, (1, 19, 4, 8), (1, 19, 2, 8), (1, 19, 2, 8))
    out = layer.mix(q, k, v, valid=jnp.arange(19)[None] < 13)[0]
    assert_close(out[:, :13], layer.mix(q[:, :13], k[:, :13], v[:, :13])[0])


@pytest.mark.parametrize("choice", ["csalr:landmarks=17", "nystrom:landmarks=40:kernel=0:iterations=20"])
def test_a_landmark_for_every_position_gives_full_attention(choice):
    q, k, v = draw(6, (17, 16), (17, 16), (17, 16))
    np.testing.assert_allclose(build(choice, 17, 16, 1).attend(q, k, v), softmax(q, k, v), atol=2e-4)


def test_csalr_rows_sum_to_one():
    q, k, v = draw(7, (30, 8), (30, 8), (1, 8))
    assert_close(build("csalr:landmarks=4", 30, 8, 1).attend(q, k, jnp.tile(v, (30, 1))), jnp.tile(v, (30, 1)))


def test_skyformer_comes_near_its_kernel():
    q, k, v = draw(8, (20, 8), (20, 8), (20, 8), scale=0.7)
    expected = jnp.exp(-jnp.square(q[:, None] - k).sum(-1) / (2 * 8**0.5)) @ v

    def error(landmarks):
        layer = build(f"skyformer:landmarks={landmarks}:ridge=0.0001:iterations=20", 20, 8, 1)
        every = (jnp.arange(landmarks // 2) + 0.5) / (landmarks // 2)
        out = layer.attend(q, k, v, drawn=jnp.tile(every, 2))
        return float(jnp.abs(out - expected).max() / jnp.abs(expected).max())

    assert error(40) < 0.01 < error(6)


def test_skyformer_draws_landmarks_that_are_no_padding():
    layer = build("skyformer:landmarks=64", 50, 8, 1)
    valid = jnp.arange(50) % 7 == 3
    at = np.asarray(layer._positions(valid, 50, layer.landmarks_at[0], None))
    assert np.asarray(valid)[at].all() and set(at) == set(np.flatnonzero(valid))
