"""R-Transformer: its recurrent sub-layers against a cell that reads every window by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import halves, layer, model_of

from xformers_lab.depth import Context
from xformers_lab.depth.local_rnn import Windowed
from xformers_lab.errors import UsageError
from xformers_lab.nn.size import Size


def window_by_window(rnn: Windowed, x, valid, documents):
    """Each window of zeros and states read from its oldest position on, one sequence and one position at a time."""
    rows = []
    for b in range(len(x)):
        for t in range(x.shape[1]):
            state = rnn.cell.init_state(1)
            for s in range(t - rnn.before, t + 1):
                seen = s >= 0 and bool(valid[b, s]) and bool(documents[b, s] == documents[b, t])
                state = rnn.cell.advance(rnn.cell.input(x[b, s][None] if seen else jnp.zeros((1, x.shape[2]))), state)
            rows.append(rnn.cell.hidden(state)[0])
    return jnp.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_windows_are_read_one_by_one(cell):
    """With padding between, and packed documents."""
    rnn = Windowed(Size(dim=6), cell, 3, rngs=nnx.Rngs(0))
    rnn.cell.input.bias[...] = 0.3 * jax.random.normal(jax.random.key(1), rnn.cell.input.bias.shape)
    x = jax.random.normal(jax.random.key(0), (2, 7, 6))
    valid = jnp.arange(7)[None] != jnp.array([[2], [5]])
    documents = (jnp.arange(7)[None] >= jnp.array([[7], [4]])).astype(jnp.int32)
    out = rnn(x, valid=valid, documents=documents)
    np.testing.assert_allclose(out, window_by_window(rnn, x, valid, documents), atol=1e-6)
    plain = rnn(x)
    np.testing.assert_allclose(plain, window_by_window(rnn, x, jnp.ones((2, 7), bool), jnp.zeros((2, 7))), atol=1e-6)
    assert float(jnp.abs(plain - out).max()) > 1e-3
    tail, parts = rnn.init_tail(2), []
    for part in (x[:, :1], x[:, 1:5], x[:, 5:]):
        y, tail = rnn.step_several(tail, part)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), plain, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("kind, task", [("decoder", "copy"), ("encoder", "listops")])
def test_it_is_its_equation(kind, task):
    model, tokens = model_of("local_rnn:window=3:rnns=2", model=kind, task=task, layers=2)
    context, x = Context(model.position), model.embedding(tokens[:, :12])
    expected, everything = x, jnp.ones(x.shape[:2], bool)
    for number in range(2):
        reading = layer(model.stack.periods[0], number)
        for rnn, norm in zip(reading.parts, reading.norms, strict=True):
            expected = expected + window_by_window(rnn, norm.norm(expected), everything, everything)
        attend, feed = halves(reading.block, context)
        expected = expected + attend(expected)
        expected = expected + feed(expected)
    out, aux = model.stack(x, context)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert aux.scalars["computation"] == 2


@pytest.mark.parametrize("depth, message", [
    ("local_rnn:window=1", "at least 2 positions"), ("local_rnn:rnns=0", "depth=fixed"),
])  # fmt: skip
def test_bad_options(depth, message):
    with pytest.raises(UsageError, match=message):
        model_of(depth)


@pytest.mark.full
def test_a_source_is_read_too():
    """Both stacks of an encoder-decoder have recurrent sub-layers."""
    model, tokens = model_of("local_rnn:window=3", model="encoder_decoder", layers=1)
    assert model(tokens)[0].shape[:2] == tokens.shape
    assert model.encoder.periods[0].parts and model.stack.periods[0].parts
