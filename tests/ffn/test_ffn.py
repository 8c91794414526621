"""Feed-forward sub-layers against their definitions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import layer as layer_of

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.ffn import ACTIVATIONS
from xformers_lab.ffn.hash import mixed
from xformers_lab.ffn.noisy_top import LEAST, chance
from xformers_lab.measure.flops import count_flops
from xformers_lab.model import build_model, build_task, check_config


def build(choice: str, dim: int = 16):
    return spec.build("ffn", choice, length=16, dim=dim, heads=2)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def by_definition(moe, x, valid=None):
    """Every expert on every token, weighted by the router's choice."""
    p = jax.nn.softmax(x @ moe.router.kernel[...])
    ranked = jnp.sort(p, -1, descending=True)[..., moe.top - 1 : moe.top]
    weight = jnp.where(p >= ranked, p, 0)
    weight = weight / weight.sum(-1, keepdims=True) if moe.top > 1 else weight
    weight = weight if valid is None else weight * valid[..., None]
    hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, moe.up[...]))
    return jnp.einsum("btef,efd,bte->btd", hidden, moe.down[...], weight)


@pytest.mark.parametrize("top", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.full
def test_moe_is_its_definition(top, padded):
    moe, x = build(f"moe:experts=4:top={top}"), draw(3, 11, 16)
    valid = jnp.asarray(np.random.default_rng(1).random((3, 11)) < 0.7) if padded else None
    graph, params = nnx.split(moe)

    def both(run):
        loss = lambda params, x: (run(nnx.merge(graph, params), x) * draw(3, 11, 16, seed=2)).sum()
        return run(moe, x), jax.grad(loss, (0, 1))(params, x)

    with jax.default_matmul_precision("highest"):
        fast = both(lambda moe, x: moe(x, valid=valid)[0])
        slow = both(lambda moe, x: by_definition(moe, x, valid))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), fast, slow)


@pytest.mark.full
def test_shared_experts_are_a_network_beside():
    moe, x = build("moe:experts=4:top=2:ratio=1:shared=3"), draw(3, 11, 16)
    assert moe.always.up.kernel.shape == (16, 48)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(moe(x)[0], by_definition(moe, x) + moe.always(x)[0], atol=2e-5)


@pytest.mark.full
def test_a_bias_chooses_and_does_not_weigh():
    moe, x = build("moe:experts=4:bias=0.25"), draw(3, 11, 16)
    plain = build("moe:experts=4")
    np.testing.assert_array_equal(moe(x)[0], plain(x)[0])
    np.testing.assert_array_equal(moe.bias[...], 0)  # evaluation moves nothing
    moe.bias[...] = jnp.array([0.0, 9, 0, 0])
    p = jax.nn.softmax(x @ moe.router.kernel[...])[..., 1:2]
    one = jax.nn.gelu(x @ moe.up[...][1]) @ moe.down[...][1]
    np.testing.assert_allclose(moe(x)[0], p * one, atol=2e-5)
    for biases in ([0.25, 8.75, 0.25, 0.25], [0.5, 8.5, 0.5, 0.5]):
        moe(x, key=jax.random.key(0))
        np.testing.assert_allclose(moe.bias[...], biases)


@pytest.mark.full
def test_a_bias_balances_without_a_loss():
    """Tokens of which most would go to one expert."""
    moe, x = build("moe:experts=4:bias=0.003:balance=0"), draw(8, 32, 16) + 0.7 * draw(16)
    busiest = lambda: float(moe(x)[1].scalars["busiest_expert"])
    before, (graph, params, rest) = busiest(), nnx.split(moe, nnx.Param, ...)

    @jax.jit
    def after(params, rest):
        moe = nnx.merge(graph, params, rest)
        moe(x, key=jax.random.key(0))
        return nnx.split(moe, nnx.Param, ...)[2]

    for _ in range(300):
        rest = after(params, rest)
    moe = nnx.merge(graph, params, rest)
    load = jax.nn.one_hot(jnp.argmax(jax.nn.softmax(x @ moe.router.kernel[...]) + moe.bias[...], -1), 4).mean((0, 1))
    assert before > 1.6 and np.abs(load - 0.25).max() < 0.1, (before, load)


