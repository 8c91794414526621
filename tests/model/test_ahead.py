"""Heads that predict further tokens: what they are of, what is asked of them, and what they leave as it is."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab.cli import main
from xformers_lab.config import Config, edit, identity
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.nn.later import later
from xformers_lab.tasks import Batch
from xformers_lab.train import loop, optimizer, sizes
from xformers_lab.train.state import init, split, structure
from xformers_lab.train.step import loss_ahead, make_objective, make_train_step

SMALL = {"task": "copy", "seq_len": 12, "dim": 16, "heads": 2, "layers": 2, "batch": 3}


def config_of(**changes) -> Config:
    return edit(Config(), **(SMALL | changes))


def built(**changes) -> tuple[Any, Any]:
    config = config_of(**changes)
    task = build_task(config)
    return build_model(config, task), task


def cross_entropy(logits, targets, weights):
    return -(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] * weights).sum()


def head(model, number: int) -> Any:
    graph, variables = nnx.split(model.further.layers)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], variables))


def trunk(model, inputs):
    """The states of which the next token is predicted, and the context of all layers."""
    kept = []
    stack = type(model.stack)
    with pytest.MonkeyPatch.context() as patch:
        called = stack.__call__

        def noting(self, x, context, *, key=None):
            x, aux = called(self, x, context, key=key)
            kept.append((x, context))
            return x, aux

        patch.setattr(stack, "__call__", noting)
        logits, _ = model(inputs)
    return *kept[0], logits


@pytest.mark.full
@pytest.mark.parametrize("by", ["parallel", "sequential"])
def test_heads_are_their_definition(by):
    """Each is one layer on what it should be on, and its loss is of the target so many places on."""
    model, task = built(predict=4, predict_by=by, predict_weight=0.5, norm="pre:normaliser=rmsnorm")
    batch = jax.tree.map(jnp.asarray, task.batch("train", 0))
    z, context, logits = trunk(model, batch.inputs)
    embedded, state, losses = model.embedding(batch.inputs), z, []
    norm = lambda x, scale: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    for number in range(3):
        layer, places = head(model, number), number + 1
        below = z
        if by == "sequential":
            ahead = np.zeros_like(embedded)
            ahead[:, : 12 - places] = embedded[:, places:]
            scales = layer.state_norm.scale[...], layer.token_norm.scale[...]
            both = [norm(x, scale) for x, scale in zip((state, ahead), scales, strict=True)]
            below = jnp.concatenate(both, -1) @ layer.join.kernel[...]
        state = layer.block(below, {}, context)[0]
        further = model.predict(state)[:, : 12 - places]
        losses.append(cross_entropy(further, batch.targets[:, places:], batch.weights[:, places:]))
    again, aux = model(batch.inputs, key=jax.random.key(0))
    np.testing.assert_allclose(again, logits, atol=1e-5)
    ((weight, states),) = aux.ahead.values()
    assert weight == 0.5
    np.testing.assert_allclose(states[-1], state, atol=1e-4)
    np.testing.assert_allclose(loss_ahead(task, model, states, batch), losses, rtol=1e-4)
    graph, *variables = split(model)
    _, (_, sums) = make_objective(task, graph)(variables[0], {}, *variables[1:], batch, jax.random.key(0))
    named = [sums[f"loss/ahead{place}"] for place in (2, 3, 4)]
    np.testing.assert_allclose(named, 0.5 * jnp.stack(losses), rtol=1e-4)
    np.testing.assert_allclose(sums["total"], sums["loss"] + sum(named), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], cross_entropy(logits, batch.targets, batch.weights), rtol=1e-5)


def test_nothing_is_asked_behind_the_end_or_of_another_document():
    model, task = built(predict=3)
    documents = jnp.asarray([[0] * 5 + [1] * 7, [0] * 12, [0] * 11 + [1]])
    ones = jnp.ones((3, 12))
    batch = Batch(jnp.zeros((3, 12), int), jnp.zeros((3, 12), int), ones, documents=documents)
    flat = lambda states: jnp.zeros((*states.shape[:-1], 11))  # every answer is as likely
    model.predict = flat
    losses = loss_ahead(task, model, jnp.zeros((2, 3, 12, 16)), batch)
    np.testing.assert_allclose(losses, np.log(11) * np.array([4 + 6 + 11 + 10, 3 + 5 + 10 + 9]), rtol=1e-5)


def test_later_is_a_shift_towards_the_beginning():
    x = np.arange(12).reshape(1, 4, 3)
    np.testing.assert_array_equal(later(jnp.asarray(x), 3), [[x[0, 3], [0] * 3, [0] * 3, [0] * 3]])


@pytest.mark.full
@pytest.mark.parametrize("by", ["parallel", "sequential"])
def test_no_head_is_told_what_it_is_to_say(by):
    """What head k says at t depends on tokens up to t, with predict_by=sequential up to t + k, and on no later one."""
    model, _ = built(predict=3, predict_by=by, dropout=0.0)
    tokens = np.random.default_rng(0).integers(0, 11, (1, 12))
    run = jax.jit(lambda tokens: model(tokens, key=jax.random.key(0))[1].ahead["ahead"][1])
    before = run(tokens)
    for at in range(12):
        other = tokens.copy()
        other[:, at] = (other[:, at] + 1) % 11
        for number, moved in enumerate(np.abs(run(other) - before).max((1, 3)) > 0):
            reach = number + 1 if by == "sequential" else 0
            assert not moved[: max(at - reach, 0)].any() and moved[max(at - reach, 0)], (at, number)


@pytest.mark.full
def test_the_first_head_is_the_model_without_others():
    """Its parameters, what it says in evaluation and how it decodes, and the ids of runs."""
    (alone, _), (several, task) = built(), built(predict=4)
    old, new = (nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (alone, several))
    assert new.pop("further") and jax.tree.structure(new) == jax.tree.structure(old)
    jax.tree.map(np.testing.assert_array_equal, new, old)
    inputs = task.batch("validation", 0).inputs
    np.testing.assert_array_equal(several(inputs)[0], alone(inputs)[0])
    assert not several(inputs)[1].ahead
    caches = [jax.tree.structure(model.init_cache(2, 12)) for model in (alone, several)]
    assert caches[0] == caches[1]
    assert identity(config_of()) == identity(config_of(predict=1)) != identity(config_of(predict=2))


@pytest.mark.full
def test_logits_of_one_head_at_a_time_are_in_memory():
    """More heads need the memory of their layers, and none for their logits."""

    def temporary(predict: int, vocabulary: int) -> int:
        config = config_of(task=f"copy:symbols={vocabulary}", seq_len=64, batch=8, layers=1, predict=predict)
        task = build_task(config)
        tx = optimizer.of(config, task)
        graph, state = structure(config, task), jax.eval_shape(lambda: init(config, task, tx))
        step = jax.jit(make_train_step(config, task, graph, tx))
        memory = step.lower(state, task.batch("train", 0)).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logits = 4 * 8 * 64 * 4000
    grows = [temporary(6, size) - temporary(2, size) for size in (10, 4000)]
    assert grows[1] - grows[0] < 1.5 * logits, (grows, logits)


@pytest.mark.full
@pytest.mark.parametrize("changes", [
    {"predict_by": "sequential", "accumulate": 3, "dropout": 0.1, "remat": "full"},
    {"ffn": "moe:bias=0.01", "norm": "pre:normaliser=powernorm", "attention": "full+linear"},
    {"depth": "early_exit", "label_smoothing": 0.1, "predict_by": "sequential", "model": "decoder:tied=true"},
    {"norm": "hyper_connections", "depth": "fixed"},
    {"depth": "recurrent_memory", "task": "lm:path=FOLDER/text.txt"},
], ids=str)  # fmt: skip
def test_heads_train_with_whatever_else_there_is(changes, tmp_path):
    """Every parameter is moved, and what a step says is finite."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    changes = {key: str(value).replace("FOLDER", str(tmp_path)) for key, value in changes.items()}
    config = config_of(predict=3, **changes)
    task = check_config(config)
    tx = optimizer.of(config, task)
    state = init(config, task, tx)
    step = jax.jit(make_train_step(config, task, structure(config, task), tx))
    after = state
    for number in range(3):
        batch = (task.segment if jax.tree.leaves(state.memory) else task.batch)("train", number)
        after, metrics = step(after, jax.tree.map(jnp.asarray, batch))
        assert bool(metrics["ok"]) and {"loss/ahead2", "loss/ahead3", "total"} <= metrics.keys()
    still = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(after.params), strict=True
        )
        if np.array_equal(old, new)
    ]
    assert not [name for name in still if "further" in name], still


