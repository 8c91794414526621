"""AdamW whose average of parameters takes the place of a falling rate."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from optax.contrib import schedule_free as schedule_freed
from optax.contrib import schedule_free_eval_params

from xformers_lab.errors import Refused
from xformers_lab.optimizer import Given
from xformers_lab.optimizer._bounds import refuse_rates


class Averaging(NamedTuple):
    """optax's `ScheduleFreeState`, which has the parameters to score in it."""

    of: Any

    def scored(self, params: Any) -> Any:
        """The average x of z, of which params are the point y between both where gradients are taken."""
        return schedule_free_eval_params(self.of, params)


def schedule_free(
    given: Given, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, power: float = 2.0
) -> optax.GradientTransformation:
    """Schedule-free AdamW (Defazio et al., 2024, arXiv 2405.15682).

    z = z - rate (g(y) / (sqrt(v') + eps) + decay y), x = (1 - c) x + c z, y = b1 x + (1 - b1) z

    c is the share of this step's weight, the largest rate so far to `power`, in the weights of all. Gradients are taken
    at y; x is what is scored, validated, saved as the best, loaded and generated with. It needs schedule=constant, with
    a warm-up or without, for x stands in for a rate that falls.

    Options:
        b1: share of x in y, in place of a momentum
        b2: rate of the average of squares of gradients
        eps: what is added to the root of the latter
        power: exponent of the weight of a step in x
    """
    refuse_rates(b1=b1, b2=b2)
    if not b1:
        raise Refused("b1 must be above 0: x is told from y and z by it")
    if given.schedule != "constant":
        raise Refused(
            f"its average takes the place of a rate that falls, as schedule={given.schedule} has it: say "
            "schedule=constant"
        )
    # As Adam without a first moment, and without the memory of one.
    base = given.rule(optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True))
    # optax counts the steps that weights are of from 1 on.
    inner = schedule_freed(base, lambda count: given.rate(jnp.asarray(count) - 1), b1, power)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, kept = inner.update(updates, state.of, params)
        return updates, Averaging(kept)

    return optax.GradientTransformation(lambda params: Averaging(inner.init(params)), update)