@pytest.mark.full
@pytest.mark.parametrize("choice", ["moe:top=2", "moe:capacity=0.5", "moe:choice=expert"])
def test_order_of_tokens_changes_nothing(choice):
    moe, x = build(choice), draw(2, 24, 16)
    order = np.random.default_rng(0).permutation(24)
    np.testing.assert_allclose(moe(x[:, order])[0], moe(x)[0][:, order], atol=1e-5)
    metrics = moe(x[:, order])[1].metrics()
    for name, value in moe(x)[1].metrics().items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_moe_computes_only_what_was_sent():
    """Products grow with the choices per token, not with the experts."""
    count = lambda choice: count_flops(
        lambda x: build(choice, 32)(x)[0], jax.ShapeDtypeStruct((1, 1024, 32), jnp.float32)
    )
    one = 2 * 2 * 1024 * 32 * 128
    assert one <= count("moe:experts=4") < 1.4 * one
    assert count("moe:experts=4:top=2") < 2.4 * one
    assert count("moe:experts=16") < 2.1 * one
    assert count("prototypes:experts=16") < 3.1 * one
    assert count("gshard:experts=4") < 2.4 * one
    assert count("noisy_top:experts=4:top=1") < 1.4 * one
    assert one <= count("moe:choice=expert") < 1.6 * one
    assert one <= count("moe:experts=16:choice=expert") < 2.1 * one
    assert count("moe:experts=4:choice=expert:capacity=2") < 2.4 * one
    assert count("moe:experts=4:capacity=0.5") < 0.9 * one
    assert count("moe:experts=4:capacity=3") < 1.4 * one  # no token is sent more often than it chose


def test_capacity_keeps_the_most_certain():
    moe, x = build("moe:experts=2:capacity=0.5"), draw(1, 12, 16)
    p = np.asarray(jax.nn.softmax(x @ moe.router.kernel[...]))[0]
    kept = np.abs(moe(x)[0][0]).max(-1) > 0
    for expert in range(2):
        mine = np.nonzero(p.argmax(-1) == expert)[0]
        best = mine[np.argsort(-p[mine, expert])][:3]  # 0.5 * 12 / 2
        assert set(np.nonzero(kept)[0]) & set(mine) == set(best)


@pytest.mark.full
def test_experts_choose_equally_many():
    moe, x = build("moe:experts=4:choice=expert"), draw(1, 16, 16)
    p = jax.nn.softmax(x @ moe.router.kernel[...])
    chosen = np.stack([np.isin(np.arange(16), np.argsort(-p[0, :, e])[:4]) for e in range(4)], -1)
    hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, moe.up[...]))
    expected = jnp.einsum("btef,efd,bte->btd", hidden, moe.down[...], p * chosen[None])
    np.testing.assert_allclose(moe(x)[0], expected, atol=2e-5)


@pytest.mark.parametrize("choice", ["choice=expert", "capacity=0.5:top=2"])
def test_padding_changes_nothing(choice):
    """An expert's room is a share of the valid tokens: six of them are kept or dropped alike behind padding."""
    moe, x = build(f"moe:experts=4:{choice}"), draw(2, 24, 16)
    run = jax.jit(lambda x, valid: moe(x, valid=valid))
    padded, aux = run(x, jnp.arange(24)[None] < jnp.full((2, 1), 6))
    alone, expected = run(x[:, :6], jnp.ones((2, 6), bool))
    np.testing.assert_allclose(padded[:, :6], alone, atol=1e-6)
    assert not padded[:, 6:].any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), aux, expected)


def weighted(layer, x, weight):
    """Every expert on every token, by weights (B, T, E)."""
    hidden = ACTIVATIONS[layer.activation](jnp.einsum("btd,edf->btef", x, layer.up[...]))
    return jnp.einsum("btef,efd,bte->btd", hidden, layer.down[...], weight)


