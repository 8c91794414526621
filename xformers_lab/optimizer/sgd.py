"""Gradient descent."""

import optax

from xformers_lab.errors import Refused
from xformers_lab.optimizer import Given
from xformers_lab.optimizer._bounds import refuse_rates


def sgd(given: Given, *, momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    """Stochastic gradient descent (Robbins and Monro, 1951), with momentum if asked (Sutskever et al., 2013).

    update = -rate m, m = momentum m + g + decay p; with nesterov, -rate (momentum m + g + decay p)

    Options:
        momentum: share of the last update that the next one keeps
        nesterov: look ahead by Nesterov's momentum
    """
    refuse_rates(momentum=momentum)
    if nesterov and not momentum:
        raise Refused("nesterov=true needs a momentum, such as momentum=0.9")
    decay = optax.add_decayed_weights(given.decay, mask=given.roles.decays)
    return optax.chain(decay, optax.sgd(given.rate, momentum=momentum or None, nesterov=nesterov))