@pytest.mark.full
def test_a_run_reports_the_first_head_and_logs_the_others(tmp_path, capsys):
    config = config_of(predict=3, steps=2, eval_batches=1, runs=str(tmp_path))
    record = loop.run(config)
    line = json.loads((pathlib.Path(record["run_dir"]) / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss/ahead2", "loss/ahead3"} <= line.keys()
    np.testing.assert_allclose(line["total"], line["loss"] + line["loss/ahead2"] + line["loss/ahead3"], rtol=1e-5)
    assert main(["generate", record["run_dir"], "--prompt", "0 1 2 0", "--new", "2"]) == 0
    assert len(capsys.readouterr().out.split()) == 6


@pytest.mark.full
def test_sizes_count_the_layers_of_further_heads():
    """Their parameters and FLOPs, in training alone; each head has one layer, and logits that are made twice."""
    alone, several = (sizes.of(config_of(predict=predict, layers=1)) for predict in (1, 3))
    parts = [size["parameters"]["parts"] for size in (alone, several)]
    assert parts[1]["attention"] == 3 * parts[0]["attention"] and parts[1]["ffn"] == 3 * parts[0]["ffn"]
    flops = [size["flops_per_token"] for size in (alone, several)]
    assert flops[0]["forward"] == flops[1]["forward"]
    training = [size["training"]["parts"] for size in flops]
    for part in ("attention", "ffn"):
        np.testing.assert_allclose(training[1][part], 3 * training[0][part], rtol=1e-6)
    np.testing.assert_allclose(training[1]["rest"], training[0]["rest"] * (1 + 2 * 4 / 3), rtol=1e-6)


REFUSED = [
    ({"task": "parity"}, "predict=4: here the answer of a later position is no token further ahead"),
    ({"task": "needle"}, "no token further ahead"),
    ({"model": "encoder_decoder"}, "predict=4 is for one text"),
    ({"model": "lstm"}, "lstm has no predict: leave out predict=4"),
    ({"norm": "residual_dual", "predict_by": "sequential"}, "has 2 residual streams"),
    ({"predict": 1, "predict_by": "sequential"}, "with predict=1 there is no further head"),
    ({"predict": 1, "predict_weight": 0.5}, "predict_weight=0.5: with predict=1"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_has_no_further_token_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        check_config(config_of(**({"predict": 4} | changes)))


@pytest.mark.full
def test_a_memory_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = config_of(task=f"lm:path={tmp_path}/text.txt", memory="xl:length=8", position="rope", predict=2)
    with pytest.raises(UsageError, match="predict=2: memory=xl"):
        check_config(config)