def noisy_top():
    layer = build("noisy_top:experts=5:top=2:importance=2:load=3")
    layer.router.kernel[...], layer.noise.kernel[...] = draw(16, 5, seed=5) / 4, draw(16, 5, seed=6) / 4
    return layer


@pytest.mark.full
@pytest.mark.parametrize("trained", [False, True])
def test_noisy_top_is_its_definition(trained):
    """Gates, both losses, and noise that is drawn in training alone; the last tokens are padding."""
    layer, x, key = noisy_top(), draw(2, 9, 16), jax.random.key(4) if trained else None
    valid = np.arange(9) < np.array([[9], [6]])
    y, aux = layer(x, valid=jnp.asarray(valid), key=key)
    clean = np.asarray(x @ layer.router.kernel[...], np.float64)
    spread = np.log1p(np.exp(np.asarray(x @ layer.noise.kernel[...], np.float64))) + 0.01
    drawn = np.asarray(jax.random.normal(key, clean.shape)) if key is not None else 0
    noisy = clean + spread * drawn
    gates, likely = np.zeros(clean.shape), np.zeros(5)
    for b, t in zip(*np.nonzero(valid), strict=True):
        best = np.argsort(-noisy[b, t])[:2]
        gates[b, t, best] = np.exp(noisy[b, t, best]) / np.exp(noisy[b, t, best]).sum()
        for e in range(5):
            second = np.sort(np.delete(noisy[b, t], e))[-2]
            likely[e] += (1 + math.erf((clean[b, t, e] - second) / spread[b, t, e] / 2**0.5)) / 2
    np.testing.assert_allclose(y, weighted(layer, x, gates), atol=2e-5)
    variation = lambda figures: figures.var() / figures.mean() ** 2
    np.testing.assert_allclose(aux.losses["importance"], 2 * variation(gates.sum((0, 1))), rtol=1e-4)
    assert ("load" in aux.losses) == trained
    if trained:
        np.testing.assert_allclose(aux.losses["load"], 3 * variation(likely), rtol=1e-4)


@pytest.mark.full
def test_the_load_loss_foresees_the_share_of_tokens():
    """Over draws of the noise an expert is chosen as often as `chance` says, in the mean of the same draws."""
    layer, x = noisy_top(), draw(1, 1, 16)
    clean, spread = x @ layer.router.kernel[...], jax.nn.softplus(x @ layer.noise.kernel[...]) + LEAST
    noisy = clean + spread * jax.random.normal(jax.random.key(0), (40_000, 1, 5))
    often = jax.nn.one_hot(jax.lax.top_k(noisy, 2)[1], 5).sum(-2).mean(0)
    said = chance(clean, noisy, jnp.broadcast_to(spread, noisy.shape), 2).mean(0)
    np.testing.assert_allclose(said, often, atol=0.01)
    np.testing.assert_allclose(said.sum(), 2, atol=0.02)


@pytest.mark.full
def test_gshard_is_its_definition():
    layer, x, valid = build("gshard:experts=4:balance=1"), draw(2, 30, 16), np.arange(30) < np.array([[30], [19]])
    p = np.asarray(jax.nn.softmax(x @ layer.router.kernel[...]))
    order = np.argsort(-p, -1)
    first, second = (np.take_along_axis(p, order[..., i : i + 1], -1) for i in (0, 1))
    one = lambda index: np.eye(4)[order[..., index]] * valid[..., None]
    both = one(0) * first / (first + second), one(1) * second / (first + second)
    y, aux = layer(x, valid=jnp.asarray(valid))
    np.testing.assert_allclose(y, weighted(layer, x, sum(both)), atol=2e-5)
    assert aux.scalars["second_experts"] == 1
    share, mean = (what.sum(1) / valid.sum(1)[:, None] for what in (one(0), p * valid[..., None]))
    np.testing.assert_allclose(aux.losses["balance"], 4 * (share * mean).sum(-1).mean(), rtol=1e-5)
    key = jax.random.key(1)
    y, aux = layer(x, valid=jnp.asarray(valid), key=key)
    runs = 2 * both[1].sum(-1) > np.asarray(jax.random.uniform(key, (2, 30)))
    np.testing.assert_allclose(y, weighted(layer, x, both[0] + runs[..., None] * both[1]), atol=2e-5)
    np.testing.assert_allclose(aux.scalars["second_experts"], (runs & valid).sum() / valid.sum(), rtol=1e-5)
    assert 0.2 < aux.scalars["second_experts"] < 0.9


