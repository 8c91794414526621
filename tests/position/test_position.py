"""Positions against other implementations, and what each of them promises."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import optax
import pytest
from flax import nnx

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.measure import maps
from xformers_lab.measure.flops import count_flops, largest_intermediate
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.nn.buckets import bucket
from xformers_lab.nn.plan import Plan
from xformers_lab.position import deberta
from xformers_lab.position.alibi import slopes
from xformers_lab.train.state import init, structure
from xformers_lab.train.step import make_train_step

pytestmark = pytest.mark.full

SCORED = ["shaw:reach=3", "xl", "xl:channels=32", "deberta:reach=4", "deberta:reach=9:buckets=4", "tupe:relative=t5"]
SCORED += ["tener", "shaw:reach=3:values=true", "tupe:relative=t5:reset=true"]


def build(choice: str, **size):
    sizes: dict[str, Any] = {"length": 16, "dim": 32, "heads": 4, "causal": True} | size
    return spec.build("position", choice, **sizes)


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 16, 20])
def test_alibi_is_bloom_and_mpt(golden, heads):
    """BLOOM adds slope * s, MPT slope * (s - last): both differ from -slope * (t - s) by what a softmax forgets."""
    peer = golden("alibi")
    np.testing.assert_allclose(slopes(heads), peer[f"slopes_{heads}"], rtol=1e-6)
    bias = build("alibi", heads=heads, dim=4 * heads).bias()
    last = jax.vmap(lambda head: head(jnp.array([[15]]), jnp.arange(16)[None]))(bias)[:, 0]
    theirs = peer[f"bloom_{heads}"]
    np.testing.assert_allclose(last, theirs - theirs[:, -1:], atol=2e-5, rtol=1e-4)
    if f"mpt_{heads}" in peer and heads & (heads - 1) == 0:
        np.testing.assert_allclose(last, peer[f"mpt_{heads}"][:, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rope_is_llama_and_gptj(golden, pairs):
    peer = golden("rope")
    rope = build(f"rope:pairs={pairs}", length=12, dim=64)
    for name in [name for name in "qk" if f"{name}_{pairs}" in peer]:
        out = rope.rotate(jnp.asarray(np.swapaxes(peer[name], 1, 2)), jnp.arange(12))
        np.testing.assert_allclose(np.swapaxes(out, 1, 2), peer[f"{name}_{pairs}"], atol=2e-5, rtol=1e-4)


def test_rope_is_gemma(golden):
    """Hand-written values at another base, positions 1 and 0; a scale of 2 at twice the position is the same."""
    expected = golden("rope_gemma_fixture")["expected_full"]
    for scale in (1, 2):
        rope = build(f"rope:base=100:scale={scale}", dim=8, heads=2)
        for sample, at in enumerate((scale, 0)):
            out = rope.rotate(jnp.ones((1, 1, 2, 4)), jnp.array([at]))
            np.testing.assert_allclose(out[0], expected[sample], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rope_scores_depend_on_the_distance_alone(pairs):
    rope = build(f"rope:pairs={pairs}:scale=2")
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 4, 8)).astype(np.float32)
    score = lambda t, s: (rope.rotate(q, jnp.array([t])) * rope.rotate(k, jnp.array([s]))).sum(-1)
    np.testing.assert_allclose(score(9, 4), score(105, 100), atol=1e-4)
    assert np.abs(score(9, 4) - score(9, 5)).max() > 1e-2


def turned(choice: str, at: int, **size) -> np.ndarray:
    """By how much a position turns each plane of a head, of x = (1, 0), in radians."""
    rope = build(choice, **size)
    half = rope.size.head // 2
    x = jnp.concatenate([jnp.ones(half), jnp.zeros(half)])[None, None, None]
    out = np.asarray(rope.rotate(x, jnp.array([at])))[0, 0, 0]
    return np.arctan2(out[half:], out[:half])


@pytest.mark.parametrize("scale", [1.0, 4.0, 10.0])
def test_longer_rope_is_its_equations(scale):
    """ntk keeps the fastest plane and divides the slowest; yarn keeps what turns often and divides the others."""
    size: dict[str, Any] = {"dim": 64, "heads": 2}
    speeds = 1000.0 ** (-np.arange(16) / 16)
    said = lambda words: turned(f"rope:base=1000:scale={scale}:{words}", 1, **size)
    np.testing.assert_allclose(said("scaling=linear"), speeds / scale, rtol=1e-5)
    ntk = said("scaling=ntk")
    np.testing.assert_allclose(ntk, (1000 * scale ** (32 / 30)) ** (-np.arange(16) / 16), rtol=1e-4)
    np.testing.assert_allclose(ntk[[0, -1]], [1, speeds[-1] / scale], rtol=1e-4)
    yarn = said("scaling=yarn:trained=512")
    for plane, speed in enumerate(speeds):
        turns = 512 * speed / (2 * np.pi)
        kept = 0 if turns < 1 else 1 if turns > 32 else (turns - 1) / 31
        np.testing.assert_allclose(yarn[plane], (1 - kept) * speed / scale + kept * speed, rtol=1e-4)
    assert {0, 1} < {round(float(share), 6) for share in np.clip((512 * speeds / (2 * np.pi) - 1) / 31, 0, 1)}
    share = build(f"rope:scale={scale}:scaling=yarn:trained=512").share
    np.testing.assert_allclose(share, (0.1 * np.log(scale) + 1) ** 2)


def test_a_share_of_the_channels_is_turned():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 16)), jnp.float32)
    some, alone = build("rope:turned=0.25", dim=32, heads=2), build("rope", dim=8, heads=2)
    out = some.rotate(x, jnp.arange(5))
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_allclose(out[..., :4], alone.rotate(x[..., :4], jnp.arange(5)), atol=1e-6)


def test_fire_is_its_equations():
    position = build("fire:width=5:threshold=6", dim=6, heads=3)
    for at, leaf in enumerate(jax.tree.leaves(nnx.state(position), is_leaf=lambda x: isinstance(x, nnx.Variable))):
        leaf[...] = leaf[...] + 0.1 * at
    c, L = float(position.scale[...]), 6 * float(position.share_of_threshold[...])
    for head in range(3):
        one = jax.tree.map(lambda leaf, head=head: leaf[head], position.bias())
        found = np.asarray(one(jnp.arange(16)[:, None], jnp.arange(16)[None]))
        slopes, offsets, weights = (
            np.asarray(x[...])[head] for x in (position.slopes, position.offsets, position.weights)
        )
        for t, s in itertools.product(range(16), range(16)):
            progress = np.log(c * abs(t - s) + 1) / np.log(c * max(t, L) + 1)
            hidden = np.maximum(slopes * progress + offsets, 0)
            expected = hidden @ weights + float(position.offset[head])
            np.testing.assert_allclose(found[t, s], expected, rtol=1e-4, atol=1e-5)


def logits(**changes):
    small = {"task": "copy", "seq_len": 12, "dim": 16, "heads": 2, "layers": 4, "batch": 2}
    config = edit(Config(), **(small | changes))
    task = build_task(config)
    return build_model(config, task)(jnp.asarray(task.batch("train", 0).inputs))[0]


def test_layers_have_positions_in_turn():
    # Layers of a cycle of two are drawn alike, whatever is in it.
    for name in ("rope", "none"):
        alike = logits(position=name, attention="full+full")
        np.testing.assert_allclose(logits(position=f"{name}+{name}"), alike, atol=1e-5)
    found = [logits(position=words) for words in ("rope+rope", "none+none", "rope+none", "none+rope")]
    assert all(np.abs(one - other).max() > 1e-3 for one, other in itertools.combinations(found, 2))


def test_a_cycle_draws_and_learns_what_its_parts_do():
    config = edit(Config(), task="copy", position="t5+rope", layers=4)
    model: Any = build_model(config, build_task(config))
    assert model.position.of_layer(3) is model.position.parts[1] and not model.position.embeds
    assert jax.tree.leaves(nnx.state(model.position, nnx.Param))


@pytest.mark.parametrize("changes, message", [
    ({"position": "rope+learned"}, "position=rope.learned: learned marks the tokens before the first layer"),
    ({"position": "rope+nowhere"}, 'no position "nowhere"'),
    ({"position": "rope+none", "depth": "universal", "layers": 3}, "layers=3 is not divisible by the 2"),
])  # fmt: skip
def test_cycles_that_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        check_config(edit(Config(), **({"task": "copy"} | changes)))


def test_t5_buckets():
    """Exact up to a quarter of the buckets a side, then wider, capped; the future apart from the past."""
    back = np.arange(-200, 201)
    both = np.asarray(bucket(back, 32, 128, True))
    assert list(both[200:208]) == list(range(8)) and both[200 + 8] == 8
    assert (np.diff(both[200:]) >= 0).all() and both[200 + 127] == 15 and both[-1] == 15
    assert both[199] == 17 and both[0] == 31
    past = np.asarray(bucket(back, 32, 128, False))
    assert (past[:201] == 0).all() and list(past[200:216]) == list(range(16)) and past[-1] == 31


@pytest.mark.parametrize("causal, choice", [(True, "t5"), (False, "t5"), (True, "t5:sides=both")])
def test_every_t5_bucket_serves_a_model_that_uses_the_past_alone(causal, choice):
    scores = build(choice, causal=causal, heads=1).bias()
    scores = jax.tree.map(lambda leaf: jnp.arange(32), scores)
    at = jnp.arange(160)
    buckets = np.asarray(scores(at[:, None], at[None]))
    used = len(np.unique(buckets[np.tril_indices(160)] if causal else buckets))
    assert used == (16 if causal and "both" in choice else 32 if causal else 31)  # distance 0 has one side


@pytest.mark.full
@pytest.mark.parametrize("attention", ["full", "mla", "collaborative"])
def test_untied_positions_leave_content_its_share(attention):
    """Where no two positions correlate, scores are those of content over sqrt(2 H), all of them, rotary parts too."""
    position = build("tupe", causal=True)
    position.table[...] = 0 * position.table[...]
    layer, shared = (spec.build("attention", attention, length=16, dim=32, heads=4) for _ in range(2))
    shared.query.kernel[...] = shared.query.kernel[...] * 2**-0.5
    x = np.random.default_rng(0).standard_normal((2, 16, 32)).astype(np.float32)
    whole = layer(x, causal=True, position=position)[0]
    np.testing.assert_allclose(whole, shared(x, causal=True)[0], atol=1e-5)
    assert np.abs(whole - layer(x, causal=True)[0]).max() > 1e-3
    cache = layer.init_cache(2, 16)
    for t in range(3):
        out, cache, _ = layer.decode(x[:, t], cache, at=jnp.int32(t), position=position)
        np.testing.assert_allclose(out, whole[:, t], atol=1e-5)


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


@pytest.mark.parametrize("buckets, reach", [(16, 64), (256, 512)])
def test_deberta_buckets(golden, buckets, reach):
    peer = golden("deberta_log_bucket")
    ours = deberta.bucket(jnp.asarray(peer["rel"]), buckets, reach)
    np.testing.assert_array_equal(ours, peer[f"b_{buckets}_{reach}"])


def scaled_up(position):
    """Its parameters as large as those of the products that they are added to."""
    for _, variable in nnx.iter_graph(position):
        if isinstance(variable, nnx.Param):
            variable[...] = variable[...] / jnp.std(variable[...]) * variable.shape[0] ** (-0.5 * (variable.ndim == 3))
    return position


def scaled_up_model(**chosen) -> tuple[Any, Any]:
    config = edit(Config(), **chosen)
    task = build_task(config)
    model: Any = build_model(config, task)
    scaled_up(model.position)
    return model, task


def by_definition(layer, position, x, valid, window: int | None, causal: bool):
    """One layer from every pair's vector, as the papers write it: arrays of (T, S, channels)."""
    (B, T, _), N, H, name = x.shape, layer.size.heads, layer.size.head, type(position).__name__
    q, k, v = (linear(x).reshape(B, T, -1, H) for linear in (layer.query, layer.key, layer.value))
    k, v = (jnp.repeat(y, N // y.shape[2], 2) for y in (k, v))
    apart = np.arange(T)[:, None] - np.arange(T)
    heads = lambda y: y.reshape(*y.shape[:-1], N, H)
    s, terms = jnp.einsum("btnh,bsnh->bnts", q, k), 1
    if name == "Shaw":
        reach = len(position.table) // 2
        s += jnp.einsum("btnh,tsh->bnts", q, position.table[...][np.clip(-apart, -reach, reach) + reach])
    elif name == "Xl":
        angle = apart[..., None] * np.array(position.waves)[None, None]
        R = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
        R = jnp.einsum("tsc,cnh->tsnh", R, position.projection[...])
        s += jnp.einsum("nh,bsnh->bns", position.u[...], k)[:, :, None]
        s += jnp.einsum("btnh,tsnh->bnts", q + position.v[...][None, None], R)
    elif name == "Tener":
        angle = apart[..., None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
        R = jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], -1), jnp.float32)
        s += jnp.einsum("nh,bsnh->bns", position.u[...], k)[:, :, None]
        s += jnp.einsum("btnh,tsh->bnts", q + position.v[...][None, None], R)
        terms = 1 / H  # not scaled
    elif name == "Deberta":
        R, near = position.side, (lambda y: y) if position.buckets is None else _log_bucket(position)
        places = lambda y: np.clip(near(y) + R, 0, 2 * R - 1)
        s += jnp.einsum("btnh,tsnh->bnts", q, heads(position.key(position.table[...]))[places(apart)])
        s += jnp.einsum("bsnh,tsnh->bnts", k, heads(position.query(position.table[...]))[places(-apart)])
        terms = 3
    elif name == "Tupe":
        mine, theirs = (heads(linear(position.table[:T])) for linear in (position.query, position.key))
        s += jnp.einsum("tnh,snh->nts", mine, theirs)[None]
        terms = 2
    s = s / (terms * H) ** 0.5
    if name == "Tupe":
        s += position.relative.table[...][:, bucket(apart, 32, 128, False)][None]
        if position.first is not None:
            content = jnp.einsum("btnh,bsnh->bnts", q, k) / (terms * H) ** 0.5
            theta_1 = 0.7  # any number is as good
            s = s.at[:, :, :, 0].set(content[..., 0] + position.first[...][:, None])
            s = s.at[:, :, 0].set(content[:, :, 0] + theta_1)
    seen = (apart >= 0) if causal else np.ones((T, T), bool)
    seen = (seen if window is None else seen & (abs(apart) <= window))[None, None] & valid[:, None, None]
    p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s, -1e30)), 0)
    mean = jnp.einsum("bnts,bsnh->btnh", p, v)
    if name == "Shaw" and position.of_values is not None:
        reach = len(position.of_values) // 2
        mean += jnp.einsum("bnts,tsh->btnh", p, position.of_values[...][np.clip(-apart, -reach, reach) + reach])
    return layer.out(mean.reshape(B, T, -1))


