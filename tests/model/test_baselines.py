"""Baselines that are no transformers: their equations, padding, decoding, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.generate import beam_search, generate
from xformers_lab.model import build_model, build_task
from xformers_lab.nn import gru, lstm
from xformers_lab.nn.size import Size
from xformers_lab.train import optimizer, prefetch
from xformers_lab.train.state import init, structure
from xformers_lab.train.step import make_train_step

SIZE = Size(16, dim=8, heads=2, layers=1)
CELLS = {"lstm": lstm.Cell, "gru": gru.Cell}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def by_steps(cell, x, valid):
    """Position after position; padding leaves the state as it was."""
    state, out = cell.init_state(len(x)), []
    for t in range(x.shape[1]):
        new, _ = cell.step(state, x[:, t])
        keep = lambda a, b, t=t: jnp.where(valid[:, t, None], a, b)
        state = jax.tree.map(keep, new, state)
        out.append(state["h"] if isinstance(state, dict) else state)
    return jnp.stack(out, 1)


@pytest.mark.full
@pytest.mark.parametrize("kind", CELLS)
def test_value_and_gradients_are_those_of_single_steps(kind):
    cell, x = CELLS[kind](SIZE, nnx.Rngs(0)), draw(3, 7, 8)
    valid = jnp.asarray(np.random.default_rng(1).random((3, 7)) < 0.7)
    graph, params = nnx.split(cell)

    def both(run):
        loss = lambda params, x: (run(nnx.merge(graph, params), x) * draw(3, 7, 8, seed=2)).sum()
        return run(cell, x), jax.grad(loss, (0, 1))(params, x)

    with jax.default_matmul_precision("highest"):
        fast, slow = both(lambda cell, x: cell(x, valid)), both(lambda cell, x: by_steps(cell, x, valid))
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
    model: Any = build_model(config, task)
    tokens = jnp.asarray(task.batch("train", 0).inputs)
    step = lambda cache, token: model.step(cache, token)[::-1]
    logits = jax.lax.scan(step, model.init_cache(2, 12), tokens.T)[1].swapaxes(0, 1)
    np.testing.assert_allclose(logits, model(tokens)[0], atol=1e-5)


@pytest.mark.parametrize("kind", CELLS)
def test_a_classifier_ignores_padding_behind_a_sequence(kind):
    config = edit(Config(), task="listops", model=kind, seq_len=32, dim=16, batch=2)
    task = build_task(config)
    model, tokens = build_model(config, task), jnp.asarray(np.random.default_rng(0).integers(1, task.vocab, (2, 32)))
    valid = jnp.arange(32)[None] < jnp.array([[32], [20]])
    logits = model(tokens, valid=valid)[0]
    np.testing.assert_allclose(model(jnp.where(valid, tokens, 0), valid=valid)[0], logits, atol=1e-6)
    np.testing.assert_allclose(model(tokens[1:, :20])[0], logits[1:], atol=1e-5)


@pytest.mark.full
def test_trains_from_the_command_line(capsys, tmp_path):
    words = [f"runs={tmp_path}", "task=copy", "dim=16", "batch=4", "steps=3", "eval_batches=1", "seq_len=16"]
    assert (
        main(
            ["compare", *words, "model=auto,lstm,gru,bag,bytenet", "dtype=float32,bfloat16", "--no-baselines", "--json"]
        )
        == 0
    )
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
    valid = jnp.arange(24)[None] != jnp.array([[3], [4]])
    hidden = model(jnp.where(valid, tokens, 0), valid=valid)[0]
    other = model(jnp.where(valid, tokens, 5), valid=valid)[0]
    np.testing.assert_allclose(jnp.where(valid[..., None], hidden - other, 0), 0, atol=1e-6)


def test_bytenet_looks_back_as_far_as_its_taps():
    """Two blocks of two taps, dilations 1 and 2: four positions."""
    config = edit(Config(), task="copy", model="bytenet:kernel=2:farthest=2", seq_len=24, dim=16, layers=2)
    model = build_model(config, build_task(config))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (1, 24)))
    moved = np.abs(model(tokens.at[0, 5].set((tokens[0, 5] + 1) % 11))[0] - model(tokens)[0]).max((0, 2)) > 0
    assert list(np.nonzero(moved)[0]) == [5, 6, 7, 8]


@pytest.mark.parametrize("options", ["", ":kernel=2:farthest=2", ":kernel=4:farthest=4"])
def test_bytenet_decodes_as_it_reads_the_whole(options):
    config = edit(Config(), task="copy", model=f"bytenet{options}", seq_len=40, dim=16, layers=4)
    model: Any = build_model(config, build_task(config))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 40)))
    step = lambda cache, token: model.step(cache, token)[::-1]
    logits = jax.jit(lambda tokens: jax.lax.scan(step, model.init_cache(2, 40), tokens.T)[1])(tokens).swapaxes(0, 1)
    np.testing.assert_allclose(logits, jax.jit(lambda tokens: model(tokens)[0])(tokens), atol=1e-5)
    # What is kept does not grow with the text.
    assert jax.eval_shape(lambda: model.init_cache(2, 40)) == jax.eval_shape(lambda: model.init_cache(2, 400))


def test_a_bag_does_not_know_order():
    config = edit(Config(), task="listops", model="bag", seq_len=32, dim=16)
    task = build_task(config)
    model, tokens = build_model(config, task), np.random.default_rng(0).integers(1, task.vocab, (2, 32))
    np.testing.assert_allclose(model(jnp.asarray(tokens[:, ::-1]))[0], model(jnp.asarray(tokens))[0], atol=1e-5)


def test_gradients_of_an_lstm_through_its_first_and_last_state():
    """The scan's own backward pass is that of autodiff, from every output to every input."""
    T, B, D = 6, 3, 4
    gates, recurrent, h, c = draw(T, B, 4 * D), draw(D, 4 * D, seed=1), draw(B, D, seed=2), draw(B, D, seed=3)
    kept = jnp.asarray(np.random.default_rng(4).random((T, B)) < 0.7)

    def plain(gates, recurrent, kept, h, c):
        def one(state, inputs):
            new = lstm._advance(inputs[0], state[0], state[1], recurrent)[:2]
            state = jax.tree.map(lambda a, b: jnp.where(inputs[1][:, None], a, b), new, state)
            return state, state[0]

        (_, c), every = jax.lax.scan(one, (h, c), (gates, kept))
        return every, c

    def both(scan):
        def loss(gates, recurrent, h, c):
            every, last = scan(gates, recurrent, kept, h, c)
            return (every * draw(T, B, D, seed=5)).sum() + (last * draw(B, D, seed=6)).sum(), (every, last)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(gates, recurrent, h, c)

    with jax.default_matmul_precision("highest"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both(lstm._scan), both(plain))