def test_rwkv_is_its_formula():
    """Beside padding, and where another document begins."""
    layer, x = build("rwkv:ratio=2"), np.asarray(draw(2, 7, 16))
    mixes = {name: np.linspace(0.1, 0.9, 16) ** power for name, power in (("key", 1), ("receptance", 2))}
    for name, mix in mixes.items():
        learned = getattr(layer.shift, name)
        learned[...] = learned[...] + mix - layer.shift.share(name)
    valid, documents = np.ones((2, 7), bool), np.zeros((2, 7), np.int32)
    valid[0, 3], documents[1, 4:] = False, 1
    expected = np.zeros((2, 7, 16))
    for sample, at in np.ndindex(2, 7):
        alone = at == 0 or not valid[sample, at - 1] or documents[sample, at] != documents[sample, at - 1]
        before = np.zeros(16) if alone else x[sample, at - 1]
        k, r = (mix * x[sample, at] + (1 - mix) * before for mix in mixes.values())
        hidden = np.maximum(k @ layer.up.kernel[...], 0) ** 2
        expected[sample, at] = hidden @ layer.down.kernel[...] / (1 + np.exp(-r @ layer.receptance.kernel[...]))
    y, _ = layer(jnp.asarray(x), valid=jnp.asarray(valid), documents=jnp.asarray(documents))
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_layers_above_look_back_with_fewer_channels():
    """The first shares of every layer are those of the authors' code, also in a stack that is one program."""
    config = edit(Config(), task="copy", ffn="rwkv", seq_len=16, dim=16, heads=2, layers=4)
    model: Any = build_model(config, build_task(config))
    (stacked,) = model.stack.periods
    for number in range(4):
        expected = (np.arange(16) / 16) ** (1 - number / 4)
        np.testing.assert_allclose(layer_of(stacked, number).ffn.shift.share("key"), expected, atol=1e-6)


def test_a_state_counts_in_what_decoding_keeps():
    size = {"seq_len": 16, "dim": 16, "heads": 2, "layers": 2}
    model = lambda ffn: build_model(
        edit(Config(), task="copy", ffn=ffn, **size), build_task(edit(Config(), task="copy"))
    )
    kept = lambda ffn: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: model(ffn).init_cache(3, 16))))
    assert kept("rwkv") - kept("mlp") == 2 * 3 * 16


@pytest.mark.full
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_prototypes_are_routers_side_by_side(groups):
    layer, x = build(f"prototypes:experts=6:groups={groups}"), draw(2, 9, 16)
    valid = np.arange(9) < np.array([[9], [5]])
    expected, size, balance = np.zeros((2, 9, 16), np.float32), 6 // groups, 0.0
    for group in range(groups):
        own = slice(group * size, (group + 1) * size)
        alone = build(f"moe:experts={size}:balance=0.01")
        alone.router.kernel[...] = layer.router.kernel[:, own]
        alone.up[...], alone.down[...] = layer.up[own], layer.down[own]
        y, aux = alone(x, valid=jnp.asarray(valid))
        expected, balance = expected + y, balance + float(aux.losses["balance"]) / groups
    y, aux = layer(x, valid=jnp.asarray(valid))
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(aux.losses["balance"], balance, rtol=1e-5)


@pytest.mark.full
def test_router_losses_are_switch_transformers(golden):
    peer = golden("switch_router_losses")
    moe = build("moe:experts=4:balance=1:z=1", 4)
    moe.router.kernel[...] = jnp.eye(4)
    aux = moe(jnp.asarray(peer["logits"]))[1]
    np.testing.assert_allclose(aux.losses["router_z"], peer["z_loss"], rtol=1e-4)
    np.testing.assert_allclose(aux.losses["balance"], peer["aux_loss"], rtol=1e-4)


