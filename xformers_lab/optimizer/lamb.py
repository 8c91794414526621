"""Adam with updates as large as what they move."""

import optax

from xformers_lab.optimizer import Given, by_layer
from xformers_lab.optimizer._bounds import refuse_rates


def lamb(given: Given, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> optax.GradientTransformation:
    """LAMB: layer-wise adaptive moments for large batches (You et al., 2020, arXiv 1904.00962).

    update = -rate |p| / |u| u, u = m' / (sqrt(v') + eps) + decay p, for each parameter of each layer by itself

    A parameter that is all 0, as biases are at the start, moves by -rate u. As decay is a part of u, it changes the
    direction of an update and not its length.

    Options:
        b1: rate of the average of gradients
        b2: rate of the average of their squares
        eps: what is added to the root of the latter
    """
    refuse_rates(b1=b1, b2=b2)
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(given.decay, mask=given.roles.decays),
        by_layer(optax.scale_by_trust_ratio(), given.roles.stacked),
        optax.scale_by_learning_rate(given.rate),
    )
