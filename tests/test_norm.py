"""Placements and normalisers: what their papers promise of values and of the first gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.model import build_task
from xformers_lab.train import optimizer
from xformers_lab.train.state import init, merge, structure


def build(shelf: str, choice: str, **size):
    given: dict[str, Any] = {"length": 16, "dim": 32, "heads": 4, "layers": 2} | size
    return spec.build(shelf, choice, **given)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 3 + 1, jnp.float32)


@pytest.mark.parametrize("name", spec.names("normaliser"))
def test_every_normaliser_keeps_shape_and_type(name):
    norm = build("normaliser", name)
    x = draw(2, 5, 32)
    assert norm(x).shape == x.shape
    half = build("normaliser", name, dtype="bfloat16")(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), norm(x), atol=0.05)
    assert np.isfinite(norm(jnp.zeros((1, 1, 32)))).all()
    grad = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 1, 32)))
    assert np.isfinite(grad).all()


def test_scalenorm_has_one_length():
    out = build("normaliser", "scalenorm")(draw(2, 5, 32))
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), 32**0.5, rtol=1e-5)


def test_adanorm_is_its_equation():
    x = draw(2, 5, 32)
    y = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(build("normaliser", "adanorm:c=2:k=0.2")(x), 2 * (1 - 0.2 * y) * y, atol=1e-5)
    # The factor counts as a constant: the derivative of y times it, not of the product.
    factor = jax.lax.stop_gradient(2 * (1 - 0.2 * y))
    normalised = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    expected = jax.grad(lambda x: (factor * normalised(x) * y).sum())(x)
    found = jax.grad(lambda x: (build("normaliser", "adanorm:c=2:k=0.2")(x) * y).sum())(x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dyt_is_its_equation():
    x = draw(2, 5, 32)
    np.testing.assert_allclose(build("normaliser", "dyt:start=0.3")(x), np.tanh(0.3 * x), atol=1e-6)


def test_rezero_starts_as_the_identity():
    x = draw(2, 5, 32)
    rezero = build("norm", "rezero")
    np.testing.assert_array_equal(rezero.after(x, 7 * x), x)
    assert rezero.before(x) is x


def test_sandwich_bounds_the_branch():
    x, y = draw(2, 5, 32), 1000 * draw(2, 5, 32)
    out = build("norm", "sandwich").after(x, y) - x
    np.testing.assert_allclose(out.std(-1), 1, atol=1e-3)


def test_deepnorm_scales_the_stream_and_the_first_weights():
    placed, attention = build("norm", "deepnorm", layers=8), build("attention", "full", layers=8)
    before = {name: jnp.asarray(getattr(attention, name).kernel[...]) for name in ("query", "key", "value", "out")}
    placed.start(attention)
    for name, kernel in before.items():
        share = 64**-0.25 if name in ("value", "out") else 1
        np.testing.assert_allclose(getattr(attention, name).kernel[...], share * kernel, rtol=1e-6)
    x = draw(2, 5, 32)
    np.testing.assert_allclose(placed.after(x, 0 * x), placed.norm(16**0.25 * x), rtol=1e-6)
    ffn = build("ffn", "mlp", layers=8)
    kernel = jnp.asarray(ffn.up.kernel[...])
    placed.start(ffn)
    np.testing.assert_allclose(ffn.up.kernel[...], 64**-0.25 * kernel, rtol=1e-6)


def test_normformer_is_its_equations():
    x = draw(2, 5, 32)
    unit = lambda y: (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
    placed, plain, attention = build("norm", "normformer"), build("attention", "full"), build("attention", "full")
    placed.start(attention)
    attention.out.gain[...] = jnp.array([2.0, 0, 0, 0])  # the first head alone, twice
    weights = plain.out.kernel[...]
    plain.out.kernel[...] = jnp.where(jnp.arange(32)[:, None] < 8, 2 * weights, 0)
    y = attention(placed.before(x))[0]
    np.testing.assert_allclose(y, plain(unit(x))[0], atol=1e-5)
    np.testing.assert_allclose(placed.after(x, y), x + unit(y), atol=1e-5)
    placed, plain, ffn = build("norm", "normformer"), build("ffn", "mlp"), build("ffn", "mlp")
    placed.start(ffn)
    hidden = jax.nn.gelu(plain.up(unit(x)))
    expected = x + plain.down(unit(hidden))
    np.testing.assert_allclose(placed.after(x, ffn(placed.before(x))[0]), expected, atol=1e-5)


@pytest.mark.parametrize("shelf, choice", [("ffn", "moe"), ("attention", "fnet")])
def test_normformer_refuses_what_has_no_place_for_it(shelf, choice):
    with pytest.raises(ValueError, match=f"no place in {choice}"):
        build("norm", "normformer").start(build(shelf, choice))


def first_gradient(norm: str, layers: int) -> float:
    """The mean norm over seeds of the loss's gradient to the last feed-forward's second matrix, at the start, with
    uniform attention as in the theorem (queries and keys at zero)."""
    config = edit(Config(), task="copy", norm=norm, layers=layers, dim=64, heads=2, seq_len=32, batch=8)
    config = edit(config, position="none", ffn="mlp:ratio=1:activation=relu")
    task, tokens = build_task(config), np.random.default_rng(0).integers(0, 10, (8, 32))
    graph, rule = structure(config, task), optimizer.build(config.train)

    def silent(path, leaf):
        return 0 * leaf if "query" in jax.tree_util.keystr(path) else leaf

    def loss(params):
        logits = merge(graph, params, {}, {})(jnp.asarray(tokens), real=None)[0]
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    gradient, found = jax.jit(jax.grad(loss)), []
    for seed in range(4):
        params = init(edit(config, seed=seed), task, rule).params
        grads = gradient(jax.tree_util.tree_map_with_path(silent, params))
        named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
        last = next(leaf for name, leaf in named.items() if "down" in name and "kernel" in name)
        found.append(float(jnp.linalg.norm(last[-1])))
    return float(np.mean(found))


def test_first_gradients_follow_xiong():
    """Xiong et al., 2020, theorem 1: at the last layer Post-LN's are flat in depth, Pre-LN's fall as 1 / sqrt(L)."""
    post = [first_gradient("post", layers) for layers in (2, 8)]
    pre = [first_gradient("pre", layers) for layers in (2, 8)]
    assert max(post) / min(post) < 1.6  # at this width the mean over seeds is not yet flat
    assert 1.5 < pre[0] / pre[1] < 2.8  # sqrt(8 / 2) = 2