# 7 positions of source, 6 of target.
PAIR = {"task": "copy", "seq_len": 13, "dim": 8, "batch": 3, "layers": 2}


def seq2seq(options: str = "", **changes) -> tuple[Any, jax.Array]:
    config = edit(Config(), model=f"seq2seq{options}", **(PAIR | changes))
    task = build_task(config)
    return build_model(config, task), jnp.asarray(task.batch("train", 0).inputs)


def glimpse(look, s, source):
    """What a state sees of the encoder's states."""
    query = lambda: s @ look.query.kernel[...]
    key = lambda h: h @ look.key.kernel[...] + look.key.bias[...]
    score = lambda h: s @ h if look.v is None else look.v[...] @ jnp.tanh(query() + key(h))
    weights = np.exp(np.array([float(score(h)) for h in source]))
    return jnp.asarray(sum(w / weights.sum() * h for w, h in zip(weights, source, strict=True)))


def by_definition(model, tokens, valid):
    """Sequence after sequence, position after position, in words of the papers; padding is simply not there."""
    logits = np.zeros((*tokens.shape, 11), np.float32)
    for b, row in enumerate(np.asarray(tokens)):
        source = [model.embedding(jnp.asarray(row[t])) for t in range(model.source) if valid[b, t]]
        states = []
        for layer in model.encoder:
            state, out = layer.cell.init_state(1), []
            for x in source[::-1] if layer.backward else source:
                state, y = layer.cell.step(state, x.reshape(1, -1))
                out.append(y[0])
            source = out[::-1] if layer.backward else out
            states.append(state)
        for t in range(model.source, len(row)):
            x = y = model.embedding(jnp.asarray(row[t]))
            if model.feeds:  # Bahdanau et al.: s_(t-1) asks, and the cell that makes s_t reads the glimpse
                c = glimpse(model.look, model.cells[0].hidden(states[0])[0], source)
                y = jnp.concatenate([x, c])
            for at, cell in enumerate(model.cells):
                states[at], y = cell.step(states[at], jnp.atleast_2d(y))
            s = y[0]
            if model.feeds:
                s = (jnp.concatenate([x, s, c]) @ model.join.out.kernel[...]).reshape(-1, 2).max(-1)
            elif model.look is not None:  # Luong et al.: s_t asks
                s = jnp.tanh(jnp.concatenate([glimpse(model.look, s, source), s]) @ model.join.out.kernel[...])
            logits[b, t] = s @ model.head.kernel[...] + model.head.bias[...]
    return logits


