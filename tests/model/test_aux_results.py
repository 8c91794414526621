"""What a part of a model gives beside its output: how the results of several parts come together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab.nn.aux_results import Aux, by_token, computation

LOGITS = jnp.ones((2, 3, 5))


def test_values_of_one_name_add_up_and_others_stay():
    a = Aux(losses={"balance": 1.0}, scalars={"computation": 2.0, "span": 7.0})
    b = Aux(losses={"balance": 0.5, "budget": 4.0}, predictions={"exit1": (0.5, LOGITS)}, scalars={"computation": 1.0})
    both = a + b
    assert both.losses == {"balance": 1.5, "budget": 4.0} and both.scalars == {"computation": 3.0, "span": 7.0}
    assert both.predictions["exit1"][0] == 0.5 and not both.tokens
    assert (a + Aux()) == a and not Aux() and a


def test_a_part_without_a_figure_of_each_token_gave_all_of_them_its_scalar():
    valid = jnp.array([[True, True, False]])
    both = by_token("computation", jnp.array([[0, 1, 1]]), valid) + computation(2)
    np.testing.assert_array_equal(both.tokens["computation"], [[2, 3, np.nan]])
    assert both.scalars["computation"] == 2.5


def test_predictions_of_one_name_are_no_sum():
    one = Aux(predictions={"exit1": (1.0, LOGITS)})
    with pytest.raises(ValueError, match="predictions of one name: exit1"):
        _ = one + one


def test_the_right_side_of_a_bar_wins():
    default = computation(1) | Aux(losses={"balance": 2.0}, scalars={"computation": 0.5})
    assert default.scalars == {"computation": 0.5} and default.losses == {"balance": 2.0}
    with pytest.raises(TypeError):
        _ = default | {"computation": 1.0}  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(TypeError):
        _ = default + {}  # pyright: ignore[reportOperatorIssue]


def test_it_is_a_pytree_whose_names_metrics_tell():
    once = Aux(losses={"span": 1.0}, scalars={"span": 3.0}, tokens={"steps": jnp.ones((1, 2))})
    twice = jax.jit(lambda aux: jax.tree.map(lambda leaf: 2 * leaf, aux))(once)
    assert twice.metrics() == {"loss/span": 2.0, "span": 6.0}
    assert once.among(Aux(losses={"span": 0.0})) == Aux(losses={"span": 1.0})