@pytest.mark.full
def test_product_key_finds_the_best_of_all_slots():
    memory, x = build("product_key:side=6:top=3:reads=2:key=8"), draw(2, 5, 16)
    q = memory.norm((memory.query(x)).reshape(10, 2, 8)).reshape(10, 2, 2, 4)
    a, b = (jnp.einsum("nrd,rkd->nrk", q[:, :, half], memory.keys[half]) for half in range(2))
    scores = (a[..., :, None] + b[..., None, :]).reshape(10, 2, 36)
    top, slot = jax.lax.top_k(scores, 3)
    expected = jnp.einsum("nrk,nrkd->nd", jax.nn.softmax(top), memory.values[slot]).reshape(2, 5, 16)
    np.testing.assert_allclose(memory(x)[0], expected, atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("padded", [False, True])
def test_hash_sends_every_occurrence_of_a_token_to_one_expert(padded):
    layer, x = build("hash:experts=3"), draw(2, 20, 16)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (2, 20)), jnp.int32)
    valid = jnp.asarray(np.random.default_rng(2).random((2, 20)) < 0.7) if padded else None
    expert = np.asarray(layer.expert(jnp.arange(50)))
    assert set(expert) == {0, 1, 2}
    expected = np.zeros((2, 20, 16), np.float32)
    for b, t in np.ndindex(2, 20):
        if valid is None or valid[b, t]:
            e = expert[tokens[b, t]]
            expected[b, t] = jax.nn.gelu(x[b, t] @ layer.up[e]) @ layer.down[e]
    y, aux = layer(x, tokens=tokens, valid=valid)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    mask = np.ones((2, 20), bool) if valid is None else np.asarray(valid)
    sent = np.bincount(expert[np.asarray(tokens)[mask]], minlength=3)
    np.testing.assert_allclose(aux.scalars["busiest_expert"], 3 * sent.max() / mask.sum(), rtol=1e-6)


def test_hash_is_another_in_every_layer_and_spreads_tokens():
    config = edit(Config(), task="copy", ffn="hash:experts=4", seq_len=16, dim=16, heads=2, layers=2)
    model: Any = build_model(config, build_task(config))
    (block,) = model.stack.periods
    first, second = (np.asarray(mixed(jnp.arange(4000, dtype=jnp.uint32) ^ salt) % 4) for salt in block.ffn.salt[...])
    assert 0.2 < (first == second).mean() < 0.3
    assert np.bincount(first).min() > 900


@pytest.mark.full
@pytest.mark.parametrize("depth", ["mixture_of_depths:every=1", "reversible", "early_exit", "macaron", "conditional"])
def test_hash_finds_its_tokens_in_every_depth(depth):
    """Step by step, where tokens come one at a time, the model says what it says of all of them."""
    size = {"seq_len": 9, "dim": 16, "heads": 2, "layers": 2}
    config = edit(Config(), task="copy", ffn="hash:experts=3", depth=depth, **size)
    model = build_model(config, build_task(config))
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 11, (2, 9)), jnp.int32)
    graph, variables = nnx.split(model)
    # Built where it runs, of copies, for layers may write to their variables.
    built: Any = lambda: nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))
    one = lambda cache, token: built().step(cache, token)[::-1]
    steps = jax.jit(lambda tokens: jax.lax.scan(one, model.init_cache(2, 9), tokens.T)[1])(tokens)
    whole = jax.jit(lambda tokens: built()(tokens)[0])(tokens)
    np.testing.assert_allclose(steps.swapaxes(0, 1), whole, atol=2e-5)


def test_hash_is_refused_where_rows_are_no_tokens():
    size = {"seq_len": 16, "dim": 16, "heads": 2, "layers": 3}
    config = edit(Config(), task="copy", ffn="hash", depth="hourglass", **size)
    with pytest.raises(UsageError, match="ffn=hash looks at the tokens"):
        check_config(config)


