"""Shared layers that a router gives each token as often as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import model_of

from xformers_lab.depth import Context
from xformers_lab.errors import UsageError


def moved(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, structure.unflatten(leaves), rest)


def run(depth, x, context, key=None):
    graph, variables = nnx.split(depth)
    return jax.jit(lambda variables, x: nnx.merge(graph, variables)(x, context, key=key))(variables, x)


def layers(part, x, context, valid, count: int):
    """The layers of a part, with what is outside hidden from them as padding is."""
    graph, variables = nnx.split(part.periods[0])
    for number in range(count):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, number=number: leaf[number], variables))
        x = block(x, {}, Context(context.position, jnp.asarray(valid)))[0]
    return x


def by_hand(depth, x, context, valid, best: bool):
    """The definition, with every token in its place -> the states, and how often each passed the shared layers."""
    x = begun = layers(depth.first, x, context, valid, 1)
    inside, passed = np.array(valid), np.zeros(valid.shape)
    logits = x @ depth.router.kernel[...]
    number, g = np.asarray(logits.argmax(-1)) + 1, np.asarray(jax.nn.softmax(logits).max(-1))
    for r in range(1, 4):
        score = np.asarray(x @ depth.router.kernel[...])[..., r - 1]
        if depth.routing == "token":
            inside = inside & (number >= r)
        elif best:
            for row, known in enumerate(valid.sum(1)):
                order = np.argsort(-np.where(inside[row], score[row], -np.inf), kind="stable")
                chosen = order[: int(np.ceil(known * (4 - r) / 3 - 1e-9))]
                inside[row] = inside[row] & np.isin(np.arange(valid.shape[1]), chosen)
        else:
            inside = inside & (score > 0)
        y = layers(depth.core, x, context, inside, 2)
        if depth.routing == "token":
            new = jnp.where((number == r)[..., None], g[..., None] * y + begun, y)
        else:
            new = x + 0.1 * jax.nn.sigmoid(score)[..., None] * y
        x, passed = jnp.where(inside[..., None], new, x), passed + inside
    return layers(depth.last, x, context, valid, 1), passed


@pytest.mark.full
@pytest.mark.parametrize("routing", ["expert", "token"])
@pytest.mark.parametrize("training", [True, False])
def test_recursions_are_the_definition(routing, training):
    """Of padded sequences whose tokens part; gathered, as in place."""
    model = moved(model_of(f"mixture_of_recursions:routing={routing}", position="rope")[0])
    valid = np.arange(12)[None] < np.array([12, 7, 3])[:, None]
    x, context = jax.random.normal(jax.random.key(1), (3, 12, 16)), Context(model.position, jnp.asarray(valid))
    out, aux = run(model.stack, x, context, jax.random.key(0) if training else None)
    expected, passed = by_hand(model.stack, x, context, valid, training)
    np.testing.assert_allclose(jnp.where(valid[..., None], out - expected, 0), 0, atol=2e-4)
    np.testing.assert_array_equal(np.asarray(aux.tokens["computation"])[valid], (2 + 2 * passed)[valid])
    assert len(np.unique(passed[valid])) > 1
    assert ("router" in aux.losses) == training


@pytest.mark.full
@pytest.mark.parametrize("routing, looks_ahead", [("expert", True), ("token", False)])
def test_what_is_causal(routing, looks_ahead):
    """Evaluation is; training is where a token decides on its own."""
    model = moved(model_of(f"mixture_of_recursions:routing={routing}", position="rope")[0])
    x, context = jax.random.normal(jax.random.key(1), (3, 12, 16)), Context(model.position)
    other = x.at[:, -3:].set(-x[:, -3:])
    for key in (None, jax.random.key(0)):
        differs = (run(model.stack, x, context, key)[0] - run(model.stack, other, context, key)[0])[:, :-3]
        assert (float(jnp.abs(differs).max()) > 1e-3) == (looks_ahead and key is not None)


def test_the_losses_of_routers():
    """Balance is 1 where all is even and R where all choose one number; the auxiliary loss is a cross-entropy."""
    depth = model_of("mixture_of_recursions:routing=token")[0].stack
    depth.router.kernel[...] = jnp.eye(16)[:, :3] * 50
    even, one = jnp.eye(16)[jnp.arange(12) % 3][None], jnp.eye(16)[jnp.zeros(12, int)][None]
    np.testing.assert_allclose(depth.balance(even, depth.chosen(even)[1], None), 1, rtol=1e-5)
    np.testing.assert_allclose(depth.balance(one, depth.chosen(one)[1], None), 3, rtol=1e-5)
    model = moved(model_of("mixture_of_recursions:weight=1:recursions=2")[0])
    x, context = jax.random.normal(jax.random.key(1), (2, 6, 16)), Context(model.position)
    aux = run(model.stack, x, context, jax.random.key(0))[1]
    first = model.stack.first.run(x, {}, context)[0]
    s = model.stack.score(first, 0)
    y = model.stack.core.run(first, {}, context)[0]
    then = model.stack.score(first + 0.1 * jax.nn.sigmoid(s)[..., None] * y, 1)
    chosen = jnp.argsort(jnp.argsort(-then, 1), 1) < 3
    p = jax.nn.sigmoid(then)
    expected = -jnp.log(jax.nn.sigmoid(s)).mean() - jnp.log(jnp.where(chosen, p, 1 - p)).mean()
    np.testing.assert_allclose(aux.losses["router"], expected, rtol=1e-4)


@pytest.mark.parametrize("changes, message", [
    ({"layers": 2}, "at least 3 layers"), ({"position": "alibi"}, "adds scores by the place"),
    ({"depth": "mixture_of_recursions:recursions=1"}, "at least 2"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises((UsageError, ValueError), match=message):
        model, tokens = model_of(**({"depth": "mixture_of_recursions"} | changes))
        model(tokens)
