"""Shapes of the stack: each against a slow statement of its paper's formula with the same parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import SMALL, gradients, halves, layer, model_of

from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.depth.distilling import Halving
from xformers_lab.errors import UsageError
from xformers_lab.measure.flops import count_flops
from xformers_lab.model import check_config
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size

pytestmark = pytest.mark.full

ENCODER = {"model": "encoder", "task": "listops", "seq_len": 24}


def count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.stack, nnx.Param)))


def assert_equal(actual, expected, error=1e-5):
    """Relative to the largest number of an array, where that is above 1."""
    actual = dict(jax.tree_util.tree_leaves_with_path(actual))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        atol = error * max(1, np.abs(leaf).max(initial=0))
        np.testing.assert_allclose(actual[path], leaf, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("choice, message", [
    ({"depth": "reversible", "norm": "post"}, "cannot be taken back"),
    ({"depth": "reversible", "norm": "deepnorm"}, "cannot be taken back"),
    ({"depth": "reversible", "ffn": "none"}, "ffn=none has none"),
    ({"depth": "reversible", "attention": "realformer"}, "hands something to the layer above"),
    ({"depth": "macaron", "ffn": "none"}, "there is no ffn"),
    ({"depth": "sandwich_order", "ffn": "none"}, "there is no ffn"),
    ({"depth": "sandwich_order:k=5"}, "from 0 to layers=4"),
    ({"depth": "hourglass", "layers": 2}, "are no hourglass"),
    ({"depth": "hourglass:factor=1"}, "factor must be at least 2"),
    ({"depth": "recurrent_memory:segment=99"}, "from 1 to seq_len=12"),
    ({"depth": "hierarchical:segment=0"}, "from 1 to seq_len=12"),
    ({"depth": "hierarchical:low=4"}, "a layer below and one above"),
    ({"depth": "hierarchical:low=2:top=2"}, "low=2 and top=2 of layers=4"),
    ({"depth": "hierarchical:back=token"}, "needs one that looks at the token"),
    ({"depth": "hierarchical", "model": "encoder_decoder"}, "no place for cross-attention"),
    ({"depth": "tnt", "model": "encoder_decoder"}, "no place for cross-attention"),
    ({"depth": "tnt", "attention": "realformer"}, "hands something to the layer above"),
    ({"depth": "recurrent_memory:segment=6:tokens=0"}, "tokens must be at least 1"),
    ({"depth": "recurrent_memory:segment=6", "ffn": "hash"}, "looks at the tokens"),
    ({"depth": "memformer:segment=99"}, "from 1 to seq_len=12"),
    ({"depth": "memformer:slots=0"}, "slots must be at least 1"),
    ({"depth": "memformer:temperature=0"}, "temperature must be above 0"),
    ({"depth": "memformer", "model": "encoder_decoder"}, "no place for cross-attention"),
    ({"depth": "memformer", "norm": "hyper_connections"}, "as if they were one"),
    ({"depth": "local_rnn", "norm": "normformer"}, "no linear layer `down`"),
    ({"depth": "mask_decoder"}, "serves an encoder: use model=encoder"),
    ({"depth": "mask_decoder:passes=0", **ENCODER}, "passes must be at least 1"),
    ({"depth": "mask_decoder", **ENCODER, "attention": "star"}, "cannot look from queries at other states"),
    ({"depth": "funnel"}, "use depth=hourglass"),
    ({"depth": "funnel:blocks=5", **ENCODER}, "are no funnel"),
    ({"depth": "funnel:blocks=1", **ENCODER}, "2 blocks or more"),
    ({"depth": "funnel:decoder=2", **ENCODER}, "each with a layer"),
    ({"depth": "funnel", "attention": "fnet", **ENCODER}, "cannot look from pooled queries"),
    ({"depth": "distilling"}, "use depth=funnel"),
    ({"depth": "distilling", "task": "listops", "model": "decoder"}, "use depth=hourglass, or model=encoder"),
    ({"depth": "distilling", "task": "listops", "model": "encoder", "layers": 5, "seq_len": 16}, "must be above 16"),
    ({"depth": "funnel", "memory": "xl", "task": "lm", "position": "rope"}, "on a part"),
    ({"depth": "feedback", "model": "encoder", "task": "listops"}, "an encoder sees both sides"),
    ({"depth": "feedback", "model": "encoder_decoder"}, "an encoder sees both sides"),
    ({"depth": "feedback:segment=12"}, "from 1 to 11, less than seq_len"),
    ({"depth": "feedback:window=0"}, "window must be at least 1"),
    ({"depth": "feedback", "attention": "realformer"}, "hands something to the layer above"),
    ({"depth": "feedback", "attention": "mla"}, "makes its keys and values itself"),
    ({"depth": "hourglass", "memory": "xl", "task": "lm", "position": "rope"}, "on a part"),
    ({"depth": "conditional", "memory": "xl", "task": "lm", "position": "rope"}, "on a part"),
    ({"depth": "early_exit", "memory": "xl", "task": "lm", "position": "rope"}, "on a part"),
    ({"depth": "mixture_of_depths", "memory": "xl", "task": "lm", "position": "rope"}, "on a part"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_the_reason(choice, message):
    with pytest.raises(UsageError, match=message):
        check_config(edit(Config(), **(SMALL | choice)))


# ---- reversible ----------------------------------------------------------------------------------------------------


def test_reversible_is_two_streams():
    model, tokens = model_of("reversible", norm="pre", attention="full+linear", layers=5)
    context = Context(model.position)
    x1 = x2 = model.embedding(tokens)
    for number in range(5):
        stacked = model.stack.rest[0] if number == 4 else model.stack.periods[number % 2]
        attend, feed = halves(layer(stacked, number // 2 if number < 4 else 0).block, context)
        x1 = x1 + attend(x2)
        x2 = x2 + feed(x1)
    out = model.stack(model.embedding(tokens), context)[0]
    np.testing.assert_allclose(out, (x1 + x2) / 2, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"position": "t5", "dropout": 0.2, "norm": "sandwich", "layers": 3, "attention": "full+softcap"},
    {"ffn": "moe", "norm": "rezero", "layers": 9},
])  # fmt: skip
def test_recomputed_gradients_are_those_of_stored_activations(changes):
    """With the gradients of positions, of auxiliary losses, of an odd last layer, and the same dropout."""

    x, weights = np.random.default_rng(0).standard_normal((2, 3, 12, 16)).astype(np.float32)

    def loss(model):
        valid = jnp.arange(12)[None] < jnp.array([[5], [9], [12]])
        out, aux = model.stack(jnp.asarray(x), Context(model.position, valid), key=jax.random.key(1))
        return (out * weights).sum() + sum(aux.losses.values())

    model, _ = model_of("reversible", **changes)
    if changes["norm"] == "rezero":  # its layers are nothing before they learned
        for norm in (model.stack.periods[0].block.attention_norm, model.stack.periods[0].block.ffn_norm):
            norm.scale[...] = 0.5 + norm.scale[...]
    graph, _ = nnx.split(model_of("reversible:backward=store", **changes)[0])
    stored = nnx.merge(graph, nnx.state(model))
    assert (model.stack.backward, stored.stack.backward) == ("recompute", "store")
    value, grads = gradients(model, loss)
    expected, plain = gradients(stored, loss)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_equal(grads, plain)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads["stack"]))


def count_stored(depth: str, layers: int) -> int:
    """How many numbers the gradient of a stack keeps between its two passes, beside the parameters."""
    model, tokens = model_of(depth, layers=layers, position="none")
    graph, params, rest = nnx.split(model.stack, nnx.Param, ...)
    call = lambda params, x: nnx.merge(graph, params, rest)(x, Context(model.position))[0]
    held = jax.tree.leaves(jax.vjp(call, params, model.embedding(tokens))[1])
    return sum(leaf.size for leaf in held) - sum(leaf.size for leaf in jax.tree.leaves(params))


def test_reversible_keeps_the_same_for_every_depth():
    streams = 2 * 3 * 12 * 16
    assert streams <= count_stored("reversible", 3) == count_stored("reversible", 12) < streams + 8
    shallow, deep = count_stored("reversible:backward=store", 3), count_stored("reversible:backward=store", 12)
    assert deep > 3.5 * shallow > 3.5 * streams
    assert count(model_of("reversible")[0]) == count(model_of("fixed")[0])


@pytest.mark.parametrize("changes", [{"attention": "routing"}, {"memory": "xl"}])
def test_reversible_writes_back_what_is_no_parameter(changes, tmp_path):
    """Moving centroids, and memories that the next pass reads, are those of stored activations."""
    (tmp_path / "words.txt").write_text(" ".join(str(number * 7919 % 1009) for number in range(900)))
    changes |= {"task": f"lm:path={tmp_path / 'words.txt'}"}
    states = []
    for depth in ("reversible", "reversible:backward=store"):
        model, tokens = model_of(depth, position="rope", layers=2, **changes)
        state = lambda model=model: nnx.to_pure_dict(nnx.state(model.stack, nnx.Not(nnx.Param)))
        before = state()
        first = model(tokens, key=jax.random.key(0))[0]
        after = state()
        assert any(np.any(old != new) for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True))
        assert "memory" not in changes or np.abs(model(tokens, key=jax.random.key(0))[0] - first).max() > 0.01
        states.append(after)
    assert_equal(*states, error=1e-6)


# ---- macaron, the order of sub-layers, transparent -----------------------------------------------------------------


def test_macaron_takes_half_steps():
    model, tokens = model_of("macaron", layers=3)
    context, x = Context(model.position), model.embedding(tokens)
    out, aux = model.stack(x, context)
    for number in range(3):
        both = layer(model.stack.periods[0], number)
        attend, _ = halves(both.block, context)
        x = x + 0.5 * both.first.ffn.layer(both.first.ffn_norm.norm(x))[0]
        x = x + attend(x)
        x = x + 0.5 * both.block.ffn.layer(both.block.ffn_norm.norm(x))[0]
    np.testing.assert_allclose(out, x, atol=1e-5)
    assert float(aux.scalars["computation"]) == 3


def test_macaron_of_half_hidden_layers_has_the_parameters_of_a_layer():
    """But for what one more normaliser and the bias of one more output have."""
    macaron, fixed = (
        count(model_of(depth, ffn=f"mlp:ratio={ratio}")[0]) for depth, ratio in (("macaron", 2), ("fixed", 4))
    )
    assert macaron - fixed == 4 * (2 * 16 + 16)


def test_sandwich_order_is_its_word():
    model, tokens = model_of("sandwich_order:k=2", layers=5, attention="full+linear")
    context, x = Context(model.position), model.embedding(tokens)
    out, aux = model.stack(x, context)
    first, middle, last = model.stack.parts
    attentions = [layer(first.periods[place], 0) for place in (0, 1)]
    blocks = [layer(middle.periods[0], 0), layer(middle.periods[1], 0), layer(middle.rest[0], 0)]
    feeds = [layer(last.periods[0], number) for number in (0, 1)]
    for block in attentions:
        assert block.ffn is None
        x = x + halves(block, context)[0](x)
    for block in blocks:
        attend, feed = halves(block, context)
        x = x + attend(x)
        x = x + feed(x)
    for block in feeds:
        assert block.attention is None
        x = x + block.ffn(block.ffn_norm.norm(x))[0]
    np.testing.assert_allclose(out, x, atol=1e-5)
    assert [block.name for block in attentions + blocks] == ["full", "linear", "full", "linear", "full"]
    assert float(aux.scalars["computation"]) == 5


def test_sandwich_order_keeps_the_parameters_and_is_the_usual_order_at_k_0():
    fixed, tokens = model_of("fixed")
    for k in (0, 1, 4):
        assert count(model_of(f"sandwich_order:k={k}")[0]) == count(fixed)
    np.testing.assert_array_equal(model_of("sandwich_order:k=0")[0](tokens)[0], fixed(tokens)[0])


def test_scores_are_handed_on_between_the_parts_of_a_sandwich():
    """RealFormer's scores of the first attention layers reach the later ones."""
    model, tokens = model_of("sandwich_order:k=2", attention="realformer")
    context, x = Context(model.position), model.embedding(tokens)
    first, middle, last = model.stack.parts
    carries = first.initial_carries(3, 12, 12)
    x, carries, _ = first.run(x, carries, context)
    cut = last.run(middle.run(x, middle.initial_carries(3, 12, 12), context)[0], {}, context)[0]
    whole = last.run(middle.run(x, carries, context)[0], {}, context)[0]
    out = model.stack(model.embedding(tokens), context)[0]
    np.testing.assert_allclose(out, whole, atol=1e-5)
    assert np.abs(out - cut).max() > 1e-4


