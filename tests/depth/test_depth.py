"""Depths: what is shared, what is skipped, and where positions halt."""

import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab.cli import main
from xformers_lab.config import Config, decisive, edit, identity
from xformers_lab.depth import Context
from xformers_lab.depth.early_exit import expected_saving
from xformers_lab.measure.flops import count_flops
from xformers_lab.model import build_model, build_task
from xformers_lab.model._block import Block
from xformers_lab.nn.embedding import START
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.train import loop, trained


def model_of(depth: str, **changes) -> Any:
    small = {"task": "copy", "seq_len": 12, "dim": 16, "heads": 2, "layers": 4, "batch": 3}
    config = edit(Config(), depth=depth, **(small | changes))
    task = build_task(config)
    return build_model(config, task), jnp.asarray(task.batch("train", 0).inputs)


def perturbed(model, tokens) -> Any:
    """Parameters a little off their start, as training leaves them: what starts as zeros says nothing."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, structure = jax.tree.flatten_with_path(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    # Tables of vectors are multiplied up to size.
    share = lambda path: START if {"embedding", "table"} & {str(getattr(part, "key", part)) for part in path} else 1.0
    moved = lambda path, leaf, key: leaf + 0.2 * share(path) * jax.random.normal(key, leaf.shape)
    leaves = [moved(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, structure.unflatten(leaves), rest), tokens


def layer(stack, number: int, place: int = 0) -> Any:
    """The layer at a place of a stack's period."""
    graph, variables = nnx.split(stack.periods[place])
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], variables))


def run(model, *args, **options):
    """One call of a model, compiled cheaply."""
    graph, variables = nnx.split(model)
    return jax.jit(lambda variables, *args: nnx.merge(graph, variables)(*args, **options))(variables, *args)


def count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.stack, nnx.Param)))


def test_universal_has_the_parameters_of_one_layer():
    assert count(model_of("universal")[0]) == count(model_of("fixed", layers=1)[0])
    assert count(model_of("universal", attention="full+linear")[0]) == count(model_of("fixed", layers=2)[0])


@pytest.mark.full
@pytest.mark.parametrize("code, position", [*itertools.product((True, False), ("none", "sinusoidal"))])
def test_universal_is_its_layer_again_and_again(code, position):
    """With waves for positions, these are added before each step, as the code of the step is."""
    model, tokens = model_of(f"universal:code={code}", layers=3, position=position)
    block, D = model.stack.blocks[0], 16
    x = model.position.embed(model.embedding(tokens), jnp.arange(12))
    context = Context(model.position)
    waves = lambda angle: np.stack([np.sin(angle), np.cos(angle)], -1).reshape(*angle.shape[:-1], D)
    expected, scale = x, 10_000 ** (np.arange(0, D, 2) / D)
    for number in (1, 2, 3):
        if code and position == "sinusoidal" and number > 1:
            expected = (expected + waves(np.arange(12)[:, None] / scale)[None]) / 1.5**0.5
        expected = expected + 0.2 * code * waves(number / scale)
        expected = block(expected, {}, context)[0]
    np.testing.assert_allclose(model.stack(x, context)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "bias", [pytest.param(-3.0, marks=pytest.mark.full), 0.0, pytest.param(8.0, marks=pytest.mark.full)]
)
def test_halting_weights_add_up_to_one(bias):
    """States that are all ones come out as ones, whatever was halted where; the steps taken fit the probabilities."""
    model, tokens = model_of("universal:act=true", layers=5)
    depth, x = model.stack, jnp.ones((3, 12, 16))
    depth.halt.kernel[...] = 0 * depth.halt.kernel[...]
    depth.halt.bias[...] = jnp.full(1, bias)
    halting = depth._running(x)
    for number in range(5):
        _, halting = depth._halted(x, x, number, halting, x)
    np.testing.assert_allclose(halting["out"], 1, atol=1e-6)
    p = 1 / (1 + np.exp(-bias))
    taken = next((n for n in range(1, 6) if n * p >= 0.99), 5)
    np.testing.assert_allclose(halting["steps"], taken)
    np.testing.assert_allclose(halting["left"], 1 - (taken - 1) * p, atol=1e-5)
    aux = depth(model.embedding(tokens), Context(model.position))[1]
    np.testing.assert_allclose(aux.scalars["steps"], taken)
    np.testing.assert_allclose(aux.losses["ponder"], 0.01 * (taken + 1 - (taken - 1) * p), rtol=1e-4)


