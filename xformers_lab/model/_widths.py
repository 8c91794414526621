"""How first parameters and learning rates go with a model's width, for one rate to serve all widths: muP.

Yang et al., 2022, arXiv 2203.03466, tables 3 and 8, for optimizers whose updates have a size of their own, as Adam's.
Where a model is m times as wide as that of `base_dim`, what has m times as many inputs there learns m times slower; and
what has m times as many inputs and no more outputs, the head say, begins smaller by the root of m beside what its
number of inputs makes it. All else, tables, vectors, biases and gains, is as in the standard parametrisation. What
grows is not listed: parameters are set beside those of the model of `base_dim`.
"""

from flax import nnx

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.errors import Refused, UsageError
from xformers_lab.ffn import Bank
from xformers_lab.nn.parameters import decays, layer_axes, set_rate


def refuse(config: Config) -> None:
    """Raises UsageError where a config's width and `base_dim` are not of one family of models."""
    model, words = config.model, f"parametrisation={config.model.parametrisation}"
    if model.parametrisation == "standard":
        if model.base_dim is not None:
            raise UsageError(
                f"base_dim={model.base_dim}: {words} has no base; say parametrisation=mup, or leave it out"
            )
        return
    if model.base_dim is None:
        raise UsageError(f"{words}: say base_dim=, the width that lr= was chosen at")
    optimizer = spec.parse(config.train.optimizer).name
    if not getattr(spec.entry("optimizer", optimizer), "unit_updates", False):
        raise UsageError(
            f"{words} optimizer={optimizer}: updates have no size of their own, for which its rates are made; use adamw"
        )
    for key in ("heads", "kv_heads"):
        heads = getattr(model, key)
        if heads is not None and heads * model.base_dim % model.dim:
            raise UsageError(
                f"{key}={heads} dim={model.dim} base_dim={model.base_dim}: with {words} heads keep their size, and "
                f"at base_dim there would be {heads * model.base_dim / model.dim:g}; say head=, the size of one"
            )


def base_of(config: Config) -> Config:
    """The config of the same model at `base_dim`: as many numbers to a head, and so fewer heads."""
    model = config.model
    at_base = lambda heads: None if heads is None else heads * model.base_dim // model.dim
    width = {"dim": model.base_dim, "heads": at_base(model.heads), "kv_heads": at_base(model.kv_heads)}
    return edit(config, **width, parametrisation="standard", base_dim=None)


def scale(model: nnx.Module, base: nnx.Module) -> None:
    """Give the parameters of a model their first size and their learning rate beside that of `base_dim`, which may be
    of shapes alone; raises Refused where the two are not of one structure."""
    smaller = _parameters(base)
    parameters = _parameters(model)
    if parameters.keys() != smaller.keys():
        raise Refused("its parameters are others than at base_dim: leave out parametrisation=mup")
    for path, parameter in parameters.items():
        if not decays(parameter) or parameter.ndim - layer_axes(parameter) - isinstance(parameter, Bank) != 2:
            continue
        (inputs, outputs), (fewer, as_many) = parameter.shape[-2:], smaller[path].shape[-2:]
        times = inputs / fewer
        set_rate(parameter, 1 / times)
        if outputs == as_many:
            parameter[...] = parameter[...] * times**-0.5


def _parameters(model: nnx.Module) -> dict[tuple, nnx.Param]:
    return {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)}
