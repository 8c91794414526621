"""Layers that are left out the more often the higher they are, exits with one head, and tokens that are drafted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import model_of

from xformers_lab import generate
from xformers_lab.api import generating
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.train import loop


def trained_step(model, tokens, key):
    graph, variables = nnx.split(model)

    def run(variables, key):
        model = nnx.merge(graph, variables)
        return *model(tokens, key=key), nnx.state(model)

    return jax.jit(run)(variables, key)


def moved(model):
    """Far enough from the start that layers disagree."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, structure.unflatten(leaves), rest)


def test_layers_are_dropped_by_the_curve():
    """Of many samples, by each layer alone: the first never, the last as often as is asked for."""
    model, _ = model_of("layerskip:dropout=0.4")
    tokens = jnp.ones((400, 3), jnp.int32)
    x = model.embedding(tokens)
    graph, variables = nnx.split(model.stack.periods[0])
    for number in range(4):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, number=number: leaf[number], variables))
        state = x, jnp.int32(number), jnp.float32(0.5)
        (y, after, _), _, aux = block(state, {}, Context(model.position), key=jax.random.key(number))
        dropped = np.asarray((y == x).all((1, 2)))
        expected = 0.5 * 0.4 * (2 ** (number / 3) - 1)
        assert abs(dropped.mean() - expected) < 0.04 and after == number + 1
        np.testing.assert_allclose(aux.scalars["computation"], 1 - dropped.mean(), atol=1e-6)
        assert dropped.any() == (number > 0)


@pytest.mark.parametrize("words, names, weights", [
    ("curriculum=none:scale=0.5", ["exit1", "exit2", "exit3"], [[0.05, 0.15, 0.3]] * 3),
    ("curriculum=rotational", ["early1"], [[0.1], [0.3], [0.6], [0.1]]),
    ("every=2", ["early1", "early2"], [[0.1, 0.6], [0.3, 0.0], [0.1, 0.6]]),
    ("curriculum=gradual:ramp=8", ["exit1", "exit2", "exit3"], [
        [0, 0, 0], [0, 0, 0.6], [0, 0.3, 0.6], [0.1, 0.3, 0.6],
    ]),
])  # fmt: skip
def test_exits_are_enabled_by_the_curriculum(words, names, weights):
    model, tokens = model_of(f"layerskip:dropout=0:{words}")
    key = jax.random.key(0)
    graph, _ = nnx.split(model)
    for of_pass in weights:
        _, aux, state = trained_step(model, tokens, key)
        assert list(aux.predictions) == names
        np.testing.assert_allclose([weight for weight, _ in aux.predictions.values()], of_pass, atol=1e-6)
        model = nnx.merge(graph, state)
    assert int(model.stack.passes[...]) == len(weights)


def test_an_exit_answers_with_the_models_head():
    """What training says of an exit is what an evaluation answers there, whole or token by token."""
    model, tokens = model_of("layerskip:dropout=0:curriculum=none")
    whole, aux, _ = trained_step(model, tokens, jax.random.key(0))
    np.testing.assert_allclose(model(tokens)[0], whole, atol=1e-5)
    model.stack.exit = 2
    out, spent = model(tokens)
    np.testing.assert_allclose(out, aux.predictions["exit2"][1], atol=1e-5)
    assert spent.scalars["computation"] == 2
    cache = model.init_cache(*tokens.shape)
    logits, cache = model.step_several(cache, tokens[:, :5])
    np.testing.assert_allclose(logits, out[:, 4], atol=1e-5)
    np.testing.assert_allclose(model.step(cache, tokens[:, 5])[0], out[:, 5], atol=1e-5)


@pytest.mark.parametrize("words, message", [
    ("curriculum=gradual", "say it as ramp="), ("dropout=1", "below 1"), ("exit=5", "are 1, 2, 3"),
])  # fmt: skip
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        model_of(f"layerskip:{words}")


def test_what_carries_is_refused():
    with pytest.raises(UsageError, match="hands something to the layer above"):
        model_of("layerskip", attention="realformer")


# ---- drafting ----------------------------------------------------------------------------------------------------


def greedy(model, prompt, new, **options):
    sampling = generate.Sampling(temperature=0)
    return generate.generate(model, [prompt], new=new, length=64, sampling=sampling, **options)[0]


