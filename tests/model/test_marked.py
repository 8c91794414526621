"""Positions that a task marks, in whole models: they reach the mechanism, or the config is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab.config import Config, edit, identity
from xformers_lab.errors import Refused, UsageError
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.nn.plan import Plan
from xformers_lab.tasks import Task
from xformers_lab.train import prefetch
from xformers_lab.train.step import run

MARKED = "longformer:window=2:where=marked"
SIZES = {"task": "needle", "seq_len": 24, "dim": 16, "heads": 2, "layers": 2, "batch": 2, "attention": MARKED}


def built(**words):
    config = edit(Config(), **(SIZES | words))
    task = build_task(config)
    return build_model(config, task, Plan()), task.batch("train", 0)


@pytest.mark.parametrize("words", [
    {"model": "decoder"},
    {"model": "encoder", "depth": "universal", "position": "sinusoidal"},
    pytest.param({"model": "decoder", "depth": "reversible"}, marks=pytest.mark.full),
    pytest.param({"model": "decoder", "depth": "macaron"}, marks=pytest.mark.full),
    pytest.param({"model": "decoder", "position": "deberta"}, marks=pytest.mark.full),
    pytest.param({"model": "decoder", "remat": "full", "layers": 3}, marks=pytest.mark.full),
], ids=lambda words: " ".join(f"{key}={value}" for key, value in words.items()))  # fmt: skip
def test_marks_reach_every_layer(words):
    """The marked question sees the whole row in the first layer; marks elsewhere change what it sees."""
    model, batch = built(**words)
    of = jax.jit(lambda batch: run(model, batch)[0])
    before = np.asarray(of(batch))
    other = dataclasses.replace(batch, inputs=np.where(np.arange(24) == 3, 1, batch.inputs).astype(np.int32))
    elsewhere = dataclasses.replace(batch, marked=np.roll(batch.marked, -12, 1))
    # Twenty positions back: two layers of a window of 2 reach four.
    assert np.abs(np.asarray(of(other)) - before)[:, -1].max() > 1e-4
    assert np.abs(np.asarray(of(elsewhere)) - before)[:, -1].max() > 1e-4
    if words["model"] == "decoder":
        np.testing.assert_allclose(np.asarray(of(elsewhere))[:, :11], before[:, :11], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words, says", [
    ({"task": "copy"}, "no positions are marked here; use where=first, or a task that marks"),
    ({"task": "mqar", "seq_len": 64, "model": "encoder_decoder"}, "no positions are marked here"),
    ({"model": "lstm", "attention": "full"}, None),
    ({"attention": "longformer:where=marked:tokens=0"}, "tokens=0 leaves no room"),
    ({"depth": "hourglass", "layers": 3}, "use depth=fixed"),
    ({"depth": "feedback"}, "use depth=fixed"),
])  # fmt: skip
def test_where_nobody_knows_the_marks_it_is_refused_before_anything_compiles(words, says):
    config = edit(Config(), **(SIZES | words))
    if says is None:  # a model without attention leaves marks alone
        check_config(config)
        return
    with pytest.raises(UsageError, match=says) as error:
        check_config(config)
    assert "\n" not in str(error.value)


def test_a_model_without_marks_and_decoding_are_refused():
    model, batch = built(model="decoder")
    with pytest.raises(Refused, match="give the model `marked`"):
        model(jnp.asarray(batch.inputs))
    with pytest.raises(Refused, match="longformer cannot decode: a batch says which tokens are marked"):
        model.init_cache(2, 24)


class Many(Task):
    """A task that marks three positions."""

    vocab, outputs, chance, marks = 5, 5, 0.2, 3


def test_room_for_all_that_a_task_marks():
    config = edit(Config(), **(SIZES | {"model": "decoder"}))
    task = Many(build_task(config).setting)
    with pytest.raises(UsageError, match="the task marks up to 3 positions of a row; use tokens=3"):
        build_model(config, task)
    build_model(edit(config, attention=f"{MARKED}:tokens=3"), task)


def test_a_batch_keeps_to_what_its_task_says():
    task = build_task(edit(Config(), **SIZES))
    batch = prefetch.checked(task, "train", 0)
    assert batch.marked is not None and (np.flatnonzero(batch.marked[0]) == [23]).all()
    with pytest.raises(UsageError, match="marks=1, but a row of it has 24 marked positions"):
        prefetch.check(task, dataclasses.replace(batch, marked=np.ones_like(batch.marked)), "it")
    with pytest.raises(UsageError, match="marks=1, but it has marked=False"):
        prefetch.check(task, dataclasses.replace(batch, marked=None), "it")


def test_runs_from_before_keep_their_ids():
    base = edit(Config(), **(SIZES | {"attention": "longformer"}))
    assert identity(base) == identity(edit(base, attention="longformer:where=first"))
    assert identity(base) != identity(edit(base, attention="longformer:where=marked"))