def _log_bucket(position):
    """DeBERTa's second version, distance by distance."""
    near, last = position.buckets // 2, position.reach - 1

    def one(x):
        if abs(x) <= near:
            return x
        return np.sign(x) * (np.ceil(np.log(abs(x) / near) / np.log(last / near) * (near - 1)) + near)

    return lambda y: np.vectorize(one, otypes=[int])(y)


EVERY_PAIR = [(choice, attention, False) for choice in SCORED for attention in ("full", "local:window=5")]
# Samples run in a loop, as long ones are on CPU.
EVERY_PAIR += [("xl", "full", True), ("deberta:reach=4", "local:window=5", True)]


@pytest.mark.full
@pytest.mark.parametrize("choice, attention, looped", kinds.every_third(EVERY_PAIR))
def test_scores_are_those_of_every_pair(choice, attention, looped):
    """Values, and gradients of the input and of every parameter, with padding and grouped heads, in several blocks."""
    size: dict[str, Any] = {"length": 37, "dim": 32, "heads": 4, "key_heads": 2}
    plan = Plan(loop_from=1 if looped else None)
    position, layer = scaled_up(build(choice, **size)), spec.build("attention", attention, **size, plan=plan)
    layer.block = 16 if attention == "full" else None
    x, weight = np.random.default_rng(0).standard_normal((2, 3, 37, 32)).astype(np.float32)
    valid = np.arange(37) < np.array([37, 30, 5])[:, None]
    window, causal = (None, True) if attention == "full" else (5, False)
    graphs, params = zip(*(nnx.split(module) for module in (position, layer)), strict=True)

    def fast_form(position, layer, x):
        return layer(x, valid=jnp.asarray(valid), causal=causal, position=position)[0]

    def run(form):
        def total(params, x):
            out = form(*(nnx.merge(graph, each) for graph, each in zip(graphs, params, strict=True)), x)
            return (out * weight * valid[..., None]).sum(), out

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x)

    ((_, out), grads) = run(fast_form)
    ((_, expected), slow_grads) = run(
        lambda position, layer, x: by_definition(layer, position, x, valid, window, causal)
    )
    np.testing.assert_allclose(out[valid], expected[valid], atol=3e-5)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(slow_grads), strict=True
    ):
        assert np.abs(theirs).max() > 1e-3, f"no gradient reaches {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("choice", ["shaw", "shaw:values=true", "xl", "tener", "deberta:reach=4", "tupe"])