def test_halted_positions_keep_their_state():
    depth = model_of("universal:act=true", layers=3)[0].stack
    x, y = jnp.ones((1, 2, 16)), 2 * jnp.ones((1, 2, 16))
    halting = depth._running(x) | {"sum": jnp.array([[1.0, 0.2]])}
    state, _ = depth._halted(x, y, 1, halting, x)
    np.testing.assert_array_equal(state[0, :, 0], [1, 2])


def test_steps_of_every_position_are_told():
    """Those of the loop written out, and what they make on average."""
    changes = {"layers": 6, "attention": "full+linear", "position": "none"}
    model, tokens = perturbed(*model_of("universal:act=true", **changes))
    depth, context = model.stack, Context(model.position)
    depth.halt.kernel[...], depth.halt.bias[...] = 3 * depth.halt.kernel[...], jnp.full(1, -2.0)

    def by_hand(x):
        halting = depth._running(x)
        for number in range(3):
            y = given = depth._marked(x, number, model.position, jnp.arange(12))
            for block in depth.blocks:
                y = block(y, {}, context)[0]
            x, halting = depth._halted(x, y, number, halting, given)
        return halting

    x = model.position.embed(model.embedding(tokens), jnp.arange(12))
    aux, halting = run(model, tokens)[1], jax.jit(by_hand)(x)
    np.testing.assert_array_equal(aux.tokens["steps"], halting["steps"])
    np.testing.assert_array_equal(aux.tokens["computation"], 2 * halting["steps"])
    np.testing.assert_allclose(aux.scalars["steps"], halting["steps"].mean(), rtol=1e-6)
    assert len(np.unique(halting["steps"])) > 1


@pytest.mark.full
def test_halting_before_a_step_is_the_listing_of_the_paper():
    """Its masks, one after the other, on states that go on; the ids of runs without the option are what they were."""
    model, tokens = perturbed(*model_of("universal:act=true:halting=before", layers=4, position="sinusoidal"))
    depth, context = model.stack, Context(model.position)
    depth.halt.kernel[...], depth.halt.bias[...] = 2 * depth.halt.kernel[...], jnp.full(1, -3.0)
    state = x = model.position.embed(model.embedding(tokens), jnp.arange(12))
    probability, remainders, updates, new = (
        jnp.zeros((3, 12)),
        jnp.zeros((3, 12)),
        jnp.zeros((3, 12)),
        jnp.zeros_like(x),
    )
    again = lambda x: model.position.embed(x, jnp.arange(12))
    for number in range(4):
        state = depth._marked(state, jnp.int32(number), model.position, again)
        p = jax.nn.sigmoid((state @ depth.halt.kernel[...] + depth.halt.bias[...])[..., 0])
        runs = (probability < 1.0).astype(float)
        halts = (probability + p * runs > 0.99) * runs
        runs = (probability + p * runs <= 0.99) * runs
        probability += p * runs
        remainders += halts * (1 - probability)
        probability = jnp.where(halts > 0, 1.0, probability)
        updates += runs + halts
        weights = (p * runs + halts * remainders)[..., None]
        state = depth.blocks[0](state, {}, context)[0]
        new = state * weights + new * (1 - weights)
    out, aux = jax.jit(lambda x: depth(x, context))(x)
    np.testing.assert_allclose(out, new, atol=2e-5)
    np.testing.assert_array_equal(aux.tokens["steps"], updates)
    assert 1 < float(updates.mean()) < 4 and 0 < float((probability < 1).mean()) < 1
    np.testing.assert_allclose(aux.losses["ponder"], 0.01 * (updates + remainders).mean(), rtol=1e-5)
    plain, named = (edit(Config(), depth=f"universal:act=true{words}") for words in ("", ":halting=after"))
    assert identity(plain) == identity(named) != identity(edit(Config(), depth="universal:act=true:halting=before"))
    assert "halting" not in decisive(plain)["depth"]