@pytest.mark.parametrize("options", ["", ":look=additive:cell=gru", ":look=dot:reads=backward", ":look=concat"])
def test_seq2seq_is_a_slow_loop(options):
    model, tokens = seq2seq(options)
    valid = jnp.arange(13)[None] < jnp.array([[13], [3], [6]])
    valid = valid | (jnp.arange(13) >= model.source)
    if model.look is not None and model.look.v is not None:
        model.look.key.bias[...] = draw(8)
    with jax.default_matmul_precision("highest"):
        fast = jax.jit(lambda tokens: model(tokens, valid=valid)[0])(tokens)
        np.testing.assert_allclose(fast, by_definition(model, tokens, valid), atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("options", ["", ":look=additive:cell=gru:reads=both", ":look=dot:reads=backward"])
def test_seq2seq_decodes_as_it_reads_the_whole(options):
    model, tokens = seq2seq(options)
    step = lambda cache, token: model.step(cache, token)[::-1]
    logits = jax.jit(lambda tokens: jax.lax.scan(step, model.init_cache(3, 13), tokens.T)[1])(tokens).swapaxes(0, 1)
    whole = jax.jit(lambda tokens: model(tokens)[0])
    np.testing.assert_allclose(logits, whole(tokens), atol=1e-5)
    assert not logits[:, :7].any() and logits[:, 7:].any()

    prompts = [list(map(int, row[:8])) for row in tokens]
    generated = generate(model, prompts, new=4, length=13)
    text = np.zeros((3, 13), np.int32)
    text[:, :12] = [prompt + new for prompt, new in zip(prompts, generated, strict=True)]
    assert (whole(jnp.asarray(text))[:, 7:11].argmax(-1) == np.asarray(generated)).all()
    best, score = beam_search(model, prompts[0], new=4, length=13, beams=3, length_penalty=0)
    text[0, 8:12] = best
    logs = jax.nn.log_softmax(whole(jnp.asarray(text))[0])
    np.testing.assert_allclose(score, sum(float(logs[7 + at, token]) for at, token in enumerate(best)), atol=1e-4)


@pytest.mark.parametrize("options", ["", ":look=additive:cell=gru:reads=both", ":look=dot:reads=backward"])
def test_seq2seq_sees_neither_the_future_nor_padding(options):
    model, tokens = seq2seq(options)
    run = jax.jit(lambda tokens, valid: model(tokens, valid=valid)[0])
    all_valid = jnp.ones(tokens.shape, bool)
    logits = run(tokens, all_valid)
    changed = run(tokens.at[:, 10].set((tokens[:, 10] + 1) % 11), all_valid)
    np.testing.assert_array_equal(changed[:, :10], logits[:, :10])
    assert (np.abs(changed[:, 10:] - logits[:, 10:]).max(-1) > 0).all()
    hidden = all_valid.at[:, 4:7].set(False).at[0, 2].set(False)
    padded = run(tokens, hidden)
    np.testing.assert_array_equal(run(jnp.where(hidden, tokens, 5), hidden), padded)
    assert np.abs(padded - logits)[:, 7:].max() > 1e-3


@pytest.mark.full
def test_seq2seq_copies_sooner_where_it_looks():
    """A vector of fixed size holds the string badly; attention finds each symbol of it (Bahdanau et al., 2014)."""

    def loss(look):
        train = {"dim": 32, "layers": 1, "batch": 32, "steps": 120, "lr": 1e-2, "seq_len": 13}
        config = edit(Config(), task="copy:symbols=4", model=f"seq2seq:cell=gru:look={look}", **train)
        task = build_task(config)
        tx = optimizer.of(config, task)
        state, metrics = init(config, task, tx), {}
        step = jax.jit(make_train_step(config, task, structure(config, task), tx))
        for at in range(120):
            state, metrics = step(state, prefetch.checked(task, "train", at))
        return float(metrics["loss"])

    assert loss("additive") < 0.5 * loss("none")


@pytest.mark.full
def test_additive_attention_asks_before_the_cell_and_feeds_it():
    """Bahdanau et al.: what s_(t-1) finds is in s_t. What is seen of the source changes the cell's state, and the state
    before the first target is what asks."""
    model, tokens = seq2seq(":look=additive", layers=1)
    states, seen = model.encode(tokens[:, :7])
    c = model.glimpse(states[0], seen, None)
    np.testing.assert_allclose(c, model.look(states[0]["h"][:, None], *seen, None)[:, 0], atol=1e-6)
    x = model.embedding(tokens[:, 7:8])
    (s, saw), state = model.fed(x, states[0], seen, None, None), states[0]
    np.testing.assert_allclose(saw[:, 0], c, atol=1e-5)
    np.testing.assert_allclose(s[:, 0], model.cells[0].step(state, jnp.concatenate([x[:, 0], c], 1))[1], atol=1e-5)
    keys, rows = seen
    assert np.abs(model.fed(x, state, (keys, 2 * rows), None, None)[0] - s).max() > 1e-2


@pytest.mark.full
@pytest.mark.parametrize("kind", ["lstm", "gru", "bag", "bytenet", "seq2seq", "seq2seq:look=additive"])
def test_no_baseline_ignores_dropout(kind):
    config = edit(Config(), task="copy", model=kind, seq_len=13, dim=16, batch=2, dropout=0.5)
    task = build_task(config)
    model, tokens = build_model(config, task), jnp.asarray(task.batch("train", 0).inputs)
    run = jax.jit(lambda key: model(tokens, key=key)[0])
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.full
@pytest.mark.parametrize(
    "words, says",
    [
        (["task=lm"], "no source and target apart: use model=lstm"),
        (["task=listops"], "no source and target apart"),
        (["task=copy", "attention=linear"], "seq2seq has no attention: leave out attention=linear"),
        (["task=copy", "depth=macaron"], "seq2seq has no depth"),
        (["task=copy", "model=seq2seq:look=far"], "look"),
    ],
)
def test_seq2seq_refuses_what_it_does_not_have(words, says, capsys, tmp_path):
    assert main(["train", f"runs={tmp_path}", "model=seq2seq", "seq_len=64", *words]) == 2
    assert says in capsys.readouterr().err


def test_seq2seq_decodes_only_beyond_its_source():
    with pytest.raises(ValueError, match="the source takes 7 tokens"):
        seq2seq()[0].init_cache(2, 7)