def test_persistent_vectors_are_attended_to():
    layer, x = build("all_attention:vectors=5"), draw(2, 4, 16)
    expected = np.zeros((2, 4, 16), np.float32)
    for head in range(2):
        q = x @ layer.query.kernel[:, 8 * head : 8 * head + 8]
        p = jax.nn.softmax(q @ layer.keys[head].T / 8**0.5)
        expected += p @ layer.values[head] @ layer.down.kernel[8 * head : 8 * head + 8]
    np.testing.assert_allclose(layer(x)[0], expected, atol=2e-5)


def test_all_attention_is_full_attention_with_more_keys():
    """Persistent vectors are keys and values like others: the same softmax where they come from tokens."""
    joined = spec.build("attention", "all_attention:vectors=3", length=8, dim=16, heads=2)
    q, k, v = (draw(2, 8, 2, 8, seed=seed) for seed in range(3))
    joined.keys[...], joined.values[...] = (jnp.swapaxes(x[0, :3], 0, 1) for x in (k, v))
    full = spec.build("attention", "full", length=8, dim=16, heads=2)
    expected = full.mix(q[:1], k[:1], v[:1])[0]
    np.testing.assert_allclose(joined.mix(q[:1], k[:1, 3:], v[:1, 3:])[0], expected, atol=2e-5)


def test_a_bilinear_layer_is_the_product_of_two():
    layer, x = spec.build("ffn", "glu:activation=identity", length=8, dim=16, heads=2), draw(2, 8, 16)
    np.testing.assert_allclose(layer(2 * x)[0], 4 * layer(x)[0], rtol=1e-4, atol=1e-5)
    expected = (x @ layer.gate.kernel[...]) * (x @ layer.up.kernel[...]) @ layer.down.kernel[...]
    np.testing.assert_allclose(layer(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_squared_relu():
    np.testing.assert_allclose(ACTIVATIONS["relu2"](jnp.array([-2.0, 0.0, 3.0])), [0, 0, 9])


@pytest.mark.parametrize("choice, message", [
    ("moe:top=9", "top=9 must be from 1 to experts=8"),
    ("moe:choice=expert:top=2", "capacity=2"),
    ("moe:capacity=0", "capacity must be above 0"),
    ("moe:choice=expert:bias=0.1", "bias=0.1 balances what tokens choose"),
    ("moe:balance=-1", "at least 0"),
    ("product_key:top=65", "top=65"),
    ("product_key:key=7", "key must be even"),
    ("noisy_top:experts=2", "top=2 must be from 1 to 1"),
    ("noisy_top:load=-1", "importance and load are weights"),
    ("gshard:experts=1", "experts must be at least 2"),
    ("gshard:balance=-1", "balance is the weight"),
    ("prototypes:groups=3", "groups=3 must divide experts=8"),
    ("hash:experts=0", "experts must be at least 1"),
    ("all_attention:vectors=0", "vectors must be at least 1"),
])  # fmt: skip
def test_bad_options(choice, message):
    with pytest.raises(Exception, match=message):
        build(choice)


@pytest.mark.parametrize("choice", ["moe:choice=expert", "moe:capacity=1"])
def test_what_looks_ahead_is_refused_in_a_decoder(choice):
    config = edit(Config(), task="copy", ffn=choice, seq_len=16, dim=16, heads=2)
    with pytest.raises(Exception, match="cannot be causal"):
        build_model(config, build_task(config))


def test_gelu_by_the_normal_distribution():
    """x Phi(x) exactly, and by a tangent nearly."""
    x = np.linspace(-4, 4, 81)
    exact = [value * (1 + math.erf(value / 2**0.5)) / 2 for value in x]
    np.testing.assert_allclose(ACTIVATIONS["gelu_exact"](jnp.asarray(x, jnp.float32)), exact, atol=1e-6)
    apart = np.abs(ACTIVATIONS["gelu"](jnp.asarray(x, jnp.float32)) - np.array(exact)).max()
    assert 1e-4 < apart < 1e-3
