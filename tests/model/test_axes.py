"""Every two choices of two shelves: they train and decode together, or are refused with the reason."""

import functools
import itertools
import random
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, check_config
from xformers_lab.train import optimizer, prefetch
from xformers_lab.train.state import init, structure
from xformers_lab.train.step import make_train_step

pytestmark = pytest.mark.full

AXES = ("attention", "position", "norm", "ffn", "depth", "memory", "model")
SIZE = {"seq_len": 24, "dim": 16, "heads": 2, "layers": 4, "batch": 2, "steps": 2, "warmup": 0}
# How far one token at a time may be from all at once, in logits of size 1.
STEP = 5e-4


def choices(axis: str) -> list[str]:
    normalisers = [f"pre:normaliser={name}" for name in spec.names("normaliser")]
    return [*spec.names(axis), *(normalisers if axis == "norm" else [])]


def pairs() -> list[tuple[str, str]]:
    named = {axis: [f"{axis}={choice}" for choice in choices(axis)] for axis in AXES}
    two = itertools.combinations(AXES, 2)
    return [pair for one, other in two for pair in itertools.product(named[one], named[other])]


@functools.cache
def images() -> tempfile.TemporaryDirectory:
    """Images of 8x12 pixels, noise, and which of three classes each is said to be; gone with the process."""
    folder, rng = tempfile.TemporaryDirectory(), np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (64, 8, 12)).astype(np.uint8), np.arange(64) % 3
    np.savez(f"{folder.name}/train.npz", x_train=pixels, y_train=labels)
    return folder


def config_of(pair: tuple[str, str]) -> Config:
    """The two choices at a small size, on a task that is made for them."""
    chosen = dict(choice.split("=", 1) for choice in pair)
    if chosen.get("model") == "vit":
        seen = {"task": f"pixels:path={images().name}", "seq_len": 96, "model": "vit:patch=2"}
        return edit(Config(), **(SIZE | chosen | seen))
    sees_ahead = "causal" in spec.entry("attention", chosen.get("attention", "full")).refuses
    task = "listops" if sees_ahead or chosen.get("model") == "encoder" else "copy"
    if chosen.get("memory", "none") != "none":
        task, chosen = "lm", {"position": "rope"} | chosen
    elif chosen.get("model") in ("encoder_decoder", "seq2seq"):
        task = "copy"
    return edit(Config(), **(SIZE | {"task": task} | chosen))


def works_or_is_refused(pair: tuple[str, str]) -> str | None:
    """Why a pair is refused; None where it trained two steps and decoded what it says of a whole sequence."""
    config = config_of(pair)
    try:
        task = check_config(config)
    except UsageError as reason:
        assert len(str(reason)) > 20 and "\n" not in str(reason)
        return str(reason)
    tx = optimizer.of(config, task)
    state = init(config, task, tx)
    step = jax.jit(make_train_step(config, task, structure(config, task), tx))
    for at in range(2):
        state, metrics = step(state, prefetch.checked(task, "train", at))
        assert bool(metrics["ok"]) and np.isfinite(metrics["loss"]), (pair, metrics)
    model = build_model(config, task)
    try:
        cache = model.init_cache(2, config.seq_len)
    except ValueError as reason:
        assert len(str(reason)) > 20
        return str(reason)
    tokens = jnp.asarray(task.batch("validation", 0).inputs)[:2]
    graph, variables = nnx.split(model)
    # Built where it runs, of copies, for layers may write to their variables.
    built = lambda: nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))

    def one(cache, token):
        logits, cache = built().step(cache, token)
        return cache, logits

    steps = jax.jit(lambda cache, tokens: jax.lax.scan(one, cache, tokens)[1])(cache, tokens.T).swapaxes(0, 1)
    whole = jax.jit(lambda tokens: built()(tokens)[0])(tokens)
    np.testing.assert_allclose(steps, whole, atol=STEP * max(1, float(np.abs(whole).max())), err_msg=str(pair))
    return None


@pytest.mark.parametrize("pair", random.Random(2).sample(pairs(), 5), ids=" ".join)
def test_some_pairs(pair):
    works_or_is_refused(pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", pairs(), ids=" ".join)
def test_every_pair(pair):
    works_or_is_refused(pair)