def test_transparent_is_the_mix_of_all_layers():
    model, tokens = model_of("transparent", layers=3, attention="full+linear")
    weights = np.array([0.3, -0.2, 1.0, 0.4])
    model.stack.mix[...] = jnp.asarray(weights, jnp.float32)
    context, states = Context(model.position), [model.embedding(tokens)]
    for stacked in (model.stack.periods[0], model.stack.periods[1], model.stack.rest[0]):
        states.append(layer(stacked, 0).block(states[-1], {}, context)[0])
    share = np.exp(weights) / np.exp(weights).sum()
    out = model.stack(states[0], context)[0]
    np.testing.assert_allclose(out, sum(s * h for s, h in zip(share, states, strict=True)), atol=1e-5)
    assert count(model) == count(model_of("fixed", layers=3, attention="full+linear")[0]) + 4


def test_transparent_gradients_reach_every_share():
    model, tokens = model_of("transparent")
    grads = gradients(model, lambda model: (model(tokens)[0] ** 2).mean())[1]
    assert (np.abs(grads["stack"]["mix"]) > 0).all()


# ---- shorter sequences in the middle -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("way", ["mean", "linear"])
def test_hourglass_is_its_equation(kind, way):
    """By loops over runs; the last of 11 tokens makes a run that is not whole."""
    depth = f"hourglass:factor=3:shorten={way}:upsample={'repeat' if way == 'mean' else 'linear'}"
    model, _ = model_of(depth, model=kind, task="listops", layers=5)
    stack, k, T = model.stack, 3, 11
    context = Context(model.position)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, T, 16)), jnp.float32)
    out, aux = stack(x, context)
    first, middle, last = stack.parts
    x, runs = first.run(x, {}, context)[0], []
    for g in range(4):
        inside = [k * g + j - (k - 1 if kind == "decoder" else 0) for j in range(k)]
        if way == "mean":
            runs.append(jnp.mean(jnp.stack([x[:, t] for t in inside if 0 <= t < T]), 0))
        else:
            side = [x[:, t] if 0 <= t < T else 0 * x[:, 0] for t in inside]
            runs.append(stack.down(jnp.concatenate(side, -1)))
    y = middle.run(jnp.stack(runs, 1), {}, context)[0]
    up = lambda t: y[:, t // k] if way == "mean" else stack.up(y[:, t // k])[:, t % k * 16 : (t % k + 1) * 16]
    x = x + jnp.stack([up(t) for t in range(T)], 1)
    np.testing.assert_allclose(out, last.run(x, {}, context)[0], atol=1e-5)
    np.testing.assert_allclose(aux.scalars["computation"], 2 + 3 / 3, rtol=1e-6)


def test_hourglass_builds_the_middle_for_its_length():
    """Mechanisms whose geometry is fixed by the length get that of the middle."""
    model, tokens = model_of("hourglass:factor=4", attention="synthesizer", model="encoder", task="listops", seq_len=12)
    sizes = [part.periods[0].attention.size.length for part in model.stack.parts]
    assert sizes == [12, 3, 12]
    assert np.isfinite(model(tokens)[0]).all()


# ---- funnel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice", ["encoder", "encoder:pool=first", "encoder:pool=last", "decoder", "decoder:pool=mean"]
)
def test_a_sequence_is_pooled_as_chosen(choice):
    """Of its valid positions the mean, the first or the last; by default an encoder's mean, a decoder's last."""
    model, _ = model_of("fixed", model=choice, task="listops", norm="post")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16)), jnp.float32)
    valid = jnp.arange(6) < jnp.array([[6], [4]])
    name, _, pool = choice.partition(":pool=")
    for mask in (None, valid):
        last = np.array([6, 6 if mask is None else 4])
        rows = {"first": [x[b, 0] for b in (0, 1)], "last": [x[b, last[b] - 1] for b in (0, 1)]}
        rows["mean"] = [x[b, : last[b]].mean(0) for b in (0, 1)]
        expected = model.head(jnp.stack(rows[pool or {"encoder": "mean", "decoder": "last"}[name]]))
        np.testing.assert_allclose(model.predict(x, valid=mask), expected, atol=1e-5)