@pytest.mark.full
@pytest.mark.parametrize("halting", ["after", "before"])
def test_evaluation_leaves_out_steps_that_nobody_needs(halting, monkeypatch):
    """A layer runs as often as the last position of those that are valid, and says what all steps say."""
    model, tokens = model_of(f"universal:act=true:halting={halting}", layers=6)
    model.stack.halt.kernel[...] = 0 * model.stack.halt.kernel[...]
    model.stack.halt.bias[...] = jnp.full(1, -0.5)  # 0.378 a step: three of them
    whole = run(model, tokens, key=jax.random.key(0))[0]
    ran, call = [], Block.__call__

    def counted(self, x, *rest, **options):
        jax.debug.callback(lambda: ran.append(len(x)))
        return call(self, x, *rest, **options)

    monkeypatch.setattr(Block, "__call__", counted)
    out, aux = run(model, tokens)
    jax.effects_barrier()
    assert len(ran) == 3 == aux.scalars["steps"]
    np.testing.assert_allclose(out, whole, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("depth", [
    "universal:act=true", "mixture_of_depths:capacity=0.4", "early_exit:threshold=0.2", "conditional",
])  # fmt: skip
def test_what_each_token_cost_is_told(depth):
    model, tokens = perturbed(*model_of(depth))
    valid = jnp.arange(12)[None] < jnp.array([12, 7, 1])[:, None]
    aux = run(model, tokens, valid=valid)[1]
    each = np.asarray(aux.tokens["computation"])
    np.testing.assert_array_equal(np.isnan(each), ~valid)
    np.testing.assert_allclose(np.nanmean(each), aux.scalars["computation"], rtol=1e-5)
    assert np.nanmin(each) < np.nanmax(each) <= 4


@pytest.mark.full
def test_what_each_token_cost_where_sequences_leave_whole_or_two_stacks_read():
    model, _ = perturbed(*model_of("early_exit:threshold=0.2", task="listops", layers=2))
    aux = run(model, jax.random.randint(jax.random.key(0), (8, 12), 1, 16))[1]
    each = np.asarray(aux.tokens["computation"])
    assert (each == each[:, :1]).all() and each[:, 0].mean() == aux.scalars["computation"] and np.ptp(each) > 0
    model, tokens = perturbed(*model_of("conditional", model="encoder_decoder", layers=2))
    aux = run(model, tokens)[1]
    each, source = np.asarray(aux.tokens["computation"]), model.source
    np.testing.assert_allclose(each[:, :source].mean() + each[:, source:].mean(), aux.scalars["computation"], rtol=1e-5)


@pytest.mark.full
def test_ponder_reaches_the_halting_parameters():
    model, tokens = model_of("universal:act=true", layers=3)
    graph, params = nnx.split(model)
    grads = jax.grad(lambda params: nnx.merge(graph, params)(tokens)[1].losses["ponder"])(params)
    assert float(jnp.abs(grads.stack.halt.bias[...]).sum()) > 0


@pytest.mark.full
def test_layerdrop_leaves_out_layers_in_training_alone():
    model, tokens = model_of("layerdrop:rate=0.5", layers=6)
    fixed = model_of("fixed", layers=6)[0]
    assert count(model) == count(fixed)
    assert model(tokens)[1].scalars["computation"] == 6
    kept = [float(model(tokens, key=jax.random.key(seed))[1].scalars["computation"]) for seed in range(20)]
    assert 2 < np.mean(kept) < 4 and len(set(kept)) > 2
    never = model_of("layerdrop:rate=0", layers=6)[0]
    np.testing.assert_allclose(never(tokens, key=jax.random.key(0))[0], never(tokens)[0], atol=1e-6)


@pytest.mark.parametrize("depth, message", [
    ("layerdrop:rate=1", "below 1"),
    ("universal:slack=0", "slack must be between"),
    ("mixture_of_depths:capacity=0", "above 0"),
    ("mixture_of_depths:every=5", "no layer is routed"),
    ("early_exit:patience=0", "at least 1"),
    ("conditional:budget=2", "from 0 to 1"),
    ("conditional:unit=sample", "a decoder may not see"),
])  # fmt: skip
def test_bad_options(depth, message):
    with pytest.raises(Exception, match=message):
        model_of(depth)


def test_a_period_that_does_not_divide_is_refused():
    with pytest.raises(Exception, match="not divisible by the 3 mechanisms"):
        model_of("universal", attention="full+linear+local")


# ---- mixture_of_depths -------------------------------------------------------------------------------------------


@pytest.mark.full
def test_full_capacity_is_the_formula():
    model, tokens = perturbed(*model_of("mixture_of_depths:capacity=1:every=1"))
    x, context = model.embedding(tokens), Context(model.position)
    expected = x
    for number in range(4):
        routed = layer(model.stack, number)
        block, score = routed.block, expected @ routed.router.kernel[...]
        expected = expected + score * (block(expected, {}, context)[0] - expected)
    out, aux = model.stack(x, context, key=jax.random.key(0))
    scale = float(jnp.abs(expected).max())  # some hundred: four layers of states that are not normalised
    np.testing.assert_allclose(out / scale, expected / scale, atol=1e-5)
    assert aux.scalars["computation"] == 4


@pytest.mark.full
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_routed_tokens_keep_their_positions_and_see_each_other_alone(kind):
    """Gathered, a block gives what it gives in place when the other tokens are hidden from it like padding."""
    changes = {
        "position": "rope",
        "layers": 1,
        "seq_len": 24,
        "task": "listops" if kind == "encoder" else "copy",
        "model": kind,
    }
    model, _ = perturbed(*model_of("mixture_of_depths:capacity=0.4:every=1:weight=sigmoid", **changes))
    x = jax.random.normal(jax.random.key(0), (3, 12, 16))
    valid = jnp.arange(12)[None] >= jnp.array([0, 2, 9])[:, None]
    routed = layer(model.stack, 0)
    score = np.where(valid, (x @ routed.router.kernel[...])[..., 0], -np.inf)
    chosen = np.zeros((3, 12), bool)
    for row, many in enumerate([5, 4, 2]):  # 0.4 of 12, 10 and 3, rounded up
        chosen[row, np.argsort(-score[row])[:many]] = True
    whole = routed.block(x, {}, Context(model.position, jnp.asarray(chosen)))[0]
    expected = np.where(chosen[..., None], x + jax.nn.sigmoid(score)[..., None] * (whole - x), x)
    out, _, aux = routed(x, {}, Context(model.position, valid), key=jax.random.key(1))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(aux.scalars["computation"], 11 / 25, rtol=1e-6)


def test_work_falls_with_capacity():
    def flops(capacity: float) -> int:
        model, tokens = model_of(f"mixture_of_depths:every=1:capacity={capacity}", seq_len=64)
        context, key = Context(model.position), jax.random.key(0)
        graph, variables = nnx.split(model.stack)
        return count_flops(lambda v, x: nnx.merge(graph, v)(x, context, key=key)[0], variables, model.embedding(tokens))

    whole = flops(1)
    assert flops(0.5) < 0.52 * whole and flops(0.125) < 0.16 * whole


@pytest.mark.full
def test_evaluation_looks_at_no_later_token_and_training_does():
    model, tokens = perturbed(*model_of("mixture_of_depths:capacity=0.5:every=1", position="rope"))
    other = tokens.at[:, -1].set((tokens[:, -1] + 1) % 11)
    np.testing.assert_allclose(run(model, other)[0][:, :-1], run(model, tokens)[0][:, :-1], atol=1e-5)
    key = jax.random.key(0)
    differs = run(model, other, key=key)[0][:, :-1] - run(model, tokens, key=key)[0][:, :-1]
    assert float(jnp.abs(differs).max()) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("bias, layers", [(100.0, 4), (-100.0, 2)])
def test_the_predictor_decides_in_evaluation(bias, layers):
    """All tokens, more than the usual room, or none."""
    model, tokens = perturbed(*model_of("mixture_of_depths:capacity=0.25", position="none"))
    routed = model.stack.periods[1]
    routed.guess_out.bias[...] = jnp.full((2, 1), bias)
    out, aux = run(model, tokens)
    assert aux.scalars["computation"] == layers
    x, context = model.embedding(tokens), Context(model.position)
    for number in range(2):
        x = layer(model.stack, number)(x, {}, context)[0]
        one = layer(model.stack, number, place=1)
        update = (x @ one.router.kernel[...]) * (one.block(x, {}, context)[0] - x)
        x = x + update if bias > 0 else x
    np.testing.assert_allclose(out, model.predict(x), rtol=1e-3, atol=1e-3)


def test_gradients_reach_router_and_predictor():
    model, tokens = perturbed(*model_of("mixture_of_depths:capacity=0.5"))
    graph, params = nnx.split(model)
    both = lambda params: nnx.merge(graph, params)(tokens, key=jax.random.key(0))
    grads = jax.jit(jax.grad(lambda params: (both(params)[0] ** 2).sum()))(params)
    routed = grads.stack.periods[1]
    assert all(float(jnp.abs(leaf).min(0).max()) > 0 for leaf in jax.tree.leaves(routed.router))
    assert not any(leaf.any() for leaf in jax.tree.leaves((routed.guess, routed.guess_out)))
    grads = jax.jit(jax.grad(lambda params: both(params)[1].losses["predictor"]))(params)
    reached = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if leaf.any()}
    assert reached and all("guess" in name for name in reached)


