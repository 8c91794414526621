"""Depths: what they say that a token cost, and how their layers are stacked; see inside.py for the rest."""

import math

from xformers_lab.check import inside
from xformers_lab.check.subject import Broken
from xformers_lab.check.tiny import Inside
from xformers_lab.train import checkpoint, optimizer


def subject(choice: str) -> Inside:
    return Inside("depth", choice, {"depth": choice}, layers=(3, 4), both=True)


def computation(subject: Inside) -> None:
    """It says how many layers a token passed."""
    metrics = subject.model.trained(1)[1][0]
    if "computation" not in metrics:
        raise Broken('its aux lacks "computation", the layers that a valid token passed through on average')
    if not 0 < (spent := float(metrics["computation"])) < math.inf:
        raise Broken(f'"computation" is {spent:g}, and should be a number of layers')


def matrices_decay(subject: Inside) -> None:
    """Weight decay takes kernels for matrices, and biases and scales, however layers are stacked, for vectors."""
    for name, decays in checkpoint.named_leaves(optimizer.decays(subject.model.built(subject.model.variables))).items():
        last = name.rpartition(".")[2]
        if decays != (last == "kernel") and last in ("kernel", "bias", "scale"):
            raise Broken(
                f"{name} {'would' if decays else 'would not'} decay: stack layers with `build_stack` of "
                "depth/_stack.py, which marks the axis of layers (see train/optimizer.py)"
            )


PROPERTIES = [*inside.PROPERTIES, computation, matrices_decay]
