"""parametrisation=mup: one learning rate for all widths."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import Config, edit, grid
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.train import optimizer, prefetch, state
from xformers_lab.train.step import make_train_step

FIXED = {"task": "copy", "seq_len": 16, "layers": 2, "batch": 8, "lr": 1e-2, "warmup": 0.0, "schedule": "constant"}
MUP = {"parametrisation": "mup", "base_dim": 32}


def of(dim: int, **more) -> Config:
    return grid([{}], {key: [value] for key, value in (FIXED | {"dim": dim, "head": 16} | more).items()})[0]


@functools.cache
def logits(dim: int, **more) -> tuple[float, ...]:
    """Mean size of the logits before training and behind each of three steps."""
    config = of(dim, **more)
    task = check_config(config)
    rule, graph = optimizer.of(config, task), state.structure(config, task)
    now, sizes = state.init(config, task, rule), []
    step = jax.jit(make_train_step(config, task, graph, rule))
    inputs = jnp.asarray(prefetch.checked(task, "train", 0, False).inputs)
    for number in range(4):
        answer, _ = state.merge(graph, now.params, now.extra, now.memory)(inputs)
        sizes.append(float(jnp.abs(answer).mean()))
        now, _ = step(now, prefetch.checked(task, "train", number, False))
    return tuple(sizes)


def growth(**more) -> float:
    """The exponent of the logits' size in the width, behind a step of training."""
    narrow, wide = (max(logits(dim, **more)[1:]) for dim in (32, 256))
    return math.log(wide / narrow) / math.log(256 / 32)


@pytest.mark.parametrize("attention", ["full", pytest.param("gated_delta_net", marks=pytest.mark.full)])
def test_what_a_step_changes_is_flat_in_width(attention):
    """The coordinate check of Yang et al., 2022, appendix D.1."""
    assert growth(attention=attention) > 0.3
    assert abs(growth(attention=attention, **MUP)) < 0.2


def test_at_the_base_it_is_the_standard_parametrisation():
    assert logits(32, attention="full", **MUP) == logits(32, attention="full")


@pytest.mark.parametrize(("choice", "rates"), [({}, {1.0, 0.25}), ({"ffn": "moe", "depth": "universal"}, {1.0, 0.25})])
def test_rates_and_first_sizes_follow_from_what_grows(choice, rates):
    config = of(128, **choice, **MUP)
    task = build_task(config)
    model = build_model(config, task)
    plain = build_model(of(128, **choice), task)
    found = optimizer.roles(model).rates
    assert set(jax.tree.leaves(found)) == rates
    assert found["head"]["kernel"] == 0.25 and found["head"]["bias"] == 1 and found["embedding"]["embedding"] == 1
    assert optimizer.roles(plain).rates is None
    first, standard = (jax.tree_util.tree_leaves_with_path(nnx.state(each, nnx.Param)) for each in (model, plain))
    smaller = {}
    for (path, mine), (_, other) in zip(first, standard, strict=True):
        if (mine != other).any():
            np.testing.assert_allclose(mine, other / 2, rtol=1e-6)
            smaller[jax.tree_util.keystr(path)] = mine
    assert len(smaller) == 1 + (choice != {}), "the head, and of a layer a router alone"
    assert any("head" in name for name in smaller)


def test_no_part_of_the_id_where_it_is_not_asked_for():
    assert "parametrisation" not in configs.identity(of(64)) and "base_dim" not in configs.identity(of(64))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base_dim=32"], "parametrisation=standard has no base"),
        (["parametrisation=mup"], "say base_dim="),
        (["parametrisation=mup", "base_dim=16", "dim=64", "heads=2"], "heads keep their size"),
        (
            ["parametrisation=mup", "base_dim=32", "optimizer=sgd"],
            "no size of their own, for which its rates are made; use adamw",
        ),
        (["parametrisation=mup", "base_dim=32", "optimizer=muon"], "optimizer=muon"),
        (["head=24"], "dim=64 is no whole number of heads of that size"),
        (["head=16", "heads=2"], "head= and heads= both say how many heads there are"),
    ],
)
def test_what_cannot_be_is_refused(words, said, capsys, tmp_path):
    assert main(["train", "task=copy", "steps=1", f"runs={tmp_path}", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_a_size_of_heads_has_their_number_follow_the_width():
    base = {"task": ["copy"], "heads": [8]}
    assert [(c.model.dim, c.model.heads) for c in grid([base], {"dim": [32, 64], "head": [16]})] == [(32, 2), (64, 4)]
    assert edit(of(64), heads=2).model.heads == 2
