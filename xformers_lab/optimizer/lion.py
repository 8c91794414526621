"""Signs of momentum."""

import optax

from xformers_lab.optimizer import Given, unit_updates
from xformers_lab.optimizer._bounds import refuse_rates


@unit_updates
def lion(given: Given, *, b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Lion: the sign of an interpolated momentum (Chen et al., 2023, arXiv 2302.06675).

    update = -rate (sign(b1 m + (1 - b1) g) + decay p), then m = b2 m + (1 - b2) g

    Every number moves by the whole rate, so the paper has rates 3 to 10 times below those of AdamW, and a decay as many
    times above.

    Options:
        b1: share of the momentum in what moves the parameters
        b2: rate of the average of gradients that is kept
    """
    refuse_rates(b1=b1, b2=b2)
    return given.rule(optax.scale_by_lion(b1=b1, b2=b2))
