"""How many devices each axis of a config's layout has, and whether it divides what it shares out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from xformers_lab import layouts, spec
from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.layouts import DATA, EXPERTS, FSDP, SEQUENCE, TENSOR
from xformers_lab.model import kind_of, size_of
from xformers_lab.tasks import Task
from xformers_lab.train import sharding
from xformers_lab.train.sharding import Parameter


def mesh_of(devices: Any, sizes: Mapping[str, int]) -> Mesh:
    """A mesh of devices, a sequence or an array of them, whose axes have these sizes, for XLA to partition over."""
    return Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def divided(
    config: Config, task: Task, devices: int
) -> tuple[dict[str, int], list[Parameter], tuple[PartitionSpec, ...]]:
    """The size of every axis for so many devices, and the model's parameters with where each lies; none where all are
    whole. Raises UsageError where the sizes do not multiply to the devices, or an axis does not divide what it shares
    out."""
    parameters = [] if _plain(config) else sharding.parameters(config, task)
    counts = sorted({parameter.shape[-3] for parameter in parameters if parameter.bank})
    _check_experts(config, counts)
    sizes = layouts.sizes(config.train.layout, devices, counts)
    _check_shared_experts(config, counts, sizes, devices)
    _check_rows(config, layouts.rows(sizes), devices)
    _check_positions(config, sizes[SEQUENCE])
    _check_heads(config, task, sizes[TENSOR])
    size = size_of(config)
    specs = tuple(sharding.spec(parameter, sizes, size.heads, size.head) for parameter in parameters)
    _check_parameters(config, sizes, parameters, specs)
    return sizes, parameters, specs


def _plain(config: Config) -> bool:
    """Whether a layout shares out sequences alone, so that the model need not be looked at."""
    return set(layouts.asked(config.train.layout)) == {DATA}


def _check_rows(config: Config, rows: int, devices: int) -> None:
    train = config.train
    if train.batch % (rows * train.accumulate) == 0:
        return
    parts = f" in accumulate={train.accumulate} parts" if train.accumulate > 1 else ""
    step = rows * train.accumulate
    nearest = max(round(train.batch / step), 1) * step
    over = f"{devices} devices" if rows == devices else f"{rows} groups of the {devices} devices"
    raise UsageError(
        f"batch={train.batch} cannot be shared out over {over}{parts}: "
        f"it must be divisible by {step}, such as batch={nearest}"
    )


def _check_positions(config: Config, count: int) -> None:
    if config.seq_len % count:
        nearest = max(round(config.seq_len / count), 1) * count
        raise UsageError(
            f"layout={config.train.layout} shares out positions over {count} devices, and seq_len={config.seq_len} is "
            f"not divisible by {count}: such as seq_len={nearest}"
        )


def _check_heads(config: Config, task: Task, count: int) -> None:
    heads = config.model.heads
    if count > 1 and heads % count and spec.entry("model", spec.parse(kind_of(config, task)).name).headed:
        raise UsageError(
            f"layout={config.train.layout} shares out heads over {count} devices, and heads={heads} is not divisible "
            f"by {count}: such as heads={-(-heads // count) * count}, or another size, tensor:N"
        )


def _check_experts(config: Config, counts: Sequence[int]) -> None:
    if EXPERTS in layouts.asked(config.train.layout) and not counts:
        raise UsageError(
            f"layout={config.train.layout} shares out the experts of a feed-forward layer, but ffn={config.model.ffn} "
            "has none: use ffn=moe or layout=data"
        )


def _check_shared_experts(config: Config, counts: Sequence[int], sizes: Mapping[str, int], devices: int) -> None:
    asked = layouts.asked(config.train.layout)
    if EXPERTS not in asked:
        return
    size = asked[EXPERTS]
    if (size is None and sizes[EXPERTS] == 1 < devices) or any(count % (size or 1) for count in counts):
        over = devices if size is None else size
        raise UsageError(
            f"layout={config.train.layout} cannot share out {' and '.join(map(str, counts))} experts over {over} "
            f"devices: give ffn a number of experts that has a divisor in common with {over}, such as {over}, or use "
            "layout=data"
        )


def _check_parameters(
    config: Config, sizes: Mapping[str, int], parameters: Sequence[Parameter], specs: Sequence[PartitionSpec]
) -> None:
    """Raises UsageError where an axis that shares out parameters shares out none."""
    for axis in (FSDP, TENSOR):
        if sizes[axis] > 1 and not any(axis in where for where in specs):
            largest = max(dimension for parameter in parameters for dimension in parameter.shape)
            raise UsageError(
                f"layout={config.train.layout} shares out parameters over {axis}:{sizes[axis]}, and no dimension that "
                f"it may share out (the largest is {largest}) is divisible by {sizes[axis]}: use another size of "
                f"{axis}, or layout=data"
            )