@pytest.mark.parametrize("task", ["listops", "needle"])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_funnel_is_its_equation(task, pool):
    """Rows one after the other, at a length of 11 that halves to 6 and 3, some of it padding; with answers for the
    sequence, and for tokens."""
    model, _ = model_of(f"funnel:pool={pool}", model="encoder", task=task, seq_len=24, layers=6, position="alibi")
    stack, T = model.stack, 11
    valid = np.ones(T, bool)
    valid[[3, 6, 7, 10]] = False
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, T, 16)), jnp.float32)
    out, aux = jax.jit(lambda x: stack(x, Context(model.position, jnp.asarray(valid)[None])))(x)
    slopes = 2.0 ** (-8 * np.arange(1, 3) / 2)

    def looked(block, queries, at, h, valid):
        """Queries of states (G, D) that stand at places `at`, on states (S, D)."""
        of, norm = block.attention, block.attention_norm.norm
        heads = lambda y: y.reshape(-1, 2, 8)
        q, k, v = heads(of.query(norm(queries))), heads(of.key(norm(h))), heads(of.value(norm(h)))
        scores = jnp.einsum("tnh,snh->nts", q, k) / 8**0.5
        scores = scores - slopes[:, None, None] * np.abs(np.asarray(at)[:, None] - np.arange(len(h)))
        share = jax.nn.softmax(jnp.where(valid, scores, -jnp.inf))
        return of.out(jnp.einsum("nts,snh->tnh", share, v).reshape(-1, 16))

    fed = lambda block, h: h + block.ffn(block.ffn_norm.norm(h)[None])[0][0]
    usual = lambda block, h, valid: fed(block, h + looked(block, h, range(len(h)), h, valid))
    h, mask, levels = x[0], valid, []
    for number in range(3):
        if number:
            pooled, kept = [], []
            for g in range(0, len(h), 2):
                inside = [h[t] for t in range(g, min(g + 2, len(h))) if mask[t]]
                kept.append(bool(inside))
                both = jnp.stack(inside) if inside else jnp.zeros((1, 16))
                pooled.append(getattr(jnp, pool)(both, axis=0))
            block, p = stack.pooling[number - 1].block, jnp.stack(pooled)
            h, mask = fed(block, p + looked(block, p, range(0, len(h), 2), h, mask)), np.array(kept)
        for one in range([2, 1, 1 if task == "listops" else 0][number]):
            h = usual(layer(stack.parts[number].periods[0], one), h, mask)
        levels.append(h)
    h = jnp.stack([h[t // 4] for t in range(T)])
    if task == "needle":
        h = usual(layer(stack.decoder.periods[0], 0), levels[0] + h, valid)
    np.testing.assert_allclose(out[0][valid], h[valid], atol=1e-5)
    counts = [2, 2 / 2, 2 / 4] if task == "listops" else [2, 2 / 2, 1 / 4, 1]
    np.testing.assert_allclose(aux.scalars["computation"], sum(counts), rtol=1e-6)


def test_funnel_costs_less_than_its_layers():
    """Matrix products of a stack on one sequence, where nothing but the pooling attention is of full length."""
    flops = []
    for depth in ("funnel:blocks=3", "fixed"):
        model, _ = model_of(depth, model="encoder", task="listops", layers=6, seq_len=64, position="none")
        (graph, variables), context = nnx.split(model.stack), Context(model.position)
        call = lambda variables, x, graph=graph, context=context: nnx.merge(graph, variables)(x, context)[0]
        flops.append(count_flops(call, variables, jnp.zeros((1, 64, 16))))
    assert 0.5 < flops[0] / flops[1] < 0.72


# ---- distilling ----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("length", [12, 13])
def test_halving_is_its_equation(length):
    """Convolution and pool written out, beside those of XLA; padding in the middle and at the end counts nowhere."""
    halving, random = Halving(Size(length, 6, 1), rngs=nnx.Rngs(0)), np.random.default_rng(0)
    x, valid = random.normal(size=(2, length, 6)), random.random((2, length)) < 0.7
    valid[1, -5:] = False
    kernel, bias = np.asarray(halving.conv.kernel[...]), random.normal(size=6)
    assert halving.conv.bias is not None
    halving.conv.bias[...] = jnp.asarray(bias, jnp.float32)
    found, there = halving(jnp.asarray(np.where(valid[..., None], x, 1e3), jnp.float32), jnp.asarray(valid))
    padded = np.pad(x * valid[..., None], ((0, 0), (1, 1), (0, 0)))
    conv = np.concatenate([padded[:, at : at + length] for at in range(3)], -1) @ kernel + bias
    elu = np.where(conv > 0, conv, np.expm1(np.minimum(conv, 0)))
    for b, i in np.ndindex(2, -(-length // 2)):
        window = [t for t in (2 * i - 1, 2 * i, 2 * i + 1) if 0 <= t < length and valid[b, t]]
        assert there is not None
        expected = elu[b, window].max(0) if window else np.zeros(6)
        np.testing.assert_allclose(found[b, i], expected, atol=1e-5)
        assert there[b, i] == valid[b, 2 * i : 2 * i + 2].any()
    whole, none = halving(jnp.asarray(x, jnp.float32), None)
    taps = jnp.asarray(kernel.reshape(3, 6, 6))
    conv = jax.lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32), taps, (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")
    )
    pooled = jax.lax.reduce_window(
        jax.nn.elu(conv + bias), -jnp.inf, jax.lax.max, (1, 3, 1), (1, 2, 1), ((0, 0), (1, 1), (0, 0))
    )
    np.testing.assert_allclose(whole, pooled[:, : whole.shape[1]], atol=1e-5)
    assert none is None


@pytest.mark.full
def test_distilling_halves_what_each_layer_reads():
    words = {"model": "encoder", "task": "listops", "seq_len": 24, "layers": 4, "position": "none"}
    model, tokens = model_of("distilling", **words)
    x, read = model.entering(model.embedding(tokens)), []
    context = Context(model.position, jnp.ones(tokens.shape, bool), model.predict, tokens=tokens)
    state, here = x, context
    for number, part in enumerate(model.stack.layers):
        read.append(state.shape[1])
        state, _ = part(state, here)
        if number < 3:
            state, valid = model.stack.between[number](state, here.valid)
            here = dataclasses.replace(here, valid=valid, tokens=None)
    assert read == [24, 12, 6, 3]
    out, aux = model.stack(x, context)
    np.testing.assert_allclose(out, jnp.repeat(state, 8, 1), atol=1e-5)
    np.testing.assert_allclose(aux.scalars["computation"], 1 + 1 / 2 + 1 / 4 + 1 / 8)


@pytest.mark.parametrize("layers", [1, 3])
def test_mask_decoder_is_its_equations(layers):
    """The layers below as they are; then the last one, its queries what came of it before, on the states below it."""
    model, tokens = model_of("mask_decoder:passes=3", **ENCODER, layers=layers, position="deberta:reach=4")
    stack, x = model.stack, model.embedding(tokens)
    stack.table[...] = 0.3 * jax.random.normal(jax.random.key(1), stack.table.shape)
    valid = jnp.arange(tokens.shape[1])[None] < jnp.array([24, 17, 9])[:, None]
    context, plain = Context(model.position, valid), LayerContext(valid)
    states, _ = (x, None) if stack.below is None else stack.below(x, context)
    query, block = states + stack.table[...] * 0.5**0.5 / 0.02, stack.last
    for _ in range(3):
        before = lambda states: block.attention_norm.before(states, plain)
        y = block.attention(before(query), before(states), valid=valid, position=model.position)[0]
        query = block.attention_norm.after(query, y, plain)
        query = block.ffn_norm.after(query, block.ffn(block.ffn_norm.before(query, plain))[0], plain)
    out, aux = stack(x, context)
    np.testing.assert_allclose(np.asarray(out)[valid], np.asarray(query)[valid], atol=2e-5)
    assert float(aux.scalars["computation"]) == layers + 2


def test_mask_decoder_without_positions_is_a_fixed_depth():
    """One pass whose queries are the states themselves: the last layer as it always is."""
    model, tokens = model_of("mask_decoder:passes=1", **ENCODER, layers=2)
    x, context = model.embedding(tokens), Context(model.position)
    model.stack.table[...] = 0 * model.stack.table[...]
    below, _ = model.stack.below(x, context)
    expected = model.stack.last(below, {}, context)[0]
    np.testing.assert_allclose(model.stack(x, context)[0], expected, atol=1e-5)
