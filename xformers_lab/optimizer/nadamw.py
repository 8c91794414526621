"""AdamW that looks ahead."""

import optax

from xformers_lab.optimizer import Given, unit_updates
from xformers_lab.optimizer._bounds import refuse_rates


@unit_updates
def nadamw(given: Given, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """NAdamW: AdamW with Nesterov's momentum (Dozat, 2016; Loshchilov and Hutter, 2019, arXiv 1711.05101).

    update = -rate ((b1 m' + (1 - b1) g') / (sqrt(v') + eps) + decay p), with m', g' and v' corrected for their start

    Options:
        b1: rate of the average of gradients
        b2: rate of the average of their squares
        eps: what is added to the root of the latter
    """
    refuse_rates(b1=b1, b2=b2)
    return given.rule(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=True))
