"""The Evolved Transformer's cells against convolutions that are written out position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import halves, layer, model_of

from xformers_lab.depth import Context
from xformers_lab.depth.evolved import DecoderBranches, EncoderBranches
from xformers_lab.nn.size import Size

relu = lambda y: np.maximum(y, 0)


def linear(layer, y):
    return y @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def normed(norm, y):
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    return y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def separable(conv, rows, seen, first: int):
    """conv of rows (T, C): position t sees t + first, t + first + 1 and so on, where `seen(t, s)`."""
    weights, out = np.asarray(conv.along.weights[...]), []
    for t in range(len(rows)):
        total = np.zeros(rows.shape[1])
        for place, weight in enumerate(weights):
            s = t + first + place
            if 0 <= s < len(rows) and seen(t, s):
                total += weight * rows[s]
        out.append(linear(conv.across, total))
    return np.stack(out)


def of_encoder(part, rows, seen):
    D, out = rows.shape[1], []
    for t in range(len(rows)):
        there = [rows[s] if 0 <= s < len(rows) and seen(t, s) else np.zeros(D) for s in (t - 1, t, t + 1)]
        own = rows[t] if seen(t, t) else np.zeros(D)
        total = relu(linear(part.wide, own))
        total[: D // 2] += relu(linear(part.near, np.concatenate(there)))
        out.append(total)
    y = separable(part.last, normed(part.norm, np.stack(out)), seen, -4)
    return np.pad(y, ((0, 0), (0, D - D // 2)))


def of_decoder(part, rows, seen):
    total = relu(separable(part.far, rows, seen, -10))
    total[:, : rows.shape[1] // 2] += separable(part.near, rows, seen, -6)
    return separable(part.last, normed(part.norm, total), seen, -6)


BRANCHES = {"encoder": (EncoderBranches, of_encoder), "decoder": (DecoderBranches, of_decoder)}


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_are_their_convolutions(kind):
    """With padding between, and packed documents."""
    make, slow = BRANCHES[kind]
    part = make(Size(dim=6), rngs=nnx.Rngs(0))
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 14, 6)), np.float64)
    valid, documents = np.arange(14)[None] != np.array([[2], [5]]), (np.arange(14)[None] >= np.array([[14], [4]])) * 1
    expected = []
    for row, real, document in zip(x, valid, documents, strict=True):
        seen = lambda t, s, real=real, document=document: bool(real[s] and document[s] == document[t])
        expected.append(slow(part, row, seen))
    call = jax.jit(lambda *rows: part(rows[0], valid=rows[1], documents=rows[2]))
    np.testing.assert_allclose(call(jnp.asarray(x, jnp.float32), valid, documents), np.stack(expected), atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind, task", [("decoder", "copy"), ("encoder", "listops")])
def test_a_cell_is_its_equation(kind, task):
    model, tokens = model_of("evolved", model=kind, task=task, layers=2)
    context, x = Context(model.position), model.embedding(tokens[:, :12])
    slow, everything = BRANCHES[kind][1], lambda t, s: True
    rows = lambda part, y: np.stack([slow(part, row, everything) for row in np.asarray(y)])
    expected = x
    for number in range(2):
        cell = layer(model.stack.periods[0], number)
        if kind == "decoder":
            expected = expected + halves(cell.first, context)[0](expected)
            cell = cell.rest
        else:
            y, gates = cell.norms[0].norm(expected), cell.parts[0]
            expected = expected + gates.value(y) * jax.nn.sigmoid(gates.gate(y))
        expected = expected + rows(cell.parts[-1], cell.norms[-1].norm(expected))
        attend, feed = halves(cell.block, context)
        expected = expected + attend(expected)
        expected = expected + feed(expected)
    out, aux = jax.jit(lambda x: model.stack(x, context))(x)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert aux.scalars["computation"] == 2


@pytest.mark.full
def test_a_decoder_looks_at_its_source_twice():
    """First beside its attention: both of the same states."""
    model, tokens = model_of("evolved", model="encoder_decoder", layers=1)
    first = layer(model.stack.periods[0], 0).first
    source, x = model.encode(tokens[:, : model.source])[0], model.embedding(tokens[:, model.source :])
    context = Context(model.position, source=source)
    y = first.attention_norm.norm(x)
    expected = x + halves(first, context)[0](x) + first.cross(y, source, causal=False)[0]
    np.testing.assert_allclose(first(x, {}, context)[0], expected, atol=1e-5)
    graph, variables = nnx.split(model)
    grads = jax.jit(jax.grad(lambda v: (nnx.merge(graph, v)(tokens)[0] ** 2).mean()))(variables)
    of_cell = nnx.to_pure_dict(grads)["stack"]["periods"][0]
    assert all(np.abs(leaf).max() > 0 for part in ("first", "rest") for leaf in jax.tree.leaves(of_cell[part]))