@pytest.mark.parametrize("changes, message", [
    ({"position": "alibi"}, "position=alibi adds scores by the place"), ({"attention": "realformer"}, "other tokens"),
])  # fmt: skip
def test_mixture_of_depths_refuses(changes, message):
    model, tokens = None, None
    with pytest.raises(Exception, match=message):
        model, tokens = model_of("mixture_of_depths", **changes)
        model(tokens)


# ---- early_exit --------------------------------------------------------------------------------------------------


def exits_of(depth: str, **changes) -> Any:
    """A classifier with exits and padded inputs: model, tokens, valid."""
    config = edit(Config(), task="listops", depth=depth, seq_len=24, dim=16, heads=2, layers=4, batch=16)
    config = edit(config, **changes)
    task = build_task(config)
    batch = task.batch("train", 0)
    model, tokens = perturbed(build_model(config, task), jnp.asarray(batch.inputs))
    return model, tokens, jnp.asarray(batch.valid)


@pytest.mark.full
@pytest.mark.parametrize("rule, first, last", [
    ("exit=confidence", 0, 1), ("exit=entropy", 1e6, 0), ("exit=patience:patience=9", None, 0),
])  # fmt: skip
def test_extremes_are_the_first_exit_and_the_whole_depth(rule, first, last):
    model, tokens, valid = exits_of(f"early_exit:{rule}")
    whole, aux = run(model, tokens, valid=valid, key=jax.random.key(0))
    for threshold, expected, layers in ((first, aux.predictions["exit1"][1], 1), (last, whole, 4)):
        if threshold is None:
            continue
        model.stack.threshold = threshold
        out, exit_aux = run(model, tokens, valid=valid)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        assert exit_aux.scalars["computation"] == layers and exit_aux.scalars[f"exit/{layers}"] == 1


