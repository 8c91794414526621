"""What a parameter says of itself, in its metadata: whether it decays, how many of its axes count layers, how fast it
learns."""

from flax import nnx


def decays(parameter: nnx.Variable) -> bool:
    """Whether weight decay pulls a parameter to 0: as it says itself, `nnx.Param(value, decays=True)`.

    Matrices that states are multiplied with do, and the table of tokens. Whatever is added to states or scales them
    (biases, gains, vectors of a position, a place or a head, rates) does not, however many axes it has. A parameter
    that says nothing, in a file of the user's, decays where it has two axes or more in its own layer, as a kernel has.
    """
    says = parameter.get_metadata().get("decays")
    return parameter.ndim - layer_axes(parameter) >= 2 if says is None else says


def layer_axes(variable: nnx.Variable) -> int:
    """How many leading axes of a variable count layers: 0 outside of a stack, 1 inside."""
    return variable.get_metadata().get("layer_axes", 0)


def rate(parameter: nnx.Variable) -> float:
    """What the learning rate is multiplied by for a parameter: 1 unless `set_rate` has said so."""
    return parameter.get_metadata().get("rate", 1.0)


def set_rate(parameter: nnx.Variable, times: float) -> None:
    """Have a parameter learn at so many times the learning rate."""
    parameter.set_metadata(rate=times)
