"""Momentum over the curvature, clipped."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xformers_lab.errors import Refused
from xformers_lab.optimizer import Curvature, Estimate, Given
from xformers_lab.optimizer._bounds import refuse_rates

# What the paper multiplies each estimate of the Hessian's diagonal by.
SHARES = {"gauss_newton": 0.05, "hutchinson": 0.01}


class SophiaState(NamedTuple):
    """Steps taken, the average of gradients, and that of the estimates of the Hessian's diagonal."""

    steps: jax.Array
    mean: Any
    curvature: Any


def sophia(
    given: Given,
    *,
    estimate: Estimate = "gauss_newton",
    every: int = 10,
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float | None = None,
    eps: float = 1e-12,
) -> optax.GradientTransformation:
    """Sophia: momentum divided by a running estimate of the Hessian's diagonal, and clipped (Liu et al., 2023, arXiv
    2305.14342).

    m = b1 m + (1 - b1) g, and at each `every`-th step h = b2 h + (1 - b2) estimate
    update = -rate (clip(m / max(gamma h, eps), -1, 1) + decay p)

    gauss_newton (Sophia-G): W a^2, a the gradient of the mean loss of answers that are drawn from the model's own
    probabilities, W how many answers there are; for tasks whose loss is cross-entropy. hutchinson (Sophia-H): u (H u),
    u of random signs, H the Hessian of the training loss, whatever it is; kernels of a GPU or TPU have no second
    derivative, and normaliser=powernorm has one that is not its output's, so that it is biased there. A step with an
    estimate costs one gradient more, or about three; FLOPs in tables are those of such a step. No number moves by more
    than the rate, which the paper has somewhat below AdamW's.

    Options:
        estimate: of the Hessian's diagonal
        every: steps from one estimate to the next
        b1: rate of the average of gradients
        b2: rate of the average of estimates
        gamma: share of the curvature that divides (none: 0.05 of gauss_newton, 0.01 of hutchinson)
        eps: what divides at least
    """
    refuse_rates(b1=b1, b2=b2)
    share = SHARES[estimate] if gamma is None else gamma
    for name, value in (("every", every), ("gamma", share), ("eps", eps)):
        if value <= 0:
            raise Refused(f"{name} must be above 0, got {value:g}")
    if estimate == "gauss_newton" and not given.cross_entropy:
        raise Refused(
            "estimate=gauss_newton draws answers from the model's probabilities, and this task's loss is no "
            "cross-entropy; use estimate=hutchinson"
        )

    def init(params: Any) -> SophiaState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return SophiaState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates: Any, state: Any, params: Any = None, *, curvature: Curvature, **_: Any) -> tuple:
        average = lambda rate: lambda old, new: rate * old + (1 - rate) * new
        mean = jax.tree.map(average(b1), state.mean, updates)
        newer = lambda old: jax.tree.map(average(b2), old, curvature(estimate))
        kept = jax.lax.cond(state.steps % every == 0, newer, lambda old: old, state.curvature)
        moved = jax.tree.map(lambda m, h: jnp.clip(m / jnp.maximum(share * h, eps), -1, 1), mean, kept)
        return moved, SophiaState(state.steps + 1, mean, kept)

    rule: Any = optax.GradientTransformationExtraArgs
    return given.rule(rule(init, update))
