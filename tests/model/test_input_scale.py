"""Vectors reach the first layer at one size, whatever the position, the depth and the kind of model; and no model is
sure of anything before it has learned."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from flax import nnx
from test_golden_models import Squares

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.model import build_model, build_task
from xformers_lab.train import optimizer, prefetch
from xformers_lab.train.state import init, structure
from xformers_lab.train.step import make_train_step

pytestmark = pytest.mark.full

SMALL = {"task": "copy:symbols=200", "seq_len": 65, "dim": 64, "batch": 8, "layers": 4}


def model_of(**changes) -> tuple[Any, Any]:
    config = edit(Config(), **(SMALL | changes))
    task = Squares(256, 5) if "vit" in config.model.model else build_task(config)
    return build_model(edit(config, seq_len=144) if "vit" in config.model.model else config, task), task


def at_the_stack(model, tokens, valid=None) -> float:
    """The root mean square of what a model gives its depth, (B, T, D)."""
    seen = []

    def stack(x, context, *, key=None):
        seen.append(x)
        raise StopIteration

    model.stack = stack
    with pytest.raises(StopIteration):
        model(tokens, valid=valid)
    return float(jnp.sqrt(jnp.square(seen[0]).mean()))


# Every position and every depth with the default of the other axis, and all pairs in make test-deep.
DEPTHS = ["fixed", "universal", "universal:code=false", "feedback", "hourglass"]
BOTH = [
    pytest.param(position, depth, marks=[] if position == "learned" or depth == "fixed" else [pytest.mark.slow])
    for position in spec.names("position")
    for depth in DEPTHS
]


@pytest.mark.parametrize("position, depth", BOTH)
def test_positions_and_depths_reach_the_stack_alike(position, depth):
    model, _ = model_of(position=position, depth=depth)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 200, (8, 65)))
    assert at_the_stack(model, tokens) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("changes", [
    {"model": "encoder", "task": "listops"}, {"model": "decoder:tied=true"}, {"norm": "post"}, {"norm": "rezero"},
    {"norm": "deepnorm"}, {"dim": 256}, {"dim": 16}, {"position": "sinusoidal", "dim": 256},
], ids=str)  # fmt: skip
def test_kinds_norms_and_widths_do_too(changes):
    model, task = model_of(**changes)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, task.vocab, (8, 65)))
    assert at_the_stack(model, tokens) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal", "grid"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_patches_and_their_class_token_do_too(pool, position):
    """Of images whose levels are all as frequent."""
    model, _ = model_of(model=f"vit:pool={pool}", position=position)
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 144)))
    assert at_the_stack(model, pixels) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "conv", "randomized"])
def test_both_sides_of_an_encoder_decoder_do(position):
    model, _ = model_of(model="encoder_decoder", position=position)
    x = model.embedding(jnp.asarray(np.random.default_rng(0).integers(0, 200, (8, 33))))
    for side in (model.source_position, model.position):
        marked = side.embed(x[:, :32], jnp.arange(32))
        assert float(jnp.sqrt(jnp.square(marked).mean())) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["lstm", "gru", "bag", "bytenet", "seq2seq"])
def test_baselines_read_tokens_of_the_same_size(kind):
    model, _ = model_of(model=kind)
    assert float(jnp.sqrt(jnp.square(model.embedding(jnp.arange(200))).mean())) == pytest.approx(1, abs=0.05)


def test_every_step_of_universal_layers_that_normalise_sees_one_size():
    """Position and step are added before each of them."""
    model, _ = model_of(position="sinusoidal", depth="universal", layers=6)
    at, x = jnp.arange(65), jax.random.normal(jax.random.key(0), (8, 65, 64))
    again = lambda x: model.position.embed(x, at)
    for number in range(6):
        marked = model.stack._marked(again(x) if number == 0 else x, number, model.position, again)
        assert float(jnp.sqrt(jnp.square(marked).mean())) == pytest.approx(1, abs=0.1)


KINDS = [
    "decoder", "decoder:tied=true", "encoder_decoder", "encoder_decoder:tied=true", "lstm", "gru", "bag", "bytenet",
    "seq2seq", "seq2seq:look=additive",
]  # fmt: skip


@pytest.mark.parametrize("changes", kinds.every_third([
    *({"model": kind} for kind in KINDS), {"model": "encoder", "task": "listops"}, {"norm": "post"}, {"norm": "rezero"},
    {"norm": "deepnorm"}, {"norm": "rezero", "model": "decoder:tied=true"}, {"model": "decoder:tied=true", "dim": 512},
    {"model": "decoder:tied=true", "dim": 512, "position": "none"}, {"model": "vit"},
    {"depth": "universal", "model": "decoder:tied=true"}, {"depth": "hourglass", "model": "decoder:tied=true"},
]), ids=str)  # fmt: skip
def test_no_model_is_sure_of_anything_at_the_start(changes):
    """Its loss is that of a guess among all answers, and what logits of unit size add to that."""
    model, task = model_of(**changes)
    if "vit" in changes.get("model", ""):
        inputs, targets = np.random.default_rng(0).integers(0, 256, (64, 144)), np.arange(64)[:, None] % 5
        logits = np.asarray(model(jnp.asarray(inputs))[0])[:, None]
    else:
        batch = task.batch("train", 0)
        run = jax.jit(lambda variables, x: nnx.merge(graph, variables)(x)[0])
        graph, variables = nnx.split(model)
        logits, targets = np.asarray(run(variables, jnp.asarray(batch.inputs))), batch.targets
        if task.target == "sequence":
            logits, targets = logits[:, None], targets[:, None]
        else:
            logits, targets = logits[:, 33:], targets[:, 33:]  # where a source and a target are, the target
    logs = np.asarray(jax.nn.log_softmax(logits))
    loss = -np.take_along_axis(logs, targets[..., None], -1).mean()
    assert loss == pytest.approx(math.log(task.outputs), abs=0.75)
    # Of tokens that predict tokens, none predicts itself.
    if "tied" in changes.get("model", ""):
        assert float(np.abs(logits).max()) < 3


@pytest.mark.slow
@pytest.mark.parametrize("position", ["learned", "conv"])
def test_a_transformer_learns_to_recall(position):
    """The setting that the README and the page of tasks name, with full attention."""
    words = {"task": "mqar:pairs=4", "ffn": "none", "batch": 64, "lr": 3e-3, "steps": 600, "position": position}
    config = edit(Config(), **words)
    task = build_task(config)
    tx = optimizer.of(config, task)
    state, metrics = init(config, task, tx), {}
    step = jax.jit(make_train_step(config, task, structure(config, task), tx))
    for at in range(600):
        state, metrics = step(state, prefetch.checked(task, "train", at))
    assert float(metrics["loss"]) < 0.1
