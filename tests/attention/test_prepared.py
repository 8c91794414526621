"""A short convolution and a norm of heads change nothing else: what is causal, padded, packed or decoded stays so."""

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from decoded import agree, model_of
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention import why_not_decode
from xformers_lab.attention._base.call import watched
from xformers_lab.attention._base.prepared import HeadNorm
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import Refused, UsageError
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.nn.size import Size

NAMES = spec.names("attention")
QUICK = ("full", "linear", "local")


def built(name: str, **options):
    """The mechanism, prepared; None where it refuses to be."""
    mechanism = spec.build("attention", name, length=20, dim=32, heads=4, kv_heads=2)
    try:
        mechanism.prepare(**options)
    except Refused:
        return None
    return mechanism


CONVOLVED = [name for name in NAMES if built(name, conv=4, causal=True)]
NORMED = [name for name in NAMES if built(name, qk_norm="rms")]
DECODABLE = [name for name in CONVOLVED if why_not_decode(spec.entry("attention", name)) is None]


def chosen(names):
    """A few at once, one of each kind before a change lands, all by and by."""
    rest = kinds.one_of_each_kind([name for name in names if name not in QUICK], mark=pytest.mark.full)
    return [name for name in names if name in QUICK] + rest


def learned(model):
    """The model with weights of its convolutions and norms as if training had moved them, each by its own number."""
    for at, (path, variable) in enumerate(nnx.iter_graph(model)):
        if isinstance(variable, nnx.Param) and {"convs", "head_norm", "first_values"} & set(path):
            drawn = jax.random.normal(jax.random.key(at), variable.shape)
            variable[...] = variable[...] + 0.3 * drawn
    return model


def test_what_refuses():
    """Mechanisms with projections of their own, or none."""
    own = {name for name in NAMES if not spec.entry("attention", name).projects}
    assert set(NAMES) - set(CONVOLVED) == own | {"average", "mamba"}
    assert own | {"average", "hard_coded"} <= set(NAMES) - set(NORMED)


@pytest.mark.parametrize("name", chosen(DECODABLE))
def test_decoding_is_the_causal_pass(name):
    """Both read from left to right, so what decodes alike sees nothing that comes later."""
    norm = {"qk_norm": "rms"} if name in NORMED else {}
    model, tokens = model_of(name, conv=4, **norm)
    agree(learned(model), tokens)


@pytest.mark.full
@pytest.mark.parametrize("changes", [
    {"qk_norm": "l2"}, {"position": "rope", "qk_norm": "rms", "conv": 2},
    pytest.param({"position": "deberta", "qk_norm": "rms", "conv": 3}, marks=pytest.mark.full),
    pytest.param({"depth": "conditional"}, marks=pytest.mark.full),
    pytest.param({"depth": "mixture_of_depths"}, marks=pytest.mark.full),
    pytest.param({"depth": "universal"}, marks=pytest.mark.full),
    pytest.param({"depth": "recurrent_memory:segment=5"}, marks=pytest.mark.full),
    pytest.param({"depth": "hierarchical:segment=5"}, marks=pytest.mark.full),
    pytest.param({"depth": "hourglass:factor=2", "layers": 4}, marks=pytest.mark.full),
    pytest.param({"depth": "tnt"}, marks=pytest.mark.full),
    pytest.param({"attention": "full+local:window=3+linear", "layers": 5}, marks=pytest.mark.full),
], ids=str)  # fmt: skip
def test_other_axes_decode_alike(changes):
    model, tokens = model_of(**({"attention": "full", "conv": 5} | changes))
    agree(learned(model), tokens)


