"""A mechanism knows which layer of a stack it is in, whatever builds the stack."""

import jax
import numpy as np
import pytest
from decoded import agree, model_of
from flax import nnx

from xformers_lab import spec
from xformers_lab.nn.layer_number import LayerNumber, moved


def numbers(**changes) -> list[int]:
    """Of all layers of a model, in order of size."""
    model = model_of("differential:lambda_init=depth", kv_heads=None, **changes)[0]
    found = [np.ravel(x[...]) for _, x in nnx.iter_graph(model) if isinstance(x, LayerNumber)]
    return sorted(np.concatenate(found).tolist())


@pytest.mark.parametrize("changes", [
    {}, {"depth": "transparent"}, {"depth": "reversible"}, {"depth": "layerdrop"},
    {"depth": "hourglass:factor=2"}, {"depth": "hierarchical:segment=5"}, {"depth": "sandwich_order"},
], ids=str)  # fmt: skip
def test_layers_are_counted_from_the_first_on(changes):
    assert set(numbers(layers=4, **changes)) == {0, 1, 2, 3}


def test_a_cycle_counts_its_own_layers_among_all():
    model = model_of("full+differential:lambda_init=depth", layers=5)[0]
    found = [np.ravel(x[...]) for _, x in nnx.iter_graph(model) if isinstance(x, LayerNumber)]
    np.testing.assert_array_equal(np.concatenate(found), [1, 3])


def test_layers_that_are_used_again_keep_their_number():
    assert numbers(layers=3, depth="universal") == [0]


@pytest.mark.parametrize("layer", [0, 3, 17])
def test_the_schedule_of_differential_is_that_of_its_paper(layer):
    first = 0.8 - 0.6 * np.exp(-0.3 * layer)
    build = lambda choice: spec.build("attention", f"differential:lambda_init={choice}", length=9, dim=16, heads=2)
    by_depth, fixed = build("depth"), build(float(first))
    moved(by_depth, layer)
    x = jax.random.normal(jax.random.key(0), (1, 9, 16))
    run = lambda layer: jax.jit(lambda x: layer(x, causal=True)[0])(x)
    np.testing.assert_allclose(run(by_depth), run(fixed), atol=1e-6)


@pytest.mark.full
def test_a_schedule_decodes_alike():
    model, tokens = model_of("differential:lambda_init=depth", layers=3)
    agree(model, tokens)
