"""Placements and normalisers: what their papers promise of values and of the first gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.nn import backward
from xformers_lab.nn.embedding import START
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.tasks import Setting, Task
from xformers_lab.train import checkpoint, jobs, loop, optimizer
from xformers_lab.train.state import init, merge, split, structure
from xformers_lab.train.step import make_train_step

pytestmark = pytest.mark.full


def build(shelf: str, choice: str, **size):
    sizes: dict[str, Any] = {"length": 16, "dim": 32, "heads": 4, "layers": 2} | size
    return spec.build(shelf, choice, **sizes)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 3 + 1, jnp.float32)


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
    gradient = jax.grad(lambda x: (build("normaliser", "adanorm:c=2:k=0.2")(x) * y).sum())(x)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_dyt_is_its_equation():
    x = draw(2, 5, 32)
    np.testing.assert_allclose(build("normaliser", "dyt:start=0.3")(x), np.tanh(0.3 * x), atol=1e-6)


def test_rezero_starts_as_the_identity():
    x = draw(2, 5, 32)
    rezero = build("norm", "rezero")
    np.testing.assert_array_equal(rezero.after(x, 7 * x, LayerContext()), x)
    assert rezero.before(x, LayerContext()) is x


def test_sandwich_bounds_the_branch():
    x, y = draw(2, 5, 32), 1000 * draw(2, 5, 32)
    placed = build("norm", "sandwich")
    placed.start(build("ffn", "mlp"))
    out = placed.after(x, y, LayerContext()) - x
    np.testing.assert_allclose(out.std(-1), 1, atol=1e-3)


@pytest.mark.parametrize("depths, alpha, beta", [
    ({"layers": 8}, 16**0.25, 64**-0.25),
    ({"layers": 6, "target_layers": 4}, 0.81 * (6**4 * 4) ** (1 / 16), 0.87 * (6**4 * 4) ** (-1 / 16)),  # an encoder
    ({"layers": 4, "source_layers": 6}, 12**0.25, 48**-0.25),  # the decoder that looks at it
])  # fmt: skip
def test_deepnorm_scales_the_stream_and_the_first_weights(depths, alpha, beta):
    placed, attention = build("norm", "deepnorm", **depths), build("attention", "full")
    before = {name: jnp.asarray(getattr(attention, name).kernel[...]) for name in ("query", "key", "value", "out")}
    placed.start(attention)
    for name, kernel in before.items():
        share = beta if name in ("value", "out") else 1
        np.testing.assert_allclose(getattr(attention, name).kernel[...], share * kernel, rtol=1e-6)
    x = draw(2, 5, 32)
    np.testing.assert_allclose(placed.after(x, 0 * x, LayerContext()), placed.norm(alpha * x), rtol=1e-6)


def test_deepnorm_knows_an_encoder_from_its_decoder():
    config = edit(Config(), task="copy", seq_len=9, norm="deepnorm", layers=6, model="encoder_decoder", dim=8)
    model: Any = nnx.eval_shape(lambda: build_model(config, build_task(config)))
    encoder, decoder = model.encoder.periods[0], model.stack.periods[0]
    for norm in (encoder.attention_norm, encoder.ffn_norm):
        np.testing.assert_allclose((norm.alpha, norm.beta), (0.81 * 6 ** (5 / 16), 0.87 * 6 ** (-5 / 16)), rtol=1e-6)
    for norm in (decoder.attention_norm, decoder.cross_norm, decoder.ffn_norm):
        np.testing.assert_allclose((norm.alpha, norm.beta), (18**0.25, 72**-0.25), rtol=1e-6)


DAMPED = {
    "ffn": {
        "mlp": "up down", "glu": "gate up down", "moe": "up down", "hash": "up down", "product_key": "values",
        "all_attention": "values down", "noisy_top": "up down", "gshard": "up down", "prototypes": "up down",
    },
    "attention": {
        "full": "value out", "all_attention": "value out values", "mla": "up out", "fnet": "", "set": "point_value out",
        "perceiver": "latent_value out", "longformer:tokens=1": "value out of_global.v",
    },
}  # fmt: skip


@pytest.mark.parametrize("shelf, choice", [(shelf, choice) for shelf in DAMPED for choice in DAMPED[shelf]])
def test_what_is_damped_is_what_the_output_grows_with(shelf, choice):
    """The parameters that a sub-layer names, whole, and no other."""
    plain, layer = build(shelf, choice), build(shelf, choice)
    layer.scale_init(0.25)
    if choice == "mla":  # of the matrix that keys come from as well, the values' half
        for kept, after, share in zip(plain._expanding("float32"), layer._expanding("float32"), (1, 0.25), strict=True):
            np.testing.assert_allclose(after, share * kept)
        layer.up.kernel[...] = 0.25 * plain.up.kernel[...]
    old, new = (nnx.to_pure_dict(nnx.state(module, nnx.Param)) for module in (plain, layer))
    for path, leaf in jax.tree_util.tree_leaves_with_path(old):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".kernel")
        share = 0.25 if name in DAMPED[shelf][choice].split() else 1
        after: Any = functools.reduce(lambda tree, part: tree[part.key], path, new)
        np.testing.assert_allclose(after, share * leaf, rtol=1e-6, err_msg=name)


def test_normformer_is_its_equations():
    x = draw(2, 5, 32)
    unit = lambda y: (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
    placed, plain, attention = build("norm", "normformer"), build("attention", "full"), build("attention", "full")
    placed.start(attention)
    attention.out.gain[...] = jnp.array([2.0, 0, 0, 0])  # the first head alone, twice
    weights = plain.out.kernel[...]
    plain.out.kernel[...] = jnp.where(jnp.arange(32)[:, None] < 8, 2 * weights, 0)
    y = attention(placed.before(x, LayerContext()))[0]
    np.testing.assert_allclose(y, plain(unit(x))[0], atol=1e-5)
    np.testing.assert_allclose(placed.after(x, y, LayerContext()), x + unit(y), atol=1e-5)
    placed, plain, ffn = build("norm", "normformer"), build("ffn", "mlp"), build("ffn", "mlp")
    placed.start(ffn)
    hidden = jax.nn.gelu(plain.up(unit(x)))
    expected = x + plain.down(unit(hidden))
    y = ffn(placed.before(x, LayerContext()))[0]
    np.testing.assert_allclose(placed.after(x, y, LayerContext()), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_norm_of_embeddings_is_what_the_first_layer_is_given(kind):
    config = edit(Config(), task="copy", seq_len=12, dim=16, layers=1, embed_norm=kind, position="learned")
    model: Any = build_model(config, task := build_task(config))
    model.embed_norm.scale[...] = jnp.arange(16.0)
    marked = model.position.embed(model.embedding(tokens := jnp.asarray(task.batch("train", 0).inputs)), jnp.arange(12))
    centred = marked - marked.mean(-1, keepdims=True) if kind == "layernorm" else marked
    unit = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(model.entering(marked), unit * jnp.arange(16), atol=1e-4)
    first = model.stack(model.entering(marked), Context(model.position))[0]
    np.testing.assert_allclose(model(tokens)[0], model.predict(first), atol=1e-5)


def test_layerscale_is_its_equation():
    placed, x, y = build("norm", "layerscale:start=0.2"), draw(2, 5, 32), draw(2, 5, 32) * 0.5
    placed.start(None)
    placed.scale[...] = placed.scale[...] * jnp.arange(32)
    np.testing.assert_allclose(placed.after(x, y, LayerContext()), x + 0.2 * jnp.arange(32) * y, atol=1e-5)
    for layers, first in ((18, 0.1), (24, 1e-5), (25, 1e-6)):
        placed = build("norm", "layerscale", layers=layers)
        placed.start(None)
        np.testing.assert_allclose(placed.scale[...], first)


def test_residual_dual_is_its_equations():
    placed, x, y = build("norm", "residual_dual:normaliser=rmsnorm"), draw(2, 5, 64), draw(2, 5, 32)
    unit = lambda x: x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    a, b = x[..., :32], x[..., 32:]
    np.testing.assert_array_equal(placed.before(x, LayerContext()), a)
    after = jnp.concatenate([unit(a + y), b + y], -1)
    np.testing.assert_allclose(placed.after(x, y, LayerContext()), after, atol=1e-5)
    np.testing.assert_allclose(placed.final(x, LayerContext()), a + unit(b), atol=1e-5)


def hyper(dynamic: bool):
    """A placement of three streams with weights of all kinds, and one token's streams."""
    placed = build("norm", f"hyper_connections:count=3:dynamic={dynamic}:normaliser=rmsnorm", dim=4, heads=1)
    placed.start(None)
    for at, (_, leaf) in enumerate(nnx.iter_graph(placed)):
        if isinstance(leaf, nnx.Param):
            leaf[...] = leaf[...] + jax.random.normal(jax.random.key(at), leaf.shape)
    return placed, np.asarray(draw(3, 4), np.float64)