def test_nothing_of_every_pair_is_built(choice):
    """Forward and backward of windows: the largest array, and what is computed, grow as the length does."""
    costs = []
    for T in (256, 512, 1024):
        size: dict[str, Any] = {"length": T, "dim": 16, "heads": 2}
        graph, params = nnx.split((build(choice, **size), spec.build("attention", "local:window=16", **size)))

        def total(params, x, graph=graph):
            position, layer = nnx.merge(graph, params)
            return layer(x, causal=True, position=position)[0].sum()

        grad, x = jax.grad(total, (0, 1)), jax.ShapeDtypeStruct((1, T, 16), jnp.float32)
        costs.append((largest_intermediate(grad, params, x), count_flops(grad, params, x)))
    for one, two in itertools.pairwise(costs):
        assert two[0] <= 2.1 * one[0] and two[1] <= 2.1 * one[1]


@pytest.mark.parametrize("choice", ["alibi", "t5", *SCORED])
def test_moved_along_it_is_the_same(choice):
    """What stands before the window changes nothing, so positions count from anywhere; not so for absolute ones."""
    position = scaled_up(build(choice, length=32))
    layer = spec.build("attention", "local:window=4", length=32, dim=32, heads=4)
    x, other = np.random.default_rng(0).standard_normal((2, 2, 16, 32)).astype(np.float32)
    run = jax.jit(lambda x: layer(x, causal=True, position=position)[0])
    alone, behind = run(x)[:, 4:], run(np.concatenate([other, x], 1))[:, 20:]
    far = float(jnp.abs(alone - behind).max())
    assert far > 1e-2 if choice.startswith("tupe") else far < 2e-5


