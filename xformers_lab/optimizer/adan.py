"""Adaptive Nesterov momentum."""

import optax

from xformers_lab.optimizer import Given, unit_updates
from xformers_lab.optimizer._bounds import refuse_rates


@unit_updates
def adan(
    given: Given, *, b1: float = 0.98, b2: float = 0.92, b3: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adan: moments of gradients and of their differences (Xie et al., 2022, arXiv 2208.06677).

    Deviations from the paper: decay is added to the update, as in AdamW, where the paper divides by 1 + rate decay.

    Options:
        b1: rate of the average of gradients
        b2: rate of the average of differences between gradients that follow one another
        b3: rate of the average of squares of the gradient that looks ahead
        eps: what is added to the root of the latter, and within it
    """
    refuse_rates(b1=b1, b2=b2, b3=b3)
    return given.rule(optax.scale_by_adan(b1=b1, b2=b2, b3=b3, eps=eps, eps_root=eps))
