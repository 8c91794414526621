"""Estimates of a Hessian's diagonal, and the optimizer that asks for them."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xformers_lab import optimizer as shelf
from xformers_lab.check.kits import optimizer as properties
from xformers_lab.compare.figures import flops_per_token
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_task, check_config
from xformers_lab.nn import backward
from xformers_lab.tasks import Batch, Setting, Task
from xformers_lab.train import loop, optimizer
from xformers_lab.train.curvature import Estimator
from xformers_lab.train.state import init, merge, structure
from xformers_lab.train.step import make_objective, make_train_step, stream

SMALL = {"task": "copy", "seq_len": 8, "dim": 8, "heads": 2, "layers": 1, "batch": 4, "warmup": 0.0, "clip": 0.0}


@pytest.mark.full
@pytest.mark.parametrize("options, estimate, share", [
    ("", "gauss_newton", 0.05), (":estimate=hutchinson", "hutchinson", 0.01),
    (":estimate=hutchinson:gamma=0.3:every=1", "hutchinson", 0.3),
])  # fmt: skip
def test_sophia_is_its_formula(options, estimate, share):
    """Algorithm 3 of the paper: the estimate of a step counts in it, and others take over the last one."""
    every = 1 if "every=1" in options else 2
    subject = properties.subject(
        f"sophia{options or ':every=2'}{'' if 'every' in options or not options else ':every=2'}"
    )
    rng = np.random.default_rng(1)
    rule, params, asked = subject.rule(), subject.params, []
    state, mean, curvature = rule.init(params), 0.0, 0.0
    leaf = lambda tree: np.asarray(tree["stack"]["kernel"], np.float64)
    expected = leaf(params)
    for step in range(4):
        gradient = subject.gradients[step % 3]
        diagonal = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) + 2, jnp.float32), params)

        def told(what, diagonal=diagonal):
            asked.append(what)
            return diagonal

        updates, state = properties.updated(rule, gradient, state, params, told)
        params = optax.apply_updates(params, updates)
        mean = 0.96 * mean + 0.04 * leaf(gradient)
        if step % every == 0:
            curvature = 0.99 * curvature + 0.01 * leaf(diagonal)
        moved = np.clip(mean / np.maximum(share * curvature, 1e-12), -1, 1)
        expected = expected - properties.RATE * (moved + properties.DECAY * expected)
        np.testing.assert_allclose(leaf(params), expected, rtol=1e-5)
    assert set(asked) == {estimate}


class Softmax(Task):
    """Three classes of two numbers."""

    def batch(self, split, step):
        raise NotImplementedError


def regression() -> tuple[Any, Any, Any]:
    """Softmax regression on nine samples, two of which do not count: its estimator by key, and its mean loss."""
    rng = np.random.default_rng(0)
    x, targets = jnp.asarray(rng.normal(size=(9, 2))), jnp.asarray(rng.integers(0, 3, 9))
    weights = jnp.asarray([1.0] * 7 + [0.0] * 2)
    batch, task = Batch(x, targets, weights), Softmax(Setting(1, 9))
    answer = lambda params, extra, memory, batch, key: batch.inputs @ params["kernel"]
    loss = lambda params, extra, memory, batch, key: task.loss(answer(params, extra, memory, batch, key), batch)[0]
    params = {"kernel": jnp.asarray(rng.normal(size=(2, 3)))}

    def over_batch(of_part):
        """In two parts, one after the other."""
        parts = [jax.tree.map(lambda leaf, part=part: leaf[part], batch) for part in (slice(4), slice(4, 9))]
        sums = [of_part(None, None, part, jax.random.fold_in(key_now[0], at)) for at, part in enumerate(parts)]
        return jax.tree.map(jnp.add, *sums)

    key_now = [jax.random.key(0)]

    def estimated(key, what):
        key_now[0] = key
        return Estimator(task, loss, answer, over_batch, params, jnp.asarray(7.0), key)(what)["kernel"]

    mean = lambda kernel: loss({"kernel": kernel}, None, None, batch, None) / 7
    return estimated, mean, params["kernel"]


@pytest.mark.full
@pytest.mark.parametrize("estimate", ["hutchinson", "gauss_newton"])
def test_estimates_are_unbiased(estimate):
    """Of softmax regression, whose Gauss-Newton matrix is its Hessian: the mean over many draws is the diagonal."""
    estimated, mean, kernel = regression()
    whole = jax.hessian(mean)(kernel).reshape(6, 6)
    keys = jax.random.split(jax.random.key(3), 20_000)
    draws = jax.jit(jax.vmap(lambda key: estimated(key, estimate)))(keys).reshape(-1, 6)
    error = np.asarray(draws.std(0)) / len(keys) ** 0.5
    assert (np.abs(draws.mean(0) - jnp.diag(whole)) < 4 * error + 1e-6).all()
    assert error.max() < 0.02 * float(jnp.diag(whole).max())


def asking(estimate: str) -> optax.GradientTransformationExtraArgs:
    """A rule whose state is the last estimate, and which moves nothing."""

    def update(updates, state, params=None, *, curvature, **_):
        return jax.tree.map(jnp.zeros_like, updates), curvature(estimate)

    make: Any = optax.GradientTransformationExtraArgs
    return make(lambda params: params, update)


CHOICES = [
    {}, {"accumulate": 2}, {"ffn": "moe:experts=2:top=2"}, {"attention": "linear"}, {"predict": 2},
    {"attention": "local:window=3", "norm": "post", "remat": "full"},
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_a_step_gives_hutchinson_s_estimate_of_the_whole_batch(changes):
    """u (H u) with H u by finite differences of the gradient, whatever the layers are, and in how many parts."""
    config = edit(Config(), **(SMALL | changes))
    task = build_task(config)
    graph, rule = structure(config, task), asking("hutchinson")
    state = init(config, task, rule)
    batch = jax.tree.map(jnp.asarray, task.batch("train", 0))
    found = jax.jit(make_train_step(config, task, graph, rule))(state, batch)[0].opt
    objective, (leaves, tree) = make_objective(task, graph), jax.tree.flatten(state.params)
    keys = jax.random.split(stream(state.seed, state.step, "curvature"), len(leaves))
    signs = tree.unflatten([jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])

    @jax.jit
    def gradient(params):
        statistics = backward.values(merge(graph, params, state.extra, state.memory))
        loss = lambda params: objective(params, statistics, state.extra, state.memory, batch, jax.random.key(0))[0]
        return jax.grad(loss)(params)

    step, weight = 3e-4, batch.weights.sum()
    with jax.default_matmul_precision("highest"):
        ends = [gradient(jax.tree.map(lambda p, u, s=s: p + s * u, state.params, signs)) for s in (step, -step)]
    for u, up, down, mine in zip(*map(jax.tree.leaves, (signs, *ends, found)), strict=True):
        expected = u * (up - down) / (2 * step) / weight
        np.testing.assert_allclose(mine, expected, atol=0.03 * float(jnp.abs(expected).max()) + 0.03)


@pytest.mark.full
def test_the_estimate_of_drawn_answers_is_one_of_squares():
    config = edit(Config(), **SMALL)
    task = build_task(config)
    rule = asking("gauss_newton")
    state = init(config, task, rule)
    batch = jax.tree.map(jnp.asarray, task.batch("train", 0))
    step = jax.jit(make_train_step(config, task, structure(config, task), rule))
    one = step(state, batch)[0].opt
    again = step(state, dataclasses.replace(batch, targets=batch.targets * 0))[0].opt
    other = step(dataclasses.replace(state, step=state.step + 1), batch)[0].opt
    for a, b, c in zip(*map(jax.tree.leaves, (one, again, other)), strict=True):
        assert (np.asarray(a) >= 0).all()
        np.testing.assert_array_equal(a, b)  # answers are the model's, not the task's
        assert not a.any() or not np.array_equal(a, c)


@pytest.mark.full
def test_others_pay_nothing_and_it_trains(tmp_path):
    """A run with sophia ends with a lower loss than it began with; programs of others have no second pass."""
    config = edit(Config(), **SMALL, optimizer="sophia:every=2", steps=30, lr=1e-2, eval_batches=1, runs=str(tmp_path))
    record = loop.run(config)
    lines = (pathlib.Path(record["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    first, *_, last = [json.loads(line)["loss"] for line in lines]
    assert last < first
    flops = {name: flops_per_token(edit(Config(), **SMALL, optimizer=name)) for name in ("adamw", "lion", "sophia")}
    assert flops["adamw"] == flops["lion"] < flops["sophia"] <= 2 * flops["adamw"]


def test_answers_that_are_no_classes_are_not_drawn(tmp_path):
    (tmp_path / "series.csv").write_text("a,b\n" + "\n".join(f"{i % 7},{i % 5}" for i in range(400)))
    config = edit(
        Config(), task=f"series:path={tmp_path}/series.csv:horizon=4", optimizer="sophia", seq_len=16, dim=8, batch=4
    )
    with pytest.raises(UsageError, match=r"estimate=gauss_newton draws answers .* use estimate=hutchinson"):
        check_config(config)
    check_config(edit(config, optimizer="sophia:estimate=hutchinson"))


def test_a_rule_that_asks_is_given_it_and_others_are_not_told():
    given = shelf.Given(lambda count: jnp.asarray(0.1), jnp.asarray(0.0), properties.subject("adamw").roles)
    rule = optax.with_extra_args_support(optax.chain(optax.clip(1.0), shelf.build("sophia", given)))
    params = properties.subject("adamw").params
    with pytest.raises(TypeError, match="curvature"):
        rule.update(params, rule.init(params), params)
    config = edit(Config(), **SMALL, optimizer="adamw")
    tx: Any = optimizer.of(config, build_task(config))
    state = tx.init(params := init(config, build_task(config), tx).params)

    def never(estimate):
        raise AssertionError

    tx.update(params, state, params, curvature=never)