@pytest.mark.parametrize("dynamic", [False, True])
def test_hyper_connections_are_their_equations(dynamic):
    placed, H = hyper(dynamic)
    unit = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    own = lambda name: np.asarray((placed.norm.scale if name == "norm_scale" else getattr(placed, name))[...])
    a, R, b, H_bar = own("read"), own("mix"), own("write"), unit(H)
    if dynamic:
        a = a + own("size_in") * np.tanh(H_bar @ own("read_of"))
        R = R + own("size_in") * np.tanh(H_bar @ own("mix_of"))
        b = b + own("size_out") * np.tanh(H_bar @ own("write_of"))
    x, y = jnp.asarray(H.reshape(12), jnp.float32), np.arange(4.0)
    scale = own("norm_scale")
    np.testing.assert_allclose(placed.before(x, LayerContext()), unit(a @ H) * scale, rtol=1e-4, atol=1e-4)
    after = (R.T @ H + np.outer(b, y)).reshape(12)
    np.testing.assert_allclose(
        placed.after(x, jnp.asarray(y, jnp.float32), LayerContext()), after, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(placed.final(x, LayerContext()), unit(H.sum(0)) * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_hyper_connections_begin_as_pre_norm(dynamic):
    """All streams are those of pre-LN at the start, whichever is read."""
    placed, plain = build("norm", f"hyper_connections:dynamic={dynamic}"), build("norm", "pre")
    placed.start(None)
    x, y = draw(2, 5, 32), draw(2, 5, 32) * 2
    wide = placed.widened(x)
    np.testing.assert_allclose(placed.before(wide, LayerContext()), plain.before(x, LayerContext()), atol=1e-5)
    np.testing.assert_allclose(placed.after(wide, y, LayerContext()), placed.widened(x + y), atol=1e-5)
    final = placed.final(wide, LayerContext())
    np.testing.assert_allclose(final, plain.final(x, LayerContext()), atol=1e-4)


@pytest.mark.parametrize("changes, message", [
    ({"norm": "residual_dual", "depth": "universal"}, "has 2 residual streams, and depth=universal looks at states"),
    ({"norm": "hyper_connections", "depth": "reversible"}, "takes? back|adds|reversible"),
    ({"norm": "hyper_connections:count=1"}, "one alone is norm=pre"),
])  # fmt: skip
def test_streams_are_refused_where_one_is_meant(changes, message):
    with pytest.raises(UsageError, match=message):
        check_config(edit(Config(), task="copy", **changes))


@pytest.mark.parametrize("shelf, choice", [("ffn", "moe"), ("attention", "fnet")])
def test_normformer_refuses_what_has_no_place_for_it(shelf, choice):
    with pytest.raises(ValueError, match=f"no place in {choice}"):
        build("norm", "normformer").start(build(shelf, choice))


class Words(Task):
    """A task that only says how many symbols there are."""

    vocab = outputs = 100
    kinds = ("encoder",)


def at_initialisation(norm: str, layers: int):
    """Means over three seeds at the start, with uniform attention as in the theorem (queries at zero): the size of one
    answer's gradient to the last feed-forward's second matrix, and |x|^2 / D of the sum behind each feed-forward."""
    config = edit(Config(), norm=norm, layers=layers, dim=64, heads=1, seq_len=32, position="none", model="encoder")
    task, random = Words(Setting(32, 8)), np.random.default_rng(0)
    config = edit(config, ffn="mlp:ratio=1:activation=relu")
    graph, like, _, _ = split(nnx.eval_shape(lambda: build_model(config, task)))
    tokens, targets = jnp.asarray(random.integers(0, 100, (2, 8, 32)))

    def drawn(path, leaf):
        name = jax.tree_util.keystr(path)
        if "kernel" in name or "embedding" in name:
            spread = 0 if "query" in name else START if "embedding" in name else leaf.shape[-2] ** -0.5
            return jnp.asarray(spread * random.standard_normal((3, *leaf.shape)), jnp.float32)
        return jnp.full((3, *leaf.shape), float("scale" in name))

    def loss(params, row, target):
        logits = merge(graph, params, {}, {})(row[None])[0]
        return -jax.nn.log_softmax(logits)[0, -1, target]

    def squares(params):
        model: Any = merge(graph, params, {}, {})
        blocks, context = nnx.split(model.stack.periods[0]), Context(model.position)

        def layer(x, variables):
            block = nnx.merge(blocks[0], variables)
            x = block.attention_norm.after(x, block.attend(x, {}, context)[0], LayerContext())
            y, _ = block.apply_ffn(x, context)
            return block.ffn_norm.after(x, y, LayerContext()), jnp.square(x + y).mean()

        return jax.lax.scan(layer, model.embedding(tokens), blocks[1])[1]

    def one(params):
        of_rows = jax.vmap(jax.grad(loss), (None, 0, 0))(params, tokens, targets[:, 0])
        last = of_rows["stack"]["periods"][0]["ffn"]["down"]["kernel"][:, -1]
        return jnp.linalg.norm(last, axis=(1, 2)).mean(), squares(params)

    of_seeds = jax.jit(jax.vmap(one))(jax.tree_util.tree_map_with_path(drawn, like))
    return [np.asarray(each).mean(0) for each in of_seeds]


def test_post_norm_starts_alike_at_every_depth():
    """Xiong et al., 2020, theorem 1 and lemma 2: neither the last layer's gradient nor the sums depend on depth."""
    (shallow, _), (deep, squares) = at_initialisation("post", 2), at_initialisation("post", 24)
    assert 1 / 1.2 < shallow / deep < 1.2
    assert all(1.1 < square < 1.9 for square in squares) and abs(squares.mean() - 1.5) < 0.1


def test_pre_norm_starts_smaller_the_deeper():
    """Theorem 1: the last layer's gradient falls as 1 / sqrt(L); lemma 2: the state grows by 1/2 to 3/2 a layer."""
    (shallow, _), (deep, squares) = at_initialisation("pre", 2), at_initialisation("pre", 16)
    assert 2.5 < shallow / deep < 3.2  # sqrt(16 / 2) = 2.83
    layer = np.arange(1, 17)
    assert (1 + layer / 2 <= squares).all() and (squares <= 1 + 3 * layer / 2).all()


# ---- powernorm -----------------------------------------------------------------------------------------------------


def training_pass(norm, x, dy, valid=None):
    """One training pass of a normaliser in place -> y, dx and the gradients of its parameters, for the gradient dy."""
    graph, params, rest = nnx.split(norm, nnx.Param, ...)
    values = backward.values(norm)

    def loss(x, params, values):
        here = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))
        nnx.update(here, values)
        y = here(x, LayerContext(valid, train=True))
        more = backward.surrogate_loss(values, backward.values(here))
        return (y * dy).sum() + more, (y, nnx.to_pure_dict(nnx.state(here, nnx.Not(nnx.Param))))

    grads, (y, after) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, params, values)
    nnx.update(norm, after)
    nnx.update(norm, grads[2])
    return np.asarray(y), np.asarray(grads[0]), nnx.to_pure_dict(grads[1])


