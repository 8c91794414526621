"""Adam with decoupled weight decay."""

import optax

from xformers_lab.optimizer import Given, unit_updates
from xformers_lab.optimizer._bounds import refuse_rates


@unit_updates
def adamw(given: Given, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101).

    update = -rate (m' / (sqrt(v') + eps) + decay p), m' and v' averages of g and g^2, corrected for their start at 0

    Options:
        b1: rate of the average of gradients
        b2: rate of the average of their squares
        eps: what is added to the root of the latter
    """
    refuse_rates(b1=b1, b2=b2)
    return given.rule(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