@pytest.mark.full
@pytest.mark.parametrize("depth, changes, layers", [
    ("layerskip", {}, 1),
    ("fixed", {"attention": "local:window=9+full", "position": "alibi", "layers": 5}, 2),
    ("layerdrop", {"attention": "topk", "position": "conv", "layers": 10}, 3),
])  # fmt: skip
def test_drafted_tokens_are_the_greedy_ones(depth, changes, layers):
    """Layers that disagree, whatever is accepted; caches of slots, of rings and of rows; written out and in a loop."""
    small = {"task": "copy", "seq_len": 64, "dim": 16, "heads": 2, "layers": 4, "batch": 2} | changes
    config = edit(Config(), depth=depth, **small)
    model = moved(build_model(config, build_task(config)))
    for prompt, ahead in (([1, 2, 3], 4), (list(range(1, 9)) * 2, 2)):
        shown = []
        draft = generate.Draft(layers, ahead)
        said, figures = generate.speculate(
            model, prompt, draft=draft, new=30, length=64, on_token=shown.append, at_once=8, in_a_call=4
        )
        assert said == shown == greedy(model, prompt, 30)
        assert 0 < figures.rounds <= 30 and figures.drafted == ahead * figures.rounds
        stop = said[11]
        assert generate.speculate(model, prompt, draft=draft, new=30, length=64, stop=[stop])[0] == greedy(
            model, prompt, 30, stop=[stop]
        )


@pytest.mark.full
def test_a_trained_model_drafts_what_it_says(tmp_path, capsys):
    """Most drafts of a trained model are accepted, the command says how many, and its text is the greedy one."""
    config = edit(Config(), task="copy", depth="layerskip", seq_len=24, dim=32, heads=2, layers=4, position="rope")
    record = loop.run(edit(config, batch=16, steps=120, lr=0.01, eval_batches=1, runs=str(tmp_path)))
    words = ["generate", record["run_dir"], "--prompt", "1 2 3", "--new", "12", "--temperature", "0", "--json"]
    assert main(words) == 0
    plain = json.loads(capsys.readouterr().out)[0]
    assert main([*words, "--draft", "2", "--ahead", "3"]) == 0
    drafted = json.loads(capsys.readouterr().out)[0]
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["accepted"] > 0.4 * drafted["drafted"] > 0 and "rounds" not in plain
    assert main([*words[:-1], "--draft", "2"]) == 0
    shown = capsys.readouterr()
    assert "drafted tokens were accepted" in shown.err and drafted["text"].strip() in shown.out


@pytest.mark.parametrize("changes, message", [
    ({"depth": "transparent"}, "drafts nothing"),
    ({"depth": "fixed", "attention": "linear"}, "cannot go back"),
    ({"depth": "fixed", "conv": 2}, "cannot go back"),
    ({"depth": "layerskip", "ffn": "rwkv"}, "ffn=rwkv keeps of earlier tokens what cannot go back"),
    ({"depth": "fixed", "attention": "full+local"}, "the first ones are 2$"),
    ({"depth": "fixed", "attention": "full+local", "layers": 2}, "use more layers"),
    ({"depth": "mixture_of_depths:every=1"}, "cannot go back"),
])  # fmt: skip
def test_what_cannot_draft_is_refused(changes, message):
    config = edit(
        Config(), **({"task": "copy", "seq_len": 16, "dim": 8, "heads": 1, "layers": 4, "batch": 2} | changes)
    )
    model = build_model(config, build_task(config))
    with pytest.raises(UsageError, match=message):
        generate.speculate(model, [1, 2], draft=generate.Draft(1), new=4, length=16)


@pytest.mark.parametrize("beams, asked, message", [
    (None, {"draft": 2}, "give --temperature 0"),
    (None, {"draft": 2, "temperature": 0.5}, "give --temperature 0"),
    (None, {"ahead": 2, "temperature": 0.0}, "give --draft"),
    (2, {"draft": 2}, "a beam search drafts nothing"),
])  # fmt: skip
def test_flags_that_do_not_go_together(beams, asked, message):
    with pytest.raises(UsageError, match=message):
        generating.refuse(beams, asked, lambda name: f"--{name}")