def single(x):
    return jnp.asarray(x, jnp.float32)


def drawn_norm(choice: str = "powernorm:decay=0.8:warmup=2", dim: int = 6):
    norm, random = build("normaliser", choice, dim=dim, heads=1), np.random.default_rng(5)
    norm.scale[...], norm.bias[...] = (single(random.normal(1, 0.3, dim)) for _ in range(2))
    return norm


def state_of(norm) -> dict:
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(norm, nnx.Not(nnx.Param))))


def test_powernorm_is_its_equations():
    """Six training passes, two of them warming up, against the equations in numpy, padding left out by selection."""
    norm, random = drawn_norm(), np.random.default_rng(0)
    g, b = (np.asarray(param[...], np.float64) for param in (norm.scale, norm.bias))
    square, nu = np.ones(6), np.zeros(6)
    for step in range(6):
        x, dy = random.normal(1, 2, (3, 7, 6)) * np.arange(1, 7), random.normal(0.2, 1, (3, 7, 6))
        valid = random.random((3, 7)) < 0.7
        dy[~valid] = 0
        y, dx, of_params = training_pass(norm, single(x), single(dy), jnp.asarray(valid))
        mean_square = (x[valid] ** 2).mean(0)
        psi = np.sqrt((mean_square if step < 2 else square) + 1e-5)
        z, dz = x / psi, dy * g
        along = (dz * z)[valid].mean(0)
        np.testing.assert_allclose(y, g * z + b, rtol=1e-4, atol=1e-4)
        expected = np.where(valid[..., None], (dz - (along if step < 2 else nu) * z) / psi, 0)
        np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_params["scale"], (dy * z).sum((0, 1)), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(of_params["bias"], dy.sum((0, 1)), rtol=1e-4, atol=1e-4)
        nu = nu * (1 - 0.2 * (z[valid] ** 2).mean(0)) + 0.2 * along
        square = square + max(0.2, 1 / (step + 1)) * (mean_square - square)
        np.testing.assert_allclose(norm.nu[...], nu, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(norm.square[...], square, rtol=1e-5)
    assert int(norm.passes[...]) == 6 and np.abs(nu).min() > 1e-3
    y = norm(single(x), LayerContext())
    np.testing.assert_allclose(y, g * x / np.sqrt(square + 1e-5) + b, rtol=1e-4, atol=1e-4)


def test_powernorm_warms_up_with_the_exact_gradient():
    """While psi is the batch's own, the gradient is the derivative of the whole function, psi included."""
    norm, x, dy = drawn_norm(), draw(2, 5, 6), draw(2, 6, 5).swapaxes(1, 2) - 1

    def whole(x):
        return (norm.scale[...] * x / jnp.sqrt((x * x).mean((0, 1)) + 1e-5) * dy).sum()

    np.testing.assert_allclose(training_pass(norm, x, dy)[1], jax.grad(whole)(x), atol=1e-5)


def test_powernorm_passed_twice_moves_twice():
    """The statistics of the gradient from the last run to the first, those of the values from the first to the last."""

    class Twice(nnx.Module):
        def __init__(self):
            self.norm = drawn_norm("powernorm:decay=0.8:warmup=0")

        def __call__(self, x, context):
            return self.norm(self.norm(x, context), context)

    both, x, dy = Twice(), draw(2, 5, 6), draw(2, 6, 5).swapaxes(1, 2) - 1
    training_pass(both, x, dy)  # so that nu is not 0
    one, two = drawn_norm("powernorm:decay=0.8:warmup=0"), drawn_norm("powernorm:decay=0.8:warmup=0")
    nnx.update(one, state_of(both.norm))
    middle = training_pass(one, x, dy)[0]
    nnx.update(two, state_of(one) | {"nu": state_of(both.norm)["nu"]})
    middle_gradient = training_pass(two, middle, dy)[1]
    square = state_of(two)["square"]
    nnx.update(one, state_of(both.norm))
    training_pass(both, x, dy)
    np.testing.assert_allclose(both.norm.square[...], square, rtol=1e-5)
    # The first run meets the nu that the last one left, and moves it.
    z, dz = np.asarray(x) / np.sqrt(state_of(one)["square"] + 1e-5), middle_gradient * np.asarray(one.scale[...])
    nu = state_of(two)["nu"]
    nu = nu + 0.2 * ((dz * z).mean((0, 1)) - nu * (z * z).mean((0, 1)))
    np.testing.assert_allclose(both.norm.nu[...], nu, rtol=1e-4, atol=1e-5)


def test_powernorm_does_not_see_padding():
    valid = jnp.arange(7)[None] < jnp.array([7, 4, 0])[:, None]
    results = []
    for garbage in (0.0, 1e6):
        norm, random = drawn_norm(), np.random.default_rng(0)
        for _ in range(4):
            x, dy = (np.where(valid[..., None], random.normal(size=(3, 7, 6)), fill) for fill in (garbage, 0))
            y, dx, of_params = training_pass(norm, single(x), single(dy), valid)
        results.append((y[np.asarray(valid)], dx, of_params["bias"], state_of(norm)))
    jax.tree.map(np.testing.assert_array_equal, *results)
    # A batch of padding alone leaves everything as it was.
    before = state_of(norm)
    training_pass(norm, jnp.full((3, 7, 6), 3.0), jnp.zeros((3, 7, 6)), jnp.zeros((3, 7), bool))
    after = state_of(norm)
    assert after.pop("passes") == before.pop("passes") + 1
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.full
def test_batchnorm_is_its_equations():
    """Five training passes in numpy, with padding, and the gradient that flows through the batch's statistics; flax's
    layer gives the same of what is not padded. A batch of padding alone moves nothing."""
    norm, random = drawn_norm("batchnorm:decay=0.7"), np.random.default_rng(0)
    g, b = (np.asarray(param[...], np.float64) for param in (norm.scale, norm.bias))
    mean, variance = np.zeros(6), np.ones(6)
    for number in range(5):
        x, dy = random.normal(2, 3, (2, 4, 7, 6))
        valid = random.random((4, 7)) < 0.7 if number else np.ones((4, 7), bool)
        dy[~valid] = 0
        y, dx, of_params = training_pass(norm, single(np.where(valid[..., None], x, 1e4)), single(dy), valid)
        rows = x[valid]
        m, v = rows.mean(0), rows.var(0)
        z, dz = (rows - m) / np.sqrt(v + 1e-5), dy[valid] * g
        np.testing.assert_allclose(y[valid], g * z + b, atol=1e-4)
        expected = (dz - dz.mean(0) - z * (dz * z).mean(0)) / np.sqrt(v + 1e-5)
        np.testing.assert_allclose(dx[valid], expected, atol=1e-4)
        assert not dx[~valid].any()
        np.testing.assert_allclose(of_params["scale"], (dy[valid] * z).sum(0), rtol=1e-3, atol=1e-4)
        rate = max(0.3, 1 / (number + 1))
        mean, variance = mean + rate * (m - mean), variance + rate * (v - variance)
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
        np.testing.assert_allclose(norm.variance[...], variance, rtol=1e-5)
        if valid.all():
            peer = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
            assert peer.scale is not None and peer.bias is not None
            peer.scale[...], peer.bias[...] = norm.scale[...], norm.bias[...]
            np.testing.assert_allclose(y, peer(single(x), use_running_average=False), atol=1e-4)
    y = norm(single(x), LayerContext(None, train=False))
    np.testing.assert_allclose(y, g * (x - mean) / np.sqrt(variance + 1e-5) + b, atol=1e-4)
    before = state_of(norm)
    training_pass(norm, single(x), single(0 * x), np.zeros((4, 7), bool))
    jax.tree.map(np.testing.assert_array_equal, state_of(norm), before)


PLACED = ["pre", "post", "sandwich", "normformer", "deepnorm"]


@pytest.mark.full
@pytest.mark.parametrize(
    "placed, normaliser", [*((placed, "powernorm") for placed in PLACED), ("sandwich", "batchnorm")]
)
def test_running_statistics_in_every_placement(placed, normaliser):
    """Every normaliser moves in training, by valid rows alone, and else none; decoding is the whole pass."""
    words = {"task": "copy", "seq_len": 9, "dim": 8, "heads": 2, "layers": 1, "batch": 3, "warmup": 0}
    config = edit(Config(), norm=f"{placed}:normaliser={normaliser}", position="none", **words)
    task = check_config(config)
    tx, graph = optimizer.of(config, task), structure(config, task)
    step, ends = jax.jit(make_train_step(config, task, graph, tx)), []
    for garbage in (1, 2):
        state = start = init(config, task, tx)
        for at in range(2):
            batch = task.batch("train", at)
            valid = np.ones(batch.inputs.shape, bool)
            valid[0, 6:], weights = False, batch.weights.copy()
            weights[0, 6:] = 0
            inputs = np.where(valid, batch.inputs, garbage)
            state, metrics = step(state, dataclasses.replace(batch, inputs=inputs, valid=valid, weights=weights))
            assert metrics["ok"]
        ends.append(state)
    jax.tree.map(np.testing.assert_array_equal, ends[0].extra, ends[1].extra)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ends[0].params, ends[1].params)
    moved = jax.tree.map(lambda old, new: np.any(old != new), start.extra, ends[0].extra)
    held = {"pre": 3, "post": 2, "sandwich": 5, "normformer": 5, "deepnorm": 2}[placed]
    assert jax.tree.leaves(moved) == [True] * 3 * held

    @jax.jit
    def evaluated(state, tokens):
        built: Any = lambda: merge(graph, state.params, state.extra, state.memory)
        model = built()
        whole = model(tokens, valid=jnp.ones(tokens.shape, bool))[0]
        one = lambda cache, token: built().step(cache, token)[::-1]
        steps = jax.lax.scan(one, built().init_cache(*tokens.shape), tokens.T)[1]
        return whole, steps.swapaxes(0, 1), split(model)[2]

    whole, steps, extra = evaluated(ends[0], jnp.asarray(batch.inputs))
    jax.tree.map(np.testing.assert_array_equal, extra, ends[0].extra)
    np.testing.assert_allclose(steps, whole, atol=1e-5)