@pytest.mark.parametrize("name", chosen(CONVOLVED))
def test_padding_reaches_nothing(name):
    """On both sides of a position, in an encoder, or on one, where a mechanism has but one."""
    causal = "bidirectional" in spec.entry("attention", name).refuses
    config = edit(Config(), task="copy" if causal else "listops", attention=name, conv=3, dim=32, heads=4, kv_heads=2)
    config = edit(config, seq_len=20, layers=2, position="none", qk_norm="rms" if name in NORMED else "none")
    task = build_task(config)
    model, valid = learned(build_model(config, task)), np.ones((2, 20), bool)
    valid[:, 13:] = False
    inputs = np.random.default_rng(0).integers(1, task.vocab, (2, 20)).astype(np.int32)
    others = np.where(valid, inputs, 1 + (inputs + 3) % (task.vocab - 1)).astype(np.int32)
    graph, variables = nnx.split(model)
    run = jax.jit(lambda v, inputs: nnx.merge(graph, v)(inputs, valid=jnp.asarray(valid))[0])
    one, other = run(variables, inputs), run(variables, others)
    seen = valid if config.task == "copy" else np.ones(2, bool)
    np.testing.assert_allclose(one[seen], other[seen], atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", chosen(CONVOLVED))
def test_weights_learn(name):
    if name in DECODABLE:
        model, tokens = model_of(name, conv=4)
    else:
        config = edit(Config(), task="listops", attention=name, conv=3, dim=32, heads=4, kv_heads=2, seq_len=20)
        task = build_task(config)
        model, tokens = build_model(config, task), jnp.asarray(task.batch("train", 0).inputs[:2])
    graph, params, rest = nnx.split(learned(model), nnx.Param, ...)
    copied = lambda tree: jax.tree.map(lambda leaf: leaf, tree)  # a mechanism may write to its variables
    loss = lambda params: jnp.square(nnx.merge(graph, params, copied(rest))(tokens)[0]).sum()
    grads = nnx.to_flat_state(jax.jit(jax.grad(loss))(params))
    found = {path: grad.get_value() for path, grad in grads if "convs" in map(str, path)}
    assert found and all(jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0 for grad in found.values()), found


@pytest.mark.parametrize("kind", ["rms", "l2"])
def test_norms_of_heads_are_their_equations(kind):
    norm = HeadNorm(Size(length=8, dim=12, heads=3), kind)
    if kind == "rms":
        assert norm.query.scale is not None
        norm.query.scale[...] = jnp.array([1.0, -2.0, 0.5, 3.0])
    q, k = (np.random.default_rng(at).standard_normal((2, 5, 3, 4)) for at in range(2))
    of_q, of_k = norm.of_queries(jnp.asarray(q, jnp.float32)), norm.of_keys(jnp.asarray(k, jnp.float32))
    length = lambda x: np.sqrt((x * x).sum(-1, keepdims=True))
    if kind == "rms":
        weights = np.array([1.0, -2.0, 0.5, 3.0])
        expected = 2 * q / length(q) * weights, 2 * k / length(k)
    else:  # so that q . k / sqrt(4) is the cosine times log2(8 8 - 8)
        expected = q / length(q) * 2 * np.log2(56), k / length(k)
    np.testing.assert_allclose(of_q, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_k, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ["full", "local:window=3", "topk:keys=30", "streaming:window=3:sinks=2"])
def test_scores_are_scaled_by_the_logarithm_of_the_keys_a_query_sees(attention, causal):
    """Queries of the same layer, scaled by hand: by what padding, documents and a pattern leave of the keys."""
    if attention.startswith("streaming") and not causal:
        pytest.skip("streaming is causal")
    S, at = 20, np.arange(20)
    random = np.random.default_rng(0)
    valid, documents = random.random((2, S)) < 0.7, np.cumsum(random.random((2, S)) < 0.2, 1)
    x = jnp.asarray(random.standard_normal((2, S, 32)), jnp.float32)
    near = {"local:window=3": np.abs(at[:, None] - at) <= 3}
    near["streaming:window=3:sinks=2"] = (at[:, None] - at <= 3) | (at < 2)
    seen = near.get(attention, np.ones((S, S), bool)) & ((at <= at[:, None]) | (not causal))
    packed = None if attention.startswith("streaming") else documents
    for log_n, kept, numbers in ((8, None, None), ("learned", valid, packed)):
        there = np.ones((2, S), bool) if kept is None else kept
        apart = np.ones((2, S, S), bool) if numbers is None else numbers[:, :, None] == numbers[:, None]
        count = (seen & there[:, None] & apart).sum(-1)
        plain, scaled = (spec.build("attention", attention, length=S, dim=32, heads=4) for _ in range(2))
        scaled.prepare(log_n=log_n)
        share = np.full(4, 1 / np.log(8))
        if log_n == "learned":
            first = 1 / np.log(np.arange(1, S + 1)).mean()
            np.testing.assert_allclose(scaled.log_scale.share[...], np.full(4, first), rtol=1e-5)
            share = np.array([0.1, 0.3, 0.5, 0.7])
            scaled.log_scale.share[...] = jnp.asarray(share, jnp.float32)
        q, k, v = (plain.heads_of(getattr(plain, name)(x)) for name in ("query", "key", "value"))
        times = (np.log(np.maximum(count, 1))[..., None, None] * share[:, None]).astype(np.float32)
        given = {"valid": kept, "documents": numbers}
        options = {name: None if rows is None else jnp.asarray(rows) for name, rows in given.items()}
        options["causal"] = causal
        run = jax.jit(lambda q, plain=plain, options=options, k=k, v=v: plain.mix(q, k, v, **options)[0])
        expected = plain.out(run(q * times).reshape(2, S, -1))
        actual = jax.jit(lambda x, scaled=scaled, options=options: scaled(x, **options)[0])(x)
        np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("attention, changes", [
    ("full", {"log_n": 8}),
    ("local:window=3", {"log_n": "learned", "conv": 3}),
    pytest.param("full", {"log_n": "learned", "position": "deberta", "qk_norm": "l2"}, marks=pytest.mark.full),
    pytest.param("topk:keys=4", {"log_n": 16, "position": "alibi"}, marks=pytest.mark.full),
    pytest.param("differential", {"log_n": 16, "position": "rope"}, marks=pytest.mark.full),
    pytest.param("strided:stride=3", {"log_n": 16}, marks=pytest.mark.full),
    pytest.param("full", {"log_n": 8, "depth": "mixture_of_depths"}, marks=pytest.mark.full),
    pytest.param("full", {"log_n": 8, "depth": "universal"}, marks=pytest.mark.full),
], ids=str)  # fmt: skip
def test_scores_scaled_by_lengths_decode_alike(attention, changes):
    model, tokens = model_of(attention, **changes)
    agree(model, tokens)


def values_of_layers(attention: str, **changes):
    """What each layer's heads add up, and what it projects of its own input, in the order of the layers."""
    model, tokens = model_of(attention, layers=4, **changes)
    learned(model)
    found = []
    with watched(lambda layer, call: found.append((call.v, layer.heads_of(layer.value(call.x))))):
        model(tokens)
    return model, found


@pytest.mark.parametrize("attention", ["full", "full+linear", "realformer"])
@pytest.mark.parametrize("kind", ["half", "learned", "only"])
def test_values_are_mixed_with_those_of_the_first_layer(attention, kind):
    """Also across mechanisms of a cycle, and beside what a mechanism carries itself."""
    model, found = values_of_layers(attention, value_residual=kind)
    if kind == "learned":
        by_place = [np.asarray(x[...]) for path, x in nnx.iter_graph(model) if path[-1:] == ("shares",)]
        shares = np.stack(by_place, 1).reshape(-1, 2)  # layer by layer, places of the cycle in turn
    else:
        shares = np.tile({"half": [0.5, 0.5], "only": [1.0, 0.0]}[kind], (4, 1))
    first = found[0][1]
    np.testing.assert_array_equal(found[0][0], first)
    for (mixed, own), (of_first, of_own) in zip(found[1:], shares[1:], strict=True):
        np.testing.assert_allclose(mixed, of_first * first + of_own * own, atol=1e-5)
        assert np.abs(own - first).max() > 1e-2


@pytest.mark.parametrize("attention, changes", [
    ("full", {"value_residual": "learned"}),
    pytest.param("full+linear", {"value_residual": "half", "conv": 3, "layers": 5}, marks=pytest.mark.full),
    pytest.param("realformer", {"value_residual": "only"}, marks=pytest.mark.full),
    pytest.param("mamba2", {"value_residual": "learned", "position": "none"}, marks=pytest.mark.full),
    pytest.param("full", {"value_residual": "half", "position": "deberta"}, marks=pytest.mark.full),
    pytest.param("full", {"value_residual": "half", "depth": "conditional"}, marks=pytest.mark.full),
    pytest.param("full", {"value_residual": "half", "depth": "universal"}, marks=pytest.mark.full),
    pytest.param("full", {"value_residual": "half", "depth": "hourglass", "layers": 4}, marks=pytest.mark.full),
], ids=str)  # fmt: skip
def test_values_of_the_first_layer_decode_alike(attention, changes):
    model, tokens = model_of(attention, **({"layers": 3} | changes))
    agree(learned(model), tokens)


def test_scores_do_not_grow_with_projections():
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))

    def out(times: float, **options):
        layer = spec.build("attention", "full", length=6, dim=8, heads=2)
        layer.prepare(**options)
        layer.query.kernel[...] *= times
        return layer(x)[0]

    np.testing.assert_allclose(out(100, qk_norm="rms"), out(1, qk_norm="rms"), atol=1e-5)
    assert jnp.abs(out(100) - out(1)).max() > 1e-2


