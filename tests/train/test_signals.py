"""Signals before training are what differentiating the whole model gives, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, check_config
from xformers_lab.train import signals

TINY = edit(Config(), task="copy", seq_len=8, dim=8, layers=2, batch=2)


@pytest.mark.parametrize("choice", ["norm=pre", "attention=full+linear"])
def test_gradients_are_those_of_the_whole_model(choice):
    """Layers of one mechanism are stacked, those of a cycle are not; either way each layer has its own gradient."""
    key, value = choice.split("=")
    config = edit(TINY, **{key: value})
    task = check_config(config)
    model, batch = build_model(config, task), task.batch("train", 0)

    def loss(model):
        logits, _ = model(jnp.asarray(batch.inputs))
        total, weight = task.loss(logits, jax.tree.map(jnp.asarray, batch))
        return total / weight

    grads = nnx.grad(loss)(model)["stack"]["periods"]
    stacked = [grads[at] for at in sorted(grads)]
    layers = [jax.tree.map(lambda leaf, at=at: leaf[at], each) for at in range(2 // len(stacked)) for each in stacked]
    norm = lambda tree: np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))
    measured = next(signals.of_configs([config]))
    assert [each.layer for each in measured] == [1, 2]
    np.testing.assert_allclose([each.gradient for each in measured], [norm(layer) for layer in layers], rtol=1e-4)
    ffn = np.array([each.ffn_gradient for each in measured], float)
    np.testing.assert_allclose(ffn, [norm(layer["ffn"]) for layer in layers], rtol=1e-4)


def test_states_are_those_that_the_placement_gives():
    """Post-LN gives states of unit size, pre-LN adds to them."""
    post, pre = (next(signals.of_configs([edit(TINY, norm=norm)])) for norm in ("post", "pre"))
    np.testing.assert_allclose([each.state for each in post], 1, atol=1e-3)
    assert 1 < pre[0].state < pre[1].state


def test_without_a_feed_forward_layer_it_has_no_gradient():
    assert [each.ffn_gradient for each in next(signals.of_configs([edit(TINY, ffn="none")]))] == [None, None]


@pytest.mark.parametrize("key, value", [("model", "lstm"), ("depth", "universal")])
def test_models_without_a_stack_are_refused(key, value):
    with pytest.raises(UsageError, match=f"{key}={value}"):
        list(signals.of_configs([edit(TINY, **{key: value})]))


def test_from_the_command_line(capsys):
    assert main(["signals", "task=copy", "seq_len=8", "dim=8", "layers=2", "batch=2", "norm=pre,post"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["norm", "layer", "state", "state_gradient", "gradient", "ffn_gradient"]
    assert len(lines) == 5
