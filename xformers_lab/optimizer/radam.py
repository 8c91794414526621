"""Adam that trusts its second moments only once there are enough of them."""

import optax

from xformers_lab.optimizer import Given
from xformers_lab.optimizer._bounds import refuse_rates


def radam(
    given: Given, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, threshold: float = 5.0
) -> optax.GradientTransformation:
    """RAdam: rectified Adam (Liu et al., 2020, arXiv 1908.03265), with decoupled weight decay.

    update = -rate (r m' / (sqrt(v') + eps) + decay p), r below 1 while v' has seen few steps; before that, -rate m'

    Options:
        b1: rate of the average of gradients
        b2: rate of the average of their squares
        eps: what is added to the root of the latter
        threshold: length of the average of squares from which on updates are divided by it
    """
    refuse_rates(b1=b1, b2=b2)
    return given.rule(optax.scale_by_radam(b1=b1, b2=b2, eps=eps, threshold=threshold))
