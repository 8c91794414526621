"""Depths, over layers of two mechanisms in turn; see inside.py for the rest."""

from xformers_lab.check import inside
from xformers_lab.check.inside import Inside
from xformers_lab.check.subject import Broken
from xformers_lab.train import checkpoint, optimizer

# A last period that is not whole, where the depth allows that.
LAYERS = (3, 4)


def words(choice: str) -> dict:
    return {"depth": choice, "attention": "linear+full"}


def computation(subject: Inside) -> None:
    """It says how many layers a token passed, a number above 0 and, with what it adds of its own, not above 3 times
    those that there are."""
    told = subject.model.trained(1)[1][0]
    if "computation" not in told:
        raise Broken('its aux lacks "computation", the layers that a real token passed through on average')
    spent, layers = float(told["computation"]), subject.model.config.model.layers
    if not 0 < spent <= 3 * layers:
        raise Broken(f'"computation" is {spent:g} of {layers} layers')


def matrices_decay(subject: Inside) -> None:
    """Weight decay takes kernels for matrices, and biases and scales, however layers are stacked, for vectors."""
    for name, decays in checkpoint.named_leaves(optimizer.decays(subject.model.params)).items():
        last = name.rpartition(".")[2]
        if decays != (last == "kernel") and last in ("kernel", "bias", "scale"):
            raise Broken(
                f"{name} {'would' if decays else 'would not'} decay: an axis of layers belongs to stacks that are "
                "called periods or rest, as depth/fixed.py has them (see train/optimizer.py)"
            )


PROPERTIES = [*inside.PROPERTIES, computation, matrices_decay]
