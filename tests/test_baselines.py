"""Baselines without attention: their equations, padding, decoding, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.model import build_model, build_task, gru, lstm
from xformers_lab.size import Size

SIZE = Size(16, dim=8, heads=2, layers=1)
CELLS = {"lstm": lstm.Cell, "gru": gru.Cell}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def by_steps(cell, x, real):
    """Position after position; padding leaves the state as it was."""
    state, out = cell.init_state(len(x)), []
    for t in range(x.shape[1]):
        new, _ = cell.step(state, x[:, t])
        keep = lambda a, b, t=t: jnp.where(real[:, t, None], a, b)
        state = jax.tree.map(keep, new, state)
        out.append(state["h"] if isinstance(state, dict) else state)
    return jnp.stack(out, 1)


@pytest.mark.parametrize("kind", CELLS)
def test_value_and_gradients_are_those_of_single_steps(kind):
    cell, x = CELLS[kind](SIZE, nnx.Rngs(0)), draw(3, 7, 8)
    real = jnp.asarray(np.random.default_rng(1).random((3, 7)) < 0.7)
    graph, params = nnx.split(cell)

    def both(run):
        loss = lambda params, x: (run(nnx.merge(graph, params), x) * draw(3, 7, 8, seed=2)).sum()
        return run(cell, x), jax.grad(loss, (0, 1))(params, x)

    with jax.default_matmul_precision("highest"):
        fast, slow = both(lambda cell, x: cell(x, real)), both(lambda cell, x: by_steps(cell, x, real))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fast, slow)


def test_one_lstm_step_is_the_equation():
    cell, x = lstm.Cell(SIZE, nnx.Rngs(0)), draw(1, 8)
    state = {"h": draw(1, 8, seed=1), "c": draw(1, 8, seed=2)}
    i, f, g, o = np.split(np.asarray(cell.input(x) + state["h"] @ cell.recurrent[...]), 4, -1)
    sigmoid = lambda y: 1 / (1 + np.exp(-y))
    c = sigmoid(f) * state["c"] + sigmoid(i) * np.tanh(g)
    new, h = cell.step(state, x)
    np.testing.assert_allclose(new["c"], c, atol=1e-5)
    np.testing.assert_allclose(h, sigmoid(o) * np.tanh(c), atol=1e-5)
    assert cell.input.bias is not None and (cell.input.bias[...][8:16] == 1).all()


@pytest.mark.parametrize("kind", [*CELLS, "bag"])
def test_decoding_is_the_whole_pass(kind):
    config = edit(Config(), task="copy", model=kind, seq_len=12, dim=16, batch=2, layers=2)
    task = build_task(config)
    model, tokens = build_model(config, task), jnp.asarray(task.batch("train", 0).inputs)
    step = lambda cache, token: model.step(cache, token)[::-1]
    logits = jax.lax.scan(step, model.init_cache(2, 12), tokens.T)[1].swapaxes(0, 1)
    np.testing.assert_allclose(logits, model(tokens)[0], atol=1e-5)


@pytest.mark.parametrize("kind", CELLS)
def test_a_classifier_ignores_padding_behind_a_sequence(kind):
    config = edit(Config(), task="listops", model=kind, seq_len=32, dim=16, batch=2)
    task = build_task(config)
    model, tokens = build_model(config, task), jnp.asarray(np.random.default_rng(0).integers(1, task.vocab, (2, 32)))
    real = jnp.arange(32)[None] < jnp.array([[32], [20]])
    logits = model(tokens, real=real)[0]
    np.testing.assert_allclose(model(jnp.where(real, tokens, 0), real=real)[0], logits, atol=1e-6)
    np.testing.assert_allclose(model(tokens[1:, :20])[0], logits[1:], atol=1e-5)


def test_trains_from_the_command_line(capsys, tmp_path):
    words = [f"runs={tmp_path}", "task=copy", "dim=16", "batch=4", "steps=3", "eval_batches=1", "seq_len=16"]
    assert main(["compare", *words, "model=auto,lstm,gru,bag,bytenet", "dtype=float32,bfloat16", "--json"]) == 0
    capsys.readouterr()
    assert main(["train", *words, "model=lstm", "attention=linear"]) == 2
    assert "model=lstm: lstm has no attention: leave out attention=linear" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bag", "bytenet:kernel=2:farthest=4"])
def test_no_baseline_sees_the_future_or_padding(kind):
    config = edit(Config(), task="copy", model=kind, seq_len=24, dim=16, batch=2, layers=4)
    task = build_task(config)
    model, tokens = build_model(config, task), jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 24)))
    logits = model(tokens)[0]
    changed = model(tokens.at[:, 15:].set(3))[0]
    np.testing.assert_array_equal(changed[:, :15], logits[:, :15])
    assert np.abs(changed[:, 15:] - logits[:, 15:]).max() > 1e-3
    real = jnp.arange(24)[None] != jnp.array([[3], [4]])
    hidden = model(jnp.where(real, tokens, 0), real=real)[0]
    other = model(jnp.where(real, tokens, 5), real=real)[0]
    np.testing.assert_allclose(jnp.where(real[..., None], hidden - other, 0), 0, atol=1e-6)


def test_bytenet_looks_back_as_far_as_its_taps():
    """Two blocks of two taps, dilations 1 and 2: four positions."""
    config = edit(Config(), task="copy", model="bytenet:kernel=2:farthest=2", seq_len=24, dim=16, layers=2)
    model = build_model(config, build_task(config))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (1, 24)))
    moved = np.abs(model(tokens.at[0, 5].set((tokens[0, 5] + 1) % 11))[0] - model(tokens)[0]).max((0, 2)) > 0
    assert list(np.nonzero(moved)[0]) == [5, 6, 7, 8]


def test_a_bag_does_not_know_order():
    config = edit(Config(), task="listops", model="bag", seq_len=32, dim=16)
    task = build_task(config)
    model, tokens = build_model(config, task), np.random.default_rng(0).integers(1, task.vocab, (2, 32))
    np.testing.assert_allclose(model(jnp.asarray(tokens[:, ::-1]))[0], model(jnp.asarray(tokens))[0], atol=1e-5)
