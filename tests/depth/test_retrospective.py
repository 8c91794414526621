"""ERNIE-Doc: two passes over a text, each layer behind what it gave itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import SMALL, layer, model_of

from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.errors import UsageError
from xformers_lab.model import check_config

ENCODER = {"model": "encoder", "task": "listops", "seq_len": 24}


@pytest.mark.full
@pytest.mark.parametrize("skims", [0, 1])
def test_it_is_its_equation(skims):
    """One segment after the other, at a length that they do not divide."""
    model, tokens = model_of(f"retrospective:segment=5:length=3:skims={skims}", layers=2, **ENCODER)
    x, context = model.embedding(tokens[:, :12]), Context(model.position)
    blocks = [layer(model.stack.layers.periods[0], number) for number in range(2)]
    gave, outputs = [jnp.zeros((3, 0, 16))] * 2, []
    for _ in range(skims + 1):
        outputs = []
        for at in range(0, 12, 5):
            h = x[:, at : at + 5]
            for number, block in enumerate(blocks):
                source = block.attention_norm.norm(jnp.concatenate([gave[number][:, -3:], h], 1))
                looked = block.attention(source[:, -h.shape[1] :], source, position=model.position)[0]
                h = h + looked
                h = h + block.ffn(block.ffn_norm.norm(h))[0]
                gave[number] = jnp.concatenate([gave[number], h], 1)
            outputs.append(h)
    out, aux = jax.jit(lambda x: model.stack(x, context))(x)
    np.testing.assert_allclose(out, jnp.concatenate(outputs, 1), atol=1e-5)
    assert aux.scalars["computation"] == 2 * (skims + 1)


@pytest.mark.full
def test_the_first_segment_knows_of_the_last_by_the_second_pass():
    """One layer, and padding behind the text, which is not remembered."""
    valid = jnp.arange(12)[None] < jnp.array([[12], [7], [9]])
    for skims, knows in ((0, False), (1, True)):
        model, tokens = model_of(f"retrospective:segment=4:length=2:skims={skims}", layers=1, **ENCODER)
        graph, variables = nnx.split(model.stack)
        context = Context(model.position, valid)
        first = jax.jit(lambda x, v=variables, g=graph, c=context: nnx.merge(g, v)(x, c)[0][:, :2])
        x = model.embedding(tokens[:, :12])
        for row, last in enumerate((11, 6, 8)):
            gap = np.abs(first(x.at[row, last, 0].add(1.0)) - first(x))[row].max()
            assert (gap > 1e-5) == knows


@pytest.mark.parametrize("changes, message", [
    ({"model": "decoder", "task": "copy"}, "use model=encoder"),
    ({"depth": "retrospective:segment=99"}, "from 1 to seq_len"),
    ({"depth": "retrospective:skims=-1"}, "no pass or more"),
    ({"attention": "realformer"}, "hands something to the layer above"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        check_config(edit(Config(), **(SMALL | ENCODER | {"depth": "retrospective"} | changes)))