@pytest.mark.full
@pytest.mark.parametrize("rule", ["confidence:threshold=0.35", "entropy:threshold=1.8", "patience:patience=1"])
@pytest.mark.parametrize("attention", ["full", "linear+full"])
def test_every_sample_leaves_where_a_loop_says(rule, attention):
    """Against each exit's logits, read one sample after the other; the shrinking batch changes no answer."""
    model, tokens, valid = exits_of(f"early_exit:exit={rule}", attention=attention, layers=6)
    whole, aux = run(model, tokens, valid=valid, key=jax.random.key(0))
    between = {int(name.removeprefix("exit")): logits for name, (_, logits) in aux.predictions.items()}
    heads = {**between, 6: whole}
    assert sorted(heads) == ([2, 4, 6] if "+" in attention else [1, 2, 3, 4, 5, 6])
    expected, left = [], []
    for row in range(16):
        answer, same = None, 0
        for number in sorted(heads):
            p = np.asarray(jax.nn.softmax(heads[number][row]), float)
            same = same + 1 if p.argmax() == answer else 0
            answer = p.argmax()
            sure = {"confidence": p.max() > 0.35, "entropy": -(p * np.log(p)).sum() < 1.8, "patience": same >= 1}
            if sure[rule.partition(":")[0]] or number == 6:
                expected.append(heads[number][row])
                left.append(number)
                break
    out, exit_aux = run(model, tokens, valid=valid)
    np.testing.assert_allclose(out, np.stack(expected), rtol=1e-3, atol=1e-3)
    assert len(set(left)) > 1
    np.testing.assert_allclose(exit_aux.scalars["computation"], np.mean(left), rtol=1e-6)
    np.testing.assert_allclose(
        expected_saving([left.count(number) for number in range(1, 7)]),
        1 - exit_aux.scalars["computation"] / 6,
        rtol=1e-5,
    )


