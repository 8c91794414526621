"""Depths whose middle is applied again: how often, and what its gradients flow through."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import gradients, model_of

from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.depth.looped import Looped
from xformers_lab.errors import UsageError
from xformers_lab.measure.flops import count_flops
from xformers_lab.nn.documents import places
from xformers_lab.train import loop


def through(part, x, context, layers: int):
    """The layers of a part of a depth, one after another."""
    graph, variables = nnx.split(part.periods[0])
    for number in range(layers):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, number=number: leaf[number], variables))
        x = block(x, {}, context)[0]
    return x


def by_hand(depth, x, context, s, count: int, backward: int):
    """The definition, of one layer before the core, two in it and one after it."""
    e, core = through(depth.prelude, x, context, 1), depth.core
    graph, variables = nnx.split(core)
    stopped = nnx.merge(graph, jax.lax.stop_gradient(variables))
    for number in range(count):
        early = number < count - backward
        its, seen = (stopped, jax.lax.stop_gradient(e)) if early else (core, e)
        y = jnp.concatenate([s, seen], -1) @ its.adapter.kernel[...]
        y = through(its.layers, y, context, 2)
        s = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * its.norm.scale[...]
    return through(depth.coda, s, context, 1)


def test_evaluation_is_the_definition():
    model, tokens = model_of("looped:iterations=3", position="none")
    x, context = model.embedding(tokens), Context(model.position)
    s = jnp.broadcast_to(model.stack.begun(jnp.arange(12)), x.shape)
    out, aux = model.stack(x, context)
    np.testing.assert_allclose(out, by_hand(model.stack, x, context, s, 3, 3), atol=1e-5)
    assert aux.scalars["iterations"] == 3 and aux.scalars["computation"] == 1 + 3 * 2 + 1


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 4])
def test_gradients_flow_through_the_last_iterations_alone(count, monkeypatch):
    monkeypatch.setattr(Looped, "drawn", lambda self, key: jnp.array(count, jnp.int32))
    model, tokens = model_of("looped:backward=2:noise=0", position="none")
    x, context = model.embedding(tokens), Context(model.position)
    begun = jnp.zeros_like(x)
    value, grads = gradients(model.stack, lambda depth: (depth(x, context, key=jax.random.key(0))[0] ** 3).sum())
    expected, wanted = gradients(model.stack, lambda depth: (by_hand(depth, x, context, begun, count, 2) ** 3).sum())
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4 * float(jnp.abs(theirs).max()))


def test_training_draws_a_log_normal_poisson_number():
    """One more than a Poisson variable whose rate is log-normal: its mean, its variance, and a step's own draw."""
    model, tokens = model_of("looped:mean=6:backward=1")
    drawn = np.asarray(jax.vmap(model.stack.drawn)(jax.random.split(jax.random.key(0), 20_000)))
    assert drawn.min() == 1
    np.testing.assert_allclose(drawn.mean(), 7, rtol=0.02)
    np.testing.assert_allclose(drawn.var(), 6 + 36 * (np.exp(0.25) - 1), rtol=0.08)
    graph, variables = nnx.split(model)
    told = jax.jit(lambda key: nnx.merge(graph, variables)(tokens, key=key)[1].scalars)
    seen = [told(jax.random.key(seed)) for seed in (0, 0, 1, 2, 3)]
    assert seen[0] == seen[1] and len({float(one["iterations"]) for one in seen}) > 1
    assert all(one["computation"] == 2 + 2 * one["iterations"] for one in seen)


@pytest.mark.full
def test_the_first_state_goes_by_the_place_in_a_document():
    """So a document says packed what it says alone, and a state is unlike its neighbour's."""
    model, tokens = model_of("looped:iterations=2", position="rope")
    documents = jnp.broadcast_to((jnp.arange(12) >= 5).astype(jnp.int32), tokens.shape)
    packed = model(tokens, documents=documents)[0]
    np.testing.assert_allclose(packed[:, 5:], model(tokens[:, 5:])[0], atol=1e-4)
    np.testing.assert_allclose(packed[:, :5], model(tokens[:, :5])[0], atol=1e-4)
    begun = model.stack.begun(places(documents)[0])
    np.testing.assert_array_equal(begun[:5], begun[5:10])
    assert float(jnp.abs(begun[0] - begun[1]).max()) > 0.1 and 0.8 < float(begun.std()) < 1.2


def test_work_is_that_of_an_average_step():
    def flops(words: str, key) -> int:
        model, tokens = model_of(f"looped:{words}")
        graph, variables = nnx.split(model.stack)
        x, context = model.embedding(tokens), Context(model.position)
        return count_flops(lambda v, x: nnx.merge(graph, v)(x, context, key=key)[0], variables, x)

    one, two, nine = (flops(f"iterations={count}", None) for count in (1, 2, 9))
    assert nine - one == 8 * (two - one) > 0
    assert flops("mean=8:backward=4", jax.random.key(0)) == nine


@pytest.mark.full
def test_a_run_is_scored_with_other_iterations(tmp_path, capsys):
    config = edit(Config(), task="copy", depth="looped:mean=2:backward=1", seq_len=8, dim=8, heads=1, layers=3)
    record = loop.run(edit(config, batch=4, steps=2, eval_batches=1, runs=str(tmp_path)))
    assert record["computation"] == 2 + 2
    words = ["eval", record["run_dir"], "depth.iterations=1,2,16", "--batches", "1", "--json"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["computation"] for row in rows] == [3, 4, 18]
    assert rows[1]["loss"] == record["loss"] != rows[0]["loss"]
    assert rows[2]["changed"] == {"depth.iterations": [2, 16]}


@pytest.mark.parametrize("words, message", [
    ("prelude=3", "3 before the core, 0 in it"), ("iterations=0", "iterations must be"), ("noise=-1", "noise must be"),
])  # fmt: skip
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        model_of(f"looped:{words}")