@pytest.mark.full
@pytest.mark.parametrize("attention, choice", kinds.every_third([*itertools.product(
    ["local:window=4", "softcap", "poolingformer:window=3:reach=8"],
    ["shaw:reach=3", "xl", "deberta:reach=4", "tupe", "conv", "tener", "shaw:reach=3:values=true:each_layer=true"],
)]))  # fmt: skip
def test_token_by_token_it_is_the_same(choice, attention):
    """Through a model of two layers with caches that begin anywhere, of rings and of pools."""
    chosen = {"task": "copy", "attention": attention, "position": choice, "seq_len": 14, "dim": 16, "heads": 2}
    model, task = scaled_up_model(**chosen, layers=2, batch=2)
    tokens = jnp.asarray(task.batch("train", 0).inputs[:2])
    graph, variables = nnx.split(model)

    def steps(variables, tokens):
        one = lambda cache, token: nnx.merge(graph, variables).step(cache, token)[::-1]
        cache = nnx.merge(graph, variables).init_cache(2, 14)
        return jax.lax.scan(one, cache, tokens.T)[1].swapaxes(0, 1)

    with jax.default_matmul_precision("highest"):
        whole = jax.jit(lambda v, tokens: nnx.merge(graph, v)(tokens)[0])(variables, tokens)
        np.testing.assert_allclose(jax.jit(steps)(variables, tokens), whole, atol=1e-4 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("position, attention, message", [
    ("shaw", "linear", "linear takes no bias"),
    ("xl", "gla", "takes no bias"),
    ("tupe", "fnet", "neither queries nor keys"),
    ("shaw:values=true", "topk", "topk cannot add vectors of distances to values"),
    ("shaw:values=true", "longformer", "use this position without them, or attention=full or local"),
    ("shaw:each_layer=true", "linear", "linear takes no bias"),
    ("alibi", "fnet", "takes no bias.* use position=learned"),
    ("rope", "fnet", "neither queries nor keys.* use position=learned"),
    ("rope", "average", "neither queries nor keys"),
    ("rope", "hard_coded", "neither queries nor keys"),
    ("shaw", "synthesizer:kind=random", "neither queries nor keys"),
    ("deberta", "mla", "mla|compares queries with keys"),
    ("conv:width=4", "full", "odd where both sides are seen"),
])  # fmt: skip
def test_what_has_no_scores_is_refused_before_anything_compiles(position, attention, message):
    config = edit(Config(), task="listops", model="encoder", attention=attention, position=position, seq_len=16, dim=16)
    with pytest.raises(UsageError, match=message):
        check_config(config)


@pytest.mark.parametrize("attention", ["full", "local:window=4"])
def test_maps_show_the_weights_alone(attention):
    """What is added to values stands apart from the weights that are read off by values."""
    chosen = {"task": "copy", "attention": attention, "seq_len": 12, "dim": 16, "heads": 2, "layers": 1}
    model = lambda position: scaled_up_model(position=position, **chosen)[0]
    maps_of = lambda position: maps.of_model(model(position), np.arange(12)[None] % 5)[0].weights
    one, other = maps_of("shaw:reach=3:values=true"), maps_of("shaw:reach=3")
    np.testing.assert_allclose(one.sum(-1), 1, atol=1e-4)
    assert one.shape == other.shape


@pytest.mark.parametrize("changes", [{}, {"position": "shaw:reach=3:values=true:each_layer=true+none"},
                                     {"model": "encoder_decoder", "layers": 2}])  # fmt: skip
def test_every_layer_has_vectors_of_its_own(changes):
    """As many tables as layers, none for all, and every one is used."""
    chosen = {"task": "copy", "position": "shaw:reach=3:values=true:each_layer=true", "layers": 4, "seq_len": 12}
    chosen |= {"dim": 16, "heads": 2, "batch": 2} | changes
    config = edit(Config(), **chosen)
    task = build_task(config)
    model: Any = build_model(config, task)
    tokens, (graph, params, rest) = jnp.asarray(task.batch("train", 0).inputs), nnx.split(model, nnx.Param, ...)
    grads = jax.grad(lambda params: (nnx.merge(graph, params, rest)(tokens)[0] ** 2).sum())(params)
    moved = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    tables = {path: leaf for path, leaf in moved.items() if "own_position" in path}
    assert all((np.abs(leaf).max((-2, -1)) > 0).all() for leaf in tables.values())
    layers = {"none": 2, "encoder_decoder": 4}.get(next(iter(changes), ""), 4)
    layers = 2 if "+none" in chosen["position"] else layers
    assert sum(leaf.size for leaf in tables.values()) == layers * 2 * 7 * 8
    assert not any("'position'" in path for path in moved)


def test_what_training_moves_is_a_mean_over_samples():
    """Routing's centroids, which a training step moves, with a bias of every sample."""
    size: dict[str, Any] = {"length": 16, "dim": 32, "heads": 4}
    layer, position = spec.build("attention", "routing:clusters=2:window=8", **size), build("shaw")
    before, x = np.asarray(layer.centroids[...]), np.random.default_rng(0).standard_normal((2, 16, 32))
    layer(x, position=position, causal=True)
    np.testing.assert_array_equal(layer.centroids[...], before)
    layer(x, position=position, causal=True, key=jax.random.key(0))
    assert layer.centroids.shape == before.shape and 0 < np.abs(layer.centroids[...] - before).max() < 1


@pytest.mark.parametrize("choice, width", [("grid", 4), ("grid:width=5", 5)])
def test_grid(choice, width):
    """Row by row, also where the last row is not full; the tables know one coordinate each."""
    position = build(choice)
    x = np.random.default_rng(0).standard_normal((2, 16, 32)).astype(np.float32)
    out = position.embed(jnp.asarray(x), jnp.arange(16))
    for t, (row, column) in enumerate(itertools.islice(itertools.product(range(4), range(width)), 16)):
        place = 25 * (position.rows[...][row] + position.columns[...][column])[None]  # 25 * 0.02 = sqrt(1/2) / sqrt(2)
        np.testing.assert_allclose(out[:, t], (x[:, t] + place) / 1.5**0.5, atol=1e-6)
    assert (position.rows.shape[0], position.columns.shape[0]) == (4, width)
    np.testing.assert_array_equal(position.embed(jnp.asarray(x[:, 7:9]), jnp.arange(7, 9)), out[:, 7:9])


@pytest.mark.parametrize("causal, width", [(True, 3), (True, 4), (False, 3), (False, 5)])
def test_convolution(causal, width):
    """By definition; padding, whatever it holds, and causally what comes later leave no trace."""
    position = build(f"conv:width={width}", causal=causal)
    w = np.asarray(position.weights[...])
    x, other = np.random.default_rng(0).standard_normal((2, 2, 16, 32)).astype(np.float32)
    valid = np.arange(16) < np.array([16, 11])[:, None]
    out = np.asarray(position.embed(jnp.asarray(x), jnp.arange(16), valid=jnp.asarray(valid)))
    first = 1 - width if causal else -(width // 2)
    for b, t in np.argwhere(valid):
        near = [(j, t + first + j) for j in range(width) if 0 <= t + first + j < 16 and valid[b, t + first + j]]
        expected = (x[b, t] + sum(w[j] * x[b, s] for j, s in near)) / 1.5**0.5
        np.testing.assert_allclose(out[b, t], expected, atol=1e-5)
    garbage = jnp.where(valid[..., None], x, other)
    np.testing.assert_array_equal(position.embed(garbage, jnp.arange(16), valid=jnp.asarray(valid))[valid], out[valid])
    if causal:
        later = position.embed(jnp.asarray(x).at[:, 9:].set(other[:, 9:]), jnp.arange(16), valid=jnp.asarray(valid))
        np.testing.assert_array_equal(later[:, :9], out[:, :9])


@pytest.mark.parametrize("draw", ["subset", "offset"])
def test_randomized_places(draw):
    """All from the range and in order; as many as the length, each of the range as often, or one behind the other."""
    position = build(f"randomized:range=24:draw={draw}")
    keys = jax.random.split(jax.random.key(0), 3000)
    places = np.asarray(jax.jit(jax.vmap(lambda key: position.drawn(key).places()))(keys))
    assert places.shape == (3000, 16) and places.min() == 0 and places.max() == 23
    steps = np.diff(places, axis=1)
    if draw == "offset":
        assert (steps == 1).all()
        counts, expected = np.bincount(places[:, 0], minlength=9), 3000 / 9
        assert len(counts) == 9
    else:
        assert (steps >= 1).all() and steps.max() > 1
        counts, expected = np.bincount(places.ravel(), minlength=24), 3000 * 16 / 24
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("choice", ["randomized:range=40", "randomized:range=40:draw=offset", "randomized:range=16"])
def test_randomized_adds_the_sinusoids_of_its_places(choice):
    """In evaluation one draw, the run's own, of which a shorter sequence has the first; where nothing is left to draw
    they are those of position=sinusoidal."""
    position, other = build(choice), spec.build("position", choice, length=16, dim=32, rngs=nnx.Rngs(1), causal=True)
    x = np.random.default_rng(0).standard_normal((2, 16, 32)).astype(np.float32)
    places, at = np.asarray(position.places()), jnp.arange(16)
    angle = places[:, None] / 10_000 ** (np.arange(0, 32, 2) / 32)
    waves = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(16, 32)
    out = position.embed(jnp.asarray(x), at)
    np.testing.assert_allclose(out, (x + waves) / 1.5**0.5, atol=1e-5)
    np.testing.assert_array_equal(position.embed(jnp.asarray(x), at), out)
    np.testing.assert_array_equal(position.embed(jnp.asarray(x[:, 5:7]), at[5:7]), out[:, 5:7])
    if "range=16" in choice:
        np.testing.assert_allclose(out, build("sinusoidal").embed(jnp.asarray(x), at), atol=1e-6)
    else:
        assert (np.asarray(other.places()) != places).any()


@pytest.mark.parametrize("model", ["decoder", "encoder_decoder"])
def test_places_are_drawn_by_seed_and_step(model):
    """Losses of one state on one batch, without dropout, tell what is drawn; with no draw they are all the same."""
    losses = {}
    for position in ("randomized", "randomized:draw=offset", "sinusoidal"):
        config = edit(Config(), task="copy", model=model, position=position, seq_len=16, dim=16, layers=1, batch=4)
        task = build_task(config)
        state = init(config, task, optax.sgd(0.0))
        step = jax.jit(make_train_step(config, task, structure(config, task), optax.sgd(0.0)))
        batch = jax.tree.map(jnp.asarray, task.batch("train", 0))
        at = lambda number, seed, state=state: dataclasses.replace(state, step=jnp.int32(number), seed=jnp.uint32(seed))
        loss = lambda state, step=step, batch=batch: float(step(state, batch)[1]["loss"])
        losses[position] = [loss(at(*each)) for each in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert len(set(losses.pop("sinusoidal"))) == 1
    for first, again, later, elsewhere in losses.values():
        assert first == again and len({first, later, elsewhere}) == 3


@pytest.mark.parametrize("depth", ["fixed", "universal", "reversible"])
def test_every_layer_of_a_pass_is_told_of_one_draw(depth):
    """What a depth adds again is what the model added, in training as in evaluation."""
    config = edit(Config(), task="copy", position="randomized", depth=depth, seq_len=16, dim=16, layers=2, batch=2)
    task, seen = build_task(config), []
    model: Any = build_model(config, task)
    run = model.stack
    model.stack = lambda x, context, *, key: seen.append((x, context.position)) or run(x, context, key=key)
    tokens = jnp.asarray(task.batch("train", 0).inputs)
    for key in (None, jax.random.key(0), jax.random.key(1)):
        model(tokens, key=key)
    for x, position in seen:
        np.testing.assert_array_equal(position.embed_rows(model.embedding(tokens)), x)
    assert len({np.asarray(position.places()).tobytes() for _, position in seen}) == 3
    np.testing.assert_array_equal(seen[0][1].places(), model.position.places())


def test_untied_positions_are_as_many_as_it_was_built_for():
    with pytest.raises(ValueError, match="knows 16 positions"):
        spec.build("attention", "full", length=16, dim=32, heads=4)(jnp.ones((1, 17, 32)), position=build("tupe"))


@pytest.mark.parametrize("choice, message", [
    ("t5:buckets=2:sides=both", "buckets must be even and at least 4"),
    ("t5:farthest=4", "must be above 16"),
    ("rope:scale=0", "scale must be above 0"),
    ("fire:threshold=0", "threshold must be above 0"),
    ("rope:turned=1.5", "turned is a share of the channels"),
    ("rope:scaling=yarn:scale=2", "such as trained=128"),
    ("rope:scaling=ntk:trained=64", "trained=64 is an option of scaling=yarn"),
    ("floater:delta=0", "delta is the time between two positions"),
    ("floater:steps=0", "steps and hidden must be at least 1"),
    ("shaw:reach=0", "reach must be at least 1"),
    ("xl:base=1", "base must be above 1"),
    ("xl:channels=3", "channels come as sine and cosine"),
    ("tener:base=0", "base must be above 1"),
    ("deberta:reach=0", "reach must be at least 1"),
    ("deberta:buckets=7", "buckets must be even"),
    ("deberta:reach=4:buckets=6", "half of them below reach - 1 = 3"),
    ("conv:width=1", "width must be at least 2"),
    ("randomized:range=15", "range=15 has no places for 16 tokens: use range=16 or more"),
    ("grid:width=17", "width must be from 1 to the length of 16"),
])  # fmt: skip
def test_bad_options(choice, message):
    with pytest.raises(Exception, match=message):
        build(choice)


def test_floater_is_its_equation():
    """The Runge-Kutta steps in numpy; finer ones come to the same curve; at the start they are sinusoids alone."""
    x = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    fresh, fine = (build(f"floater:delta=0.5:steps={steps}:hidden=6", dim=8, heads=2) for steps in (2, 16))
    sinusoids = build("sinusoidal", dim=8, heads=2)
    embedded = lambda position: np.asarray(position.embed(jnp.asarray(x), jnp.arange(16)))
    np.testing.assert_allclose(embedded(fresh), embedded(sinusoids), atol=1e-6)
    for position in (fresh, fine):
        random = np.random.default_rng(1)
        for linear in (position.first, position.last):
            linear.kernel[...], linear.bias[...] = (
                jnp.asarray(random.standard_normal(leaf.shape), jnp.float32) for leaf in (linear.kernel, linear.bias)
            )
        position.time[...] = jnp.asarray(random.standard_normal(6), jnp.float32)
    W_1, b_1, W_2, b_2, w = (
        np.asarray(leaf[...], np.float64)
        for leaf in (fresh.first.kernel, fresh.first.bias, fresh.last.kernel, fresh.last.bias, fresh.time)
    )
    h = lambda time, p: np.tanh(p @ W_1 + w * time + b_1) @ W_2 + b_2
    p, time, points, step = np.zeros(8), 0.0, [], 0.25
    for _ in range(16):
        points.append(p)
        for _ in range(2):
            a = h(time, p)
            b = h(time + step / 2, p + step / 2 * a)
            c = h(time + step / 2, p + step / 2 * b)
            d = h(time + step, p + step * c)
            p, time = p + step / 6 * (a + 2 * b + 2 * c + d), time + step
    solved = np.asarray(fresh.solved(16))
    np.testing.assert_allclose(solved, points, atol=2e-4)
    np.testing.assert_allclose(embedded(fresh), embedded(sinusoids) + solved / 1.5**0.5, atol=1e-4)
    exact = np.asarray(fine.solved(16))
    assert np.abs(exact - solved).max() < 0.05 * np.abs(exact).max()
    np.testing.assert_array_equal(fresh.solved(5), fresh.solved(16)[:5])