def test_patience_counts_heads_that_agree_with_the_one_below():
    depth = exits_of("early_exit:exit=patience:patience=2")[0].stack
    labels = np.random.default_rng(0).integers(0, 2, (8, 50))
    vote = {"label": -jnp.ones(50, jnp.int32), "count": jnp.zeros(50, jnp.int32)}
    for number in range(8):
        sure, vote = depth.leaves(jax.nn.one_hot(labels[number], 2), vote)
        expected = [number >= 2 and len(set(labels[number - 2 : number + 1, row])) == 1 for row in range(50)]
        np.testing.assert_array_equal(sure, expected)


def test_expected_saving_is_the_formula():
    assert expected_saving([0, 0, 7]) == 0
    assert expected_saving([3, 0, 0, 0]) == 0.75
    assert expected_saving([2, 1, 1]) == pytest.approx(1 - (2 * 1 + 1 * 2 + 1 * 3) / (3 * 4))
    with pytest.raises(ValueError, match="all 0"):
        expected_saving([0, 0])


def test_layers_above_the_last_exit_do_not_run(monkeypatch):
    ran = []
    call = Block.__call__

    def counted(self, x, *rest, **options):
        jax.debug.callback(lambda: ran.append(len(x)))
        return call(self, x, *rest, **options)

    monkeypatch.setattr(Block, "__call__", counted)
    model, tokens, valid = exits_of("early_exit:exit=confidence:threshold=0.5", layers=6)
    aux = run(model, tokens, valid=valid)[1]
    jax.effects_barrier()
    inside, expected = 16, []
    for number in range(1, 7):
        if inside:
            expected.append(next(size for size in (2, 4, 8, 12, 16) if size >= inside))
        inside -= round(16 * float(aux.scalars[f"exit/{number}"]))
    assert ran == expected and sum(ran) < 6 * 16


@pytest.mark.full
@pytest.mark.parametrize("stages", ["two", "joint"])
def test_two_stages_leave_the_backbone_alone(stages):
    """With two stages the backbone's gradient is that of a model without exits, to the bit; the exits' is not 0."""
    model, tokens, valid = exits_of(f"early_exit:stages={stages}")
    graph, params = nnx.split(model)
    targets = jnp.arange(16) % 10

    def loss(params, exits: bool):
        logits, aux = nnx.merge(graph, params)(tokens, valid=valid, key=jax.random.key(0))
        of = lambda logits: -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1).mean()
        more = [weight * of(logits) for weight, logits in aux.predictions.values() if exits]
        return of(logits) + sum(more)

    with_exits, without = (
        nnx.to_pure_dict(jax.jit(jax.grad(lambda p, exits=exits: loss(p, exits)))(params)) for exits in (True, False)
    )
    heads = with_exits["stack"].pop("exits")["kernel"]
    assert float(jnp.abs(heads).max((1, 2)).min()) > 0 and not without["stack"].pop("exits")["kernel"].any()
    close = [
        np.allclose(a, b, rtol=1e-5, atol=1e-7)
        for a, b in zip(jax.tree.leaves(with_exits), jax.tree.leaves(without), strict=True)
    ]
    assert all(close) == (stages == "two")


