"""Depths that read a sequence part by part, each against a slow statement of its paper's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import gradients, halves, layer, model_of

from xformers_lab.config import Config, decisive, edit, identity
from xformers_lab.depth import Context

pytestmark = pytest.mark.full

# ---- recurrent memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, task", [("decoder", "copy"), ("encoder", "listops")])
def test_recurrent_memory_is_segments_one_by_one(kind, task):
    model, tokens = model_of("recurrent_memory:segment=4:tokens=2", model=kind, task=task, layers=2)
    (stacked,), context = model.stack.layers.periods, Context(model.position)
    x = model.embedding(tokens[:, :12])
    memory, outputs = jnp.broadcast_to(model.stack.table[...], (len(x), 2, 16)), []
    for first in range(0, 12, 4):
        rows = [memory, x[:, first : first + 4], memory]
        y = jnp.concatenate(rows if kind == "decoder" else rows[:2], 1)
        for number in range(2):
            attend, feed = halves(layer(stacked, number), context)
            y = y + attend(y)
            y = y + feed(y)
        memory = y[:, -2:] if kind == "decoder" else y[:, :2]
        outputs.append(y[:, 2:6])
    out, aux = model.stack(x, context)
    np.testing.assert_allclose(out, jnp.concatenate(outputs, 1), atol=1e-5)
    assert aux.scalars["computation"] == 2 * (4 + (4 if kind == "decoder" else 2)) / 4


def test_recurrent_memory_learns_through_segments():
    """The last segment depends on the first by memory alone, and its gradient reaches it."""
    model, tokens = model_of("recurrent_memory:segment=4:tokens=2", layers=2)
    x, context = model.embedding(tokens), Context(model.position)
    graph, variables = nnx.split(model.stack)
    last = lambda x: nnx.merge(graph, variables)(x, context)[0][:, -1].sum()
    assert (np.abs(jax.jit(jax.grad(last))(x)).max((0, 2)) > 0).all()
    of_params = gradients(model, lambda model: model.stack(x, context)[0][:, -1].sum())[1]
    assert np.abs(of_params["stack"]["table"]).max() > 0


# ---- feedback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, segment, own, window", [
    ("", 1, False, 11), ("segment=5", 5, True, 10), ("segment=4:own=false:window=3", 4, False, 3),
])  # fmt: skip
def test_feedback_is_its_equation(options, segment, own, window):
    """One position after the other, each layer looking at what its segment may see, with positions of the text."""
    model, tokens = model_of(f"feedback:{options}".rstrip(":"), layers=2, position="rope")
    stack, (stacked,) = model.stack, model.stack.layers.periods
    stack.layers.mix[...] = jnp.array([0.5, -0.3, 0.9])
    share, blocks = jax.nn.softmax(stack.layers.mix[...]), [layer(stacked, number).block for number in range(2)]
    heads = lambda y: y.reshape(3, 2, 8)
    rotated = lambda y, t: model.position.rotate(heads(y)[:, None], jnp.array([t]))[:, 0]
    keys = lambda y, t: (rotated(stack.key(y), t), heads(stack.value(y)))
    x = model.embedding(tokens)

    def slow(x):
        memory, inside, states = [], [[], []], []
        for t in range(12):
            start = t // segment * segment
            h, mix = x[:, t], share[0] * x[:, t]
            for number, block in enumerate(blocks):
                y = block.attention_norm.norm(h)
                inside[number].append(keys(y, t))
                seen = memory[max(0, start - window) : start] + (inside[number][start:] if own else [])
                if seen:
                    k, v = (jnp.stack(rows, 1) for rows in zip(*seen, strict=True))
                    scores = jnp.einsum("bnh,bsnh->bns", rotated(block.attention.query(y), t), k) / 8**0.5
                    looked = jnp.einsum("bns,bsnh->bnh", jax.nn.softmax(scores), v)
                    h = h + block.attention.out(looked.reshape(3, 16))
                h = h + block.ffn(block.ffn_norm.norm(h)[:, None])[0][:, 0]
                mix = mix + share[number + 1] * h
            memory.append(keys(blocks[0].attention_norm.norm(mix), t))
            states.append(h)
        return jnp.stack(states, 1)

    graph, variables = nnx.split(stack)
    fast = lambda x: nnx.merge(graph, variables)(x, Context(model.position))
    out, aux = jax.jit(fast)(x)
    np.testing.assert_allclose(out, jax.jit(slow)(x), atol=1e-5)
    assert aux.scalars["computation"] == 2


def test_feedback_learns_through_all_steps():
    """With a window of one the last position hears of the first through every memory between."""
    model, tokens = model_of("feedback:window=1", layers=1, seq_len=8)
    x, context = model.embedding(tokens), Context(model.position)
    graph, variables = nnx.split(model.stack)
    last = lambda x: nnx.merge(graph, variables)(x, context)[0][:, -1].sum()
    assert (np.abs(jax.jit(jax.grad(last))(x)).max((0, 2)) > 0).all()
    of_params = gradients(model, lambda model: (model(tokens, key=jax.random.key(0))[0] ** 2).mean())[1]
    assert all(np.abs(leaf).max() > 0 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params["stack"]))


def test_feedback_keeps_less_than_a_memory_for_every_step():
    """Between the two passes of a gradient: the memory at the root of the steps, not at each."""
    model, tokens = model_of("feedback:window=32", layers=1, seq_len=64)
    graph, params, rest = nnx.split(model.stack, nnx.Param, ...)
    call = lambda params, x: nnx.merge(graph, params, rest)(x, Context(model.position))[0]
    held = jax.tree.leaves(jax.vjp(call, params, model.embedding(tokens[:1]))[1])
    assert max(leaf.size for leaf in held) <= 10 * 32 * 16


# ---- memformer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, task", [("decoder", "copy"), ("encoder", "listops")])
def test_memformer_is_its_equation(kind, task):
    """Slots, one head and one segment after the other; the last segment is not full."""
    model, tokens = model_of("memformer:segment=5:slots=3:temperature=0.5", model=kind, task=task, layers=2)
    (stacked,), writer, context = model.stack.layers.periods, model.stack.writer, Context(model.position)
    x, length = model.embedding(tokens[:1, :12]), lambda y: jnp.sqrt((y**2).sum())
    writer.table[...] = 0.3 * jax.random.normal(jax.random.key(0), (3, 16))
    forget = writer.table[...]
    memory = jnp.stack([b / length(b) for b in forget])
    outputs = []
    for h in in_parts(x, 5):
        for number in range(2):
            reader = layer(stacked, number)
            attend, feed = halves(reader.block, context)
            h = h + attend(h)
            read, y = reader.read, reader.norm.norm(h)
            heads = lambda y: y.reshape(-1, 2, 8)
            scores = jnp.einsum("tnh,mnh->ntm", heads(read.query(y)), heads(read.key(memory))) / 8**0.5
            mixed = jnp.einsum("ntm,mnh->tnh", jax.nn.softmax(scores), heads(read.value(memory)))
            h = h + read.out(mixed.reshape(1, -1, 16))
            h = h + feed(h)
        outputs.append(h)
        y, new = writer.norm(h[0]), []
        for slot, b in zip(memory, forget, strict=True):
            parts = []
            for n in (slice(0, 8), slice(8, 16)):
                of = lambda linear, y, n=n: linear(y)[..., n]
                q, k = of(writer.query, slot), jnp.concatenate([of(writer.key, slot)[None], of(writer.key, y)])
                share = jax.nn.softmax(k @ q / 8**0.5 / 0.5)
                parts.append(share @ jnp.concatenate([slot[None, n], of(writer.value, y)]))
            new.append((jnp.concatenate(parts) + b) / length(jnp.concatenate(parts) + b))
        memory = jnp.stack(new)
    out, aux = model.stack(x, context)
    np.testing.assert_allclose(out, jnp.concatenate(outputs, 1), atol=1e-5)
    assert aux.scalars["computation"] == 2


def test_memformer_learns_through_segments_and_keeps_their_memory_alone():
    """The last segment depends on the first by memory alone; of a segment no activations wait for the backward pass."""
    model, tokens = model_of("memformer:segment=3:slots=2", layers=2)
    x, context = model.embedding(tokens), Context(model.position)
    graph, params, rest = nnx.split(model.stack, nnx.Param, ...)
    call = lambda params, x: nnx.merge(graph, params, rest)(x, context)[0]
    _, back = jax.vjp(call, params, x)
    held = sum(leaf.size for leaf in jax.tree.leaves(back))
    of_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Input, output, and the memories (segments, B, slots, D).
    assert held - of_params <= 3 * x.size + 4 * 3 * 2 * 16 + 64
    of_params, of_x = back(jnp.zeros_like(x).at[:, -1].set(1.0))
    assert (np.abs(of_x).max((0, 2)) > 0).all()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params["writer"]))


# ---- segments within a sequence ------------------------------------------------------------------------------------


def in_parts(x, size: int) -> list:
    return [x[:, first : first + size] for first in range(0, x.shape[1], size)]


def through(block, x, context):
    attend, feed = halves(block, context)
    x = x + attend(x)
    return x + feed(x)


@pytest.mark.parametrize("kind, task", [("decoder", "copy"), ("encoder", "listops")])
def test_hierarchical_is_its_equation(kind, task):
    """At a length that segments do not divide."""
    model, tokens = model_of("hierarchical:segment=5:low=1", model=kind, task=task, layers=3)
    context, x = Context(model.position), model.embedding(tokens[:, :12])
    (low,), (high,) = model.stack.low.periods, model.stack.high.periods
    parts = [through(layer(low, 0), part, context) for part in in_parts(x, 5)]
    y = jnp.stack([part.mean(1) for part in parts], 1)
    for number in range(2):
        y = through(layer(high, number), y, context)
    y = jnp.concatenate([jnp.zeros_like(y[:, :1]), y[:, :-1]], 1) if kind == "decoder" else y
    expected = jnp.concatenate([part + y[:, g : g + 1] for g, part in enumerate(parts)], 1)
    out, aux = model.stack(x, context)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(aux.scalars["computation"], 1 + 2 / 5, rtol=1e-6)


def attended(pool, part):
    """One state of the tokens (B, k, D), a token at a time."""
    scores = jnp.stack([jnp.tanh(pool.hidden(part[:, t])) @ pool.asks[...] for t in range(part.shape[1])], 1)
    weights = jnp.exp(scores) / jnp.exp(scores).sum(1, keepdims=True)
    return sum(weights[:, t, None] * part[:, t] for t in range(part.shape[1]))


@pytest.mark.parametrize("kind, task", [("decoder", "copy"), ("encoder", "listops")])
@pytest.mark.parametrize("back", ["token", "add"])
def test_hi_transformer_is_its_equation(kind, task, back):
    """Segments again, with the state of each, at a length that segments do not divide."""
    depth = f"hierarchical:segment=5:low=1:top=2:back={back}:pool=attention:numbered=true"
    model, tokens = model_of(depth, model=kind, task=task, layers=4)
    stack, context, x = model.stack, Context(model.position), model.embedding(tokens[:, :12])
    stack.pool.asks[...] = 3 * stack.pool.asks[...]
    parts = [through(layer(stack.low.periods[0], 0), part, context) for part in in_parts(x, 5)]
    y = jnp.stack([attended(stack.pool, part) for part in parts], 1) + stack.table[...] * (0.5**0.5 / 0.02)
    y = through(layer(stack.high.periods[0], 0), y, context)
    y = jnp.concatenate([jnp.zeros_like(y[:, :1]), y[:, :-1]], 1) if kind == "decoder" else y
    outputs = []
    for g, part in enumerate(parts):
        rows = part + y[:, g : g + 1] if back == "add" else jnp.concatenate([y[:, g : g + 1], part], 1)
        for number in range(2):
            rows = through(layer(stack.top.periods[0], number), rows, context)
        outputs.append(rows[:, -part.shape[1] :])
    out, aux = stack(x, context)
    np.testing.assert_allclose(out, jnp.concatenate(outputs, 1), atol=1e-5)
    np.testing.assert_allclose(aux.scalars["computation"], 1 + 1 / 5 + 2, rtol=1e-6)


def test_a_hierarchy_without_its_options_is_what_it_was():
    plain, named = (edit(Config(), depth=f"hierarchical{words}") for words in ("", ":top=0:back=add:pool=mean"))
    assert identity(plain) == identity(named) != identity(edit(Config(), depth="hierarchical:pool=attention"))
    assert not {"top", "back", "pool", "numbered"} & set(decisive(plain)["depth"])


@pytest.mark.parametrize("kind, task", [("decoder", "copy"), ("encoder", "listops")])
def test_tnt_is_its_equation(kind, task):
    model, tokens = model_of("tnt:segment=5", model=kind, task=task, layers=2)
    context, x = Context(model.position), model.embedding(tokens[:, :12])
    (stacked,) = model.stack.layers.periods
    parts, z = in_parts(x, 5), jnp.zeros((len(x), 3, 16))
    for number in range(2):
        nested = layer(stacked, number)
        parts = [through(nested.inner, part, context) for part in parts]
        filled = [jnp.pad(part, ((0, 0), (0, 5 - part.shape[1]), (0, 0))).reshape(len(x), -1) for part in parts]
        z = through(nested.outer, z + nested.join(jnp.stack(filled, 1)), context)
    z = jnp.concatenate([jnp.zeros_like(z[:, :1]), z[:, :-1]], 1) if kind == "decoder" else z
    expected = jnp.concatenate([part + z[:, g : g + 1] for g, part in enumerate(parts)], 1)
    out, aux = model.stack(x, context)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(aux.scalars["computation"], 2 * (1 + 1 / 5), rtol=1e-6)