def test_nothing_else_is_drawn_otherwise():
    """A model with them begins as the same model without."""
    config = edit(Config(), task="copy", seq_len=16, dim=16)
    both = [build_model(edit(config, **more), build_task(config)) for more in ({}, {"conv": 4, "qk_norm": "rms"})]
    plain, more = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in both)
    assert plain.keys() < more.keys()
    assert all(np.array_equal(plain[path].get_value(), more[path].get_value()) for path in plain)


@pytest.mark.parametrize("changes, message", [
    ({"attention": "fnet", "task": "listops", "conv": 3}, "no queries, keys or values: leave out conv=3"),
    ({"attention": "fnet", "task": "listops", "qk_norm": "l2"}, "no queries or keys of heads: leave"),
    ({"attention": "mla", "conv": 4}, "attention=mla projects queries, keys or values in a way of its own"),
    ({"attention": "hard_coded", "qk_norm": "rms"}, "makes no queries or keys of heads"),
    ({"task": "listops", "conv": 4}, "conv=4: where both sides are seen it is an odd number: use conv=5"),
    ({"depth": "feedback", "conv": 4}, "conv= convolves a layer's own keys and values"),
    ({"model": "lstm", "conv": 4}, "lstm has no conv: leave out conv=4"),
    ({"model": "lstm", "value_residual": "half"}, "lstm has no value_residual"),
    ({"attention": "mla", "value_residual": "half"}, "attention=mla projects values in a way of its own"),
    ({"attention": "average", "value_residual": "half"}, "attention=average makes no values"),
    ({"depth": "feedback", "value_residual": "half"}, "value_residual mixes values of the same positions"),
    ({"depth": "mixture_of_depths", "value_residual": "half"}, "hands something to the layer above"),
    ({"model": "lstm", "log_n": 8}, "lstm has no log_n: leave out log_n=8"),
    ({"attention": "linear", "log_n": 8}, "log_n=8 has no scores to scale: attention=linear, it has no score for"),
    ({"attention": "fnet", "task": "listops", "log_n": "learned"}, "log_n=learned has no scores to scale"),
    ({"attention": "mla", "log_n": 8}, "attention=mla projects queries or keys of heads in a way of its own"),
    ({"attention": "synthesizer:kind=random", "log_n": 8}, "attention=synthesizer makes no queries or keys of heads"),
    ({"model": "gru", "qk_norm": "rms"}, "gru has no qk_norm: leave out qk_norm=rms"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_its_reason(changes, message):
    with pytest.raises(UsageError, match=message):
        check_config(edit(Config(), **({"task": "copy", "seq_len": 32, "dim": 16} | changes)))


@pytest.mark.parametrize("words, message", [
    (["conv=1"], "conv must be at least 2"), (["conv=1000"], "conv must be below 65"),
    (["log_n=1"], "log_n must be at least 2"), (["log_n=lots"], 'log_n=lots wants a whole number'),
    (["conv=wide"], 'conv=wide wants a whole number, got "wide"'), (["qk_norm=layer"], 'unknown value "layer"'),
])  # fmt: skip
def test_bad_words(words, message, capsys):
    assert main(["train", "task=copy", *words]) == 2
    assert message in capsys.readouterr().err
