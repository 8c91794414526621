"""Second moments of rows and columns in place of those of each number."""

import optax

from xformers_lab.errors import Refused
from xformers_lab.optimizer import Given, by_layer
from xformers_lab.optimizer._bounds import refuse_rates


def adafactor(
    given: Given,
    *,
    factored: int = 128,
    exponent: float = 0.8,
    clip: float = 1.0,
    relative: bool = True,
    momentum: float = 0.0,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern, 2018, arXiv 1804.04235).

    update = -rate (max(0.001, rms(p)) u / max(1, rms(u) / clip) + decay p), u = g / sqrt(v), v of a matrix the product
    of averages of g^2 over its rows and over its columns

    All of it is of each parameter of each layer by itself. What it keeps of a matrix is one number for each row and
    column.

    Deviations from the paper: the learning rate is the lab's, not one that falls by itself; weight decay is decoupled
    and scaled by it; clip is a root mean square of u.

    Options:
        factored: size from which on both sides of a matrix have moments of rows and columns alone
        exponent: c of the rate 1 - n^-c of the averages after n steps
        clip: largest root mean square of u
        relative: scale updates by the root mean square of what they move
        momentum: rate of an average of updates (0: none is kept)
    """
    refuse_rates(momentum=momentum)
    for name, value in (("factored", factored), ("exponent", exponent), ("clip", clip)):
        if value <= 0:
            raise Refused(f"{name} must be above 0, got {value:g}")
    parts = [optax.scale_by_factored_rms(decay_rate=exponent, min_dim_size_to_factor=factored)]
    parts += [optax.clip_by_block_rms(clip)]
    parts += [optax.scale_by_param_block_rms()] if relative else []
    parts += [optax.ema(momentum, debias=False)] if momentum else []
    return given.rule(by_layer(optax.chain(*parts), given.roles.stacked))