@pytest.mark.full
def test_exits_train_and_are_told(tmp_path, capsys):
    """Losses of exits reach the log, and the layers a token got reach the record that reports read."""
    config = edit(Config(), task="copy", depth="early_exit:threshold=0.2", seq_len=8, dim=8, heads=1, layers=3)
    record = loop.run(edit(config, batch=4, steps=2, eval_batches=1, runs=str(tmp_path)))
    line = json.loads((pathlib.Path(record["run_dir"]) / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss/exit1"] > 0 and line["loss/exit2"] > line["loss/exit1"] > 0
    assert line["total"] == pytest.approx(line["loss"] + line["loss/exit1"] + line["loss/exit2"])
    assert line["computation"] == 3
    assert 1 <= record["computation"] < 3 and record["aux"]["exit/1"] > 0
    again = trained.evaluate(record["run_dir"], batches=1)
    assert again["computation"] == record["computation"]
    along = again["by_position"]["computation"]
    np.testing.assert_allclose(np.mean(along), again["computation"], rtol=1e-5)
    assert len(along) == 8 and main(["eval", record["run_dir"], "--batches", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = lines[lines.index(["positions", "computation"]) + 1 :]
    assert printed == [[str(at), f"{value:.4g}"] for at, value in enumerate(along)]


# ---- conditional -------------------------------------------------------------------------------------------------


def gates_of(model) -> list:
    block = model.stack.periods[0]
    return [sub.gate for sub in (block.attention, block.ffn)]


@pytest.mark.full
def test_open_gates_are_the_fixed_depth_and_closed_ones_nothing():
    model, tokens = model_of("conditional", position="none")
    x, context = model.embedding(tokens), Context(model.position)
    expected = x
    for number in range(4):
        block = layer(model.stack, number)
        block.attention, block.ffn = block.attention.layer, block.ffn.layer
        expected = block(expected, {}, context)[0]
    for bias, states, layers in ((50.0, expected, 4), (-50.0, x, 0)):
        for gate in gates_of(model):
            gate.out.bias[...] = jnp.full((4, 1), bias)
        out, aux = model.stack(x, context)
        np.testing.assert_allclose(out, states, atol=1e-5)
        assert aux.scalars["computation"] == layers


@pytest.mark.full
@pytest.mark.parametrize("unit", ["token", "sample"])
def test_gates_scale_the_sub_layers_of_each_token(unit):
    """A layer whose tokens are skipped, gathered and put back, against one that multiplies by 0 and 1; padded."""
    model, _ = perturbed(*model_of(f"conditional:unit={unit}", task="listops", seq_len=24, layers=1))
    for gate in gates_of(model):
        gate.out.bias[...] = jnp.zeros((1, 1))
    x = jax.random.normal(jax.random.key(0), (6, 24, 16))
    valid = jnp.arange(24)[None] >= jnp.array([0, 3, 20, 0, 7, 1])[:, None]
    context, block = Context(model.position, valid), layer(model.stack, 0)
    out, _, aux = block(x, {}, context)
    expected, opened = x, []
    for sub, norm in ((block.attention, block.attention_norm), (block.ffn, block.ffn_norm)):
        y = norm.before(expected, LayerContext())
        mean = (y * valid[..., None]).sum(1, keepdims=True) / valid.sum(1)[:, None, None]
        gate = np.broadcast_to(sub.gate.logit_of(y if unit == "token" else mean) > 0, (6, 24)) & valid
        opened.append(gate.sum() / valid.sum())
        options = {"position": model.position} if sub is block.attention else {}
        expected = expected + sub.layer(y, valid=valid, **options)[0] * gate[..., None]
    assert 0 < sum(opened) < 2
    np.testing.assert_allclose(jnp.where(valid[..., None], out - expected, 0), 0, atol=1e-5)
    np.testing.assert_allclose(aux.scalars["computation"], sum(opened) / 2, rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("estimator", ["noise", "straight_through"])
@pytest.mark.parametrize("budget", [0.2, 0.8])
def test_the_budget_pulls_the_gates(estimator, budget):
    """Plain gradient descent on the budget's loss alone brings the hard gates of evaluation near it."""
    model = model_of(f"conditional:budget={budget}:estimator={estimator}", layers=2)[0]
    graph, params, rest = nnx.split(model.stack, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (8, 12, 16))
    context = Context(model.position)

    def loss(params, key):
        return nnx.merge(graph, params, rest)(x, context, key=key)[1].losses["budget"]

    def descend(params, key):
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params, key)), None

    start = loss(params, jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 150)
    params = jax.jit(lambda params: jax.lax.scan(descend, params, keys)[0])(params)
    assert loss(params, jax.random.key(1)) < 0.15 * start + 0.05
    rate = nnx.merge(graph, params, rest)(x, context)[1].scalars["computation"] / 2
    assert rate < 0.5 if budget < 0.5 else rate > 0.5


def test_straight_through_is_hard_with_a_soft_gradient():
    gate = gates_of(model_of("conditional:estimator=straight_through:noise=0", layers=1)[0])[0]
    graph, variables = nnx.split(gate)
    gate = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], variables))
    x = 3 * jax.random.normal(jax.random.key(0), (4, 9, 16))
    gate.out.bias[...] = jnp.zeros(1)
    hard, logit = gate.training(x, None, jax.random.key(0)), gate.logit(x)
    np.testing.assert_allclose(hard, logit > 0, atol=1e-6)
    assert 0 < float(hard.mean()) < 1
    graph, params = nnx.split(gate)
    slope = jax.grad(lambda p: nnx.merge(graph, p).training(x, None, jax.random.key(0)).sum())(params)
    soft = jax.nn.sigmoid(logit)
    np.testing.assert_allclose(slope.out.bias[...], [(soft * (1 - soft)).sum()], rtol=1e-5)