@pytest.mark.full
def test_powernorm_goes_on_from_a_checkpoint(tmp_path):
    """Two steps, a stop and two steps more end in the bits of four."""
    words = {"task": "copy", "seq_len": 9, "dim": 8, "heads": 2, "layers": 1, "batch": 4, "steps": 4, "eval_batches": 1}
    config = edit(Config(), norm="pre:normaliser=powernorm", attention="average", **words)
    seen, ends = [], []
    for name in ("whole", "halves"):
        here = edit(config, runs=str(tmp_path / name))
        if name == "halves":
            with pytest.raises(loop.Interrupted):
                loop.run(here, progress=lambda step, total, metrics: seen.append(step), stop=lambda: bool(seen))
            assert checkpoint.steps(configs.folder(here)) == [2]
        loop.run(here, resume=name == "halves")
        job = jobs.prepare(here, configs.folder(here))
        state, _ = checkpoint.restore(configs.folder(here), job.target(), job.about)
        leaves = checkpoint.named_leaves(state)
        ends.append({name: np.asarray(leaf).tobytes() for name, leaf in leaves.items()})
        nu = [np.asarray(leaf) for name, leaf in leaves.items() if name.endswith("nu")]
        assert len(nu) == 3 and all(np.abs(leaf).min() > 0 for leaf in nu)
    assert ends[0] == ends[1]


def test_what_a_forward_pass_alone_recomputes_refuses_powernorm():
    config = edit(Config(), task="copy", norm="pre:normaliser=powernorm", depth="reversible", seq_len=9)
    with pytest.raises(UsageError, match="backward=store"):
        check_config(config)
    check_config(edit(config, depth="reversible:backward=store"))
