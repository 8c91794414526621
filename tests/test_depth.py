"""Depths: what is shared, what is skipped, and where positions halt."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.model import build_model, build_task
from xformers_lab.train import optimizer


def model_of(depth: str, **changes) -> Any:
    small = {"seq_len": 12, "dim": 16, "heads": 2, "layers": 4, "batch": 3}
    config = edit(Config(), task="copy", depth=depth, **(small | changes))
    task = build_task(config)
    return build_model(config, task), jnp.asarray(task.batch("train", 0).inputs)


def count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.stack, nnx.Param)))


def test_universal_has_the_parameters_of_one_layer():
    assert count(model_of("universal")[0]) == count(model_of("fixed", layers=1)[0])
    assert count(model_of("universal", attention="full+linear")[0]) == count(model_of("fixed", layers=2)[0])


def test_universal_is_its_layer_again_and_again():
    model, tokens = model_of("universal", layers=3, position="none")
    x, block, D = model.embedding(tokens), model.stack.blocks[0], 16
    context = Context(model.position)
    for number in (1, 2, 3):
        angle = number / 10_000 ** (np.arange(0, D, 2) / D)
        x = x + np.stack([np.sin(angle), np.cos(angle)], -1).reshape(-1)
        x = block(x, {}, context)[0]
    np.testing.assert_allclose(model.stack(model.embedding(tokens), context)[0], x, atol=1e-5)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 8.0])
def test_halting_weights_add_up_to_one(bias):
    """States that are all ones come out as ones, whatever was halted where; the steps taken fit the probabilities."""
    model, tokens = model_of("universal:act=true", layers=5)
    depth, x = model.stack, jnp.ones((3, 12, 16))
    depth.halt.kernel[...] = 0 * depth.halt.kernel[...]
    depth.halt.bias[...] = jnp.full(1, bias)
    halting = depth._running(x)
    for number in range(5):
        _, halting = depth._halted(x, x, number, halting)
    np.testing.assert_allclose(halting["out"], 1, atol=1e-6)
    p = 1 / (1 + np.exp(-bias))
    taken = next((n for n in range(1, 6) if n * p >= 0.99), 5)
    np.testing.assert_allclose(halting["steps"], taken)
    np.testing.assert_allclose(halting["left"], 1 - (taken - 1) * p, atol=1e-5)
    aux = depth(model.embedding(tokens), Context(model.position))[1]
    np.testing.assert_allclose(aux["steps"], taken)
    np.testing.assert_allclose(aux["loss/ponder"], 0.01 * (taken + 1 - (taken - 1) * p), rtol=1e-4)


def test_halted_positions_keep_their_state():
    depth = model_of("universal:act=true", layers=3)[0].stack
    x, y = jnp.ones((1, 2, 16)), 2 * jnp.ones((1, 2, 16))
    halting = depth._running(x) | {"sum": jnp.array([[1.0, 0.2]])}
    state, _ = depth._halted(x, y, 1, halting)
    np.testing.assert_array_equal(state[0, :, 0], [1, 2])


def test_ponder_reaches_the_halting_parameters():
    model, tokens = model_of("universal:act=true", layers=3)
    graph, params = nnx.split(model)
    grads = jax.grad(lambda params: nnx.merge(graph, params)(tokens)[1]["loss/ponder"])(params)
    assert float(jnp.abs(grads.stack.halt.bias[...]).sum()) > 0


@pytest.mark.parametrize("depth", ["universal", "universal:act=true", "layerdrop"])
@pytest.mark.parametrize("attention", ["full", "linear+full"])
def test_decoding_is_the_whole_pass(depth, attention):
    model, tokens = model_of(depth, attention=attention)
    step = lambda cache, token: model.step(cache, token)[::-1]
    logits = jax.lax.scan(step, model.init_cache(3, 12), tokens.T)[1].swapaxes(0, 1)
    np.testing.assert_allclose(logits, model(tokens)[0], atol=1e-4)


def test_layerdrop_leaves_out_layers_in_training_alone():
    model, tokens = model_of("layerdrop:rate=0.5", layers=6)
    fixed = model_of("fixed", layers=6)[0]
    assert count(model) == count(fixed)
    assert "layers" not in model(tokens)[1]
    kept = [float(model(tokens, key=jax.random.key(seed))[1]["layers"]) for seed in range(20)]
    assert 2 < np.mean(kept) < 4 and len(set(kept)) > 2
    never = model_of("layerdrop:rate=0", layers=6)[0]
    np.testing.assert_allclose(never(tokens, key=jax.random.key(0))[0], never(tokens)[0], atol=1e-6)


@pytest.mark.parametrize("depth, message", [
    ("layerdrop:rate=1", "below 1"),
    ("universal:slack=0", "slack must be between"),
])  # fmt: skip
def test_bad_options(depth, message):
    with pytest.raises(Exception, match=message):
        model_of(depth)


def test_a_period_that_does_not_divide_is_refused():
    with pytest.raises(Exception, match="not divisible by the 3 mechanisms"):
        model_of("universal", attention="full+linear+local")


@pytest.mark.parametrize("depth", ["fixed", "universal", "layerdrop"])
def test_kernels_decay_and_biases_do_not(depth):
    params = nnx.to_pure_dict(nnx.state(model_of(depth)[0], nnx.Param))
    for path, decays in jax.tree_util.tree_leaves_with_path(optimizer.decays(params)):
        name = jax.tree_util.keystr(path)
        assert decays == ("kernel" in name or "embedding" in name or "table" in name), name
