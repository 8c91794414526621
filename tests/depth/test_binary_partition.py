"""BP-Transformer with states of spans, against its graph walked edge by edge."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import SMALL, layer, model_of

from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.depth.binary_partition import spans_of, tokens_of
from xformers_lab.errors import UsageError
from xformers_lab.model import check_config


def neighbours(t: int, T: int, nodes: int, causal: bool) -> list[tuple[int, int, int]]:
    """(size, index, row of the table) of what token t sees: the paper's walk away from it, a pointer on each side."""
    seen = [(0, t, 0)]
    counts = [T]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // 2))
    for side, way in enumerate((-1,) if causal else (-1, 1)):
        pointer, half, found = t + way, False, []
        for size, count in enumerate(counts):
            for step in range(nodes):
                if half and step == 0:  # the half of this span that the size below has not covered
                    if 0 <= pointer < count:
                        found.append((size - 1, 2 * pointer + (way > 0)))
                elif 0 <= pointer < count:
                    found.append((size, pointer))
                pointer += way
            half = pointer % 2 == (1 if way > 0 else 0)
            pointer >>= 1
        numbers: dict[int, int] = {}
        for size, index in found:
            if index < -(-T // 2**size):
                number = numbers.setdefault(size, 0)
                numbers[size] += 1
                seen.append((size, index, 1 + (2 * size + side) * (nodes + 1) + number))
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, nodes", [(12, 1), (29, 2)])
def test_the_walk_tiles_all_positions(T, nodes, causal):
    for t in range(T):
        held = [
            s
            for size, index, _ in neighbours(t, T, nodes, causal)
            for s in range(index << size, min(T, (index + 1) << size))
        ]
        assert sorted(held) == list(range(t + 1 if causal else T))


def test_rows_say_how_many_tokens_there_are():
    for T in range(1, 70):
        assert tokens_of(T + sum(spans_of(T, 2, True)), 2, True) == T


def softmax(scores):
    e = np.exp(np.array(scores) - max(scores))
    return e / e.sum()


@pytest.mark.full
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kind, task", [("decoder", "copy"), ("encoder", "listops")])
def test_layers_walk_along_the_tree(kind, task, nodes):
    """Two layers, one node of one head at a time, with padding in an encoder."""
    changes = {"model": kind, "task": task, "layers": 2, "position": "none", "seq_len": 24, "kv_heads": 1}
    model, tokens = model_of(f"binary_partition:nodes={nodes}", **changes)
    T, H = 13, 8
    x, causal = np.asarray(model.embedding(tokens[:1, :T]), float)[0], kind == "decoder"
    valid = np.ones(T, bool) if causal else np.arange(T) % 5 != 3
    sizes = math.ceil(math.log2(T)) + 1
    states = [x] + [np.zeros((-(-T // 2**size), 16)) for size in range(1, sizes)]
    for number in range(2):
        block = layer(model.stack.periods[0], number).block
        tree = block.attention
        tree.table[...] = jax.random.normal(jax.random.key(number), tree.table.shape)
        of_stack = model.stack.periods[0].block.attention
        of_stack.table[...] = of_stack.table[...].at[number].set(tree.table[...])
        rows = [np.asarray(block.attention_norm.norm(jnp.asarray(part, jnp.float32)), float) for part in states]
        q, k, v = ([np.asarray(getattr(tree.full, name)(y)) for y in rows] for name in ("query", "key", "value"))
        table, new = np.asarray(tree.table[...], float), []
        for size, part in enumerate(states):
            outs = []
            for index in range(len(part)):
                if size:
                    edges = [(0, s, None) for s in range(index << size, min(T, (index + 1) << size))]
                else:
                    edges = neighbours(index, T, nodes, causal)
                held = lambda size, index: valid[index << size : (index + 1) << size].any()
                edges = [edge for edge in edges if held(*edge[:2])]
                heads = []
                for head in range(2):
                    own = q[size][index][head * H : (head + 1) * H]
                    keys = [k[s][i] + (0 if a is None else table[a]) for s, i, a in edges]
                    p = softmax([own @ key / H**0.5 for key in keys]) if edges else []
                    heads.append(sum((w * v[s][i] for w, (s, i, _) in zip(p, edges, strict=True)), np.zeros(H)))
                outs.append(np.concatenate(heads))
            part = part + np.asarray(tree.full.out(jnp.asarray(np.stack(outs), jnp.float32)))
            new.append(part + np.asarray(block.ffn(block.ffn_norm.norm(jnp.asarray(part, jnp.float32))[None])[0][0]))
        states = new
    context = Context(model.position, None if causal else jnp.asarray(valid)[None])
    out, aux = jax.jit(lambda x: model.stack(x, context))(jnp.asarray(x, jnp.float32)[None])
    np.testing.assert_allclose(np.asarray(out)[0][valid], states[0][valid], atol=2e-5)
    rows = T + sum(spans_of(T, nodes, causal))
    np.testing.assert_allclose(aux.scalars["computation"], 2 * rows / T, rtol=1e-6)


@pytest.mark.full
def test_spans_learn_what_is_far_away():
    """Of a text of 64, two layers: the first token reaches the last by the state of a span."""
    model, tokens = model_of("binary_partition:nodes=1", layers=2, seq_len=64, position="none")
    graph, variables = nnx.split(model.stack)
    x, context = model.embedding(tokens[:, :64]), Context(model.position)
    last = lambda x: nnx.merge(graph, variables)(x, context)[0][:, -1].sum()
    assert (np.abs(jax.jit(jax.grad(last))(x)).max((0, 2)) > 0).all()


@pytest.mark.parametrize("changes, message", [
    ({"depth": "binary_partition:nodes=0"}, "nodes must be at least 1"),
    ({"position": "rope"}, "position=none, sinusoidal or learned"),
    ({"position": "alibi"}, "position=none, sinusoidal or learned"),
    ({"attention": "linear"}, "use attention=full"),
    ({"conv": 3}, "conv goes by positions"),
    ({"model": "encoder_decoder"}, "no place for cross-attention"),
    ({"ffn": "hash"}, "looks at the tokens"),
])  # fmt: skip
def test_what_it_has_no_place_for(changes, message):
    with pytest.raises(UsageError, match=message):
        check_config(edit(Config(), **(SMALL | {"depth": "binary_partition", "position": "none"} | changes)))
