"""Which dimension of a parameter is shared out over which axis of a mesh: rules by path, for all shelves.

`tensor` shares out what RULES name: heads, the width of feed-forward layers, the vocabulary. A parameter that no rule
names is whole on that axis. `fsdp` shares out of every parameter the largest dimension that it divides and `tensor`
leaves, so parameters of new mechanisms are covered as they are. `experts` shares out banks. What an axis does not
divide is whole on it. Dimensions that count layers are never shared out, for layers run one after the other.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec

from xformers_lab.config import Config
from xformers_lab.ffn import Bank
from xformers_lab.layouts import EXPERTS, FSDP, TENSOR
from xformers_lab.model import build_model
from xformers_lab.nn.parameters import layer_axes
from xformers_lab.tasks import Task

NUMBER = 4  # bytes of each number of a parameter
VOCABULARY, WIDTH, HEADS, ONE_HEAD = "vocabulary", "width", "heads", "one of each head"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Parameters whose path, `stack.periods.0.ffn.up.kernel`, the pattern is found in: which dimension `tensor` shares
    out, from the end or, from 0 on, from behind those of layers, and what it counts."""

    pattern: str
    dimension: int
    counts: str


# The first that is found counts. A layer that is shared out by its outputs comes before one by its inputs, so that
# devices exchange sums once for both (Shoeybi et al., 2019, arXiv 1909.08053). Cells of recurrent networks have none:
# their gates lie side by side in one matrix, and a share of it would be of one gate or another.
RULES = (
    Rule(r"(^|\.)embedding\.embedding$", -2, VOCABULARY),
    Rule(r"^head\.(kernel|bias)$", -1, VOCABULARY),
    Rule(r"(^|\.)(ffn|blocks)\.(.+\.)?(up|gate)\.(kernel|bias)$", -1, WIDTH),
    Rule(r"(^|\.)ffn\.(.+\.)?down\.norm\.(scale|bias)$", -1, WIDTH),
    Rule(r"(^|\.)(ffn|blocks)\.(.+\.)?down(\.linear)?\.kernel$", -2, WIDTH),
    Rule(r"(^|\.)grow\.(kernel|bias)$", -1, WIDTH),
    Rule(r"(^|\.)shrink\.kernel$", -2, WIDTH),
    Rule(r"(^|\.)ffn\.(.+\.)?up$", -1, WIDTH),  # of many networks
    Rule(r"(^|\.)ffn\.(.+\.)?down$", -2, WIDTH),
    Rule(r"(^|[._])(query|key|value|k|v)\.(kernel|bias)$", -1, HEADS),
    Rule(r"(^|\.)convs\.(query|key|value)\.weights$", -1, HEADS),
    Rule(r"(^|\.)attention\.(up|gate|strength|forget|interval)\.(kernel|bias)$", -1, HEADS),
    Rule(r"(^|\.)attention\.second\.\d+\.kernel$", -1, HEADS),
    Rule(r"(^|[._])out(\.linear)?\.kernel$", -2, HEADS),
    Rule(r"(^|\.)attention\.(out\.gain|\w+)$", 0, ONE_HEAD),
    Rule(r"(^|\.)ffn\.(keys|values)$", 0, ONE_HEAD),
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a model: the keys of its path in a pure dict, its shape, how many of its first dimensions count
    layers, and whether it is a bank, one matrix of each of several networks."""

    keys: tuple
    shape: tuple[int, ...]
    layers: int
    bank: bool

    @property
    def path(self) -> str:
        return ".".join(map(str, self.keys))


def parameters(config: Config, task: Task) -> list[Parameter]:
    """The parameters of a config's model; nothing is computed."""
    variables = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: build_model(config, task)), nnx.Param))
    return [
        Parameter(tuple(path), variable.get_value().shape, layer_axes(variable), isinstance(variable, Bank))
        for path, variable in variables
    ]


def spec(parameter: Parameter, sizes: Mapping[str, int], heads: int, head: int) -> PartitionSpec:
    """Where a parameter lies on axes of these sizes, in a model with so many heads of so many channels."""
    axes: list[str | None] = [None] * len(parameter.shape)
    if parameter.bank and parameter.shape[-3] % sizes[EXPERTS] == 0 and sizes[EXPERTS] > 1:
        axes[-3] = EXPERTS
    dimension = _of_tensor(parameter, sizes[TENSOR], heads, head)
    if dimension is not None and axes[dimension] is None and sizes[TENSOR] > 1:
        axes[dimension] = TENSOR
    free = [at for at in range(parameter.layers, len(axes)) if axes[at] is None]
    free = [at for at in free if parameter.shape[at] % sizes[FSDP] == 0]
    if free and sizes[FSDP] > 1:
        axes[max(free, key=lambda at: parameter.shape[at])] = FSDP
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def _of_tensor(parameter: Parameter, size: int, heads: int, head: int) -> int | None:
    """The dimension that a rule names, where `tensor` divides what it counts."""
    rule = next((rule for rule in RULES if re.search(rule.pattern, parameter.path)), None)
    if rule is None:
        return None
    at = rule.dimension + (parameter.layers if rule.dimension >= 0 else len(parameter.shape))
    if not parameter.layers <= at < len(parameter.shape):
        return None
    count = parameter.shape[at]
    if rule.counts == ONE_HEAD and count != heads:
        return None
    if rule.counts == HEADS and count % head == 0:
        count //= head  # whole heads: a share of one would have every score added up over devices
    return at if count % size == 0 else None


def groups(
    parameters: Sequence[Parameter], specs: Sequence[PartitionSpec], sizes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A row for all parameters whose paths differ in numbers alone and that lie alike: parameter (the path, * for a
    number), shape of each ("2 x 32/fsdp x 128/tensor"), shared (by any axis), bytes in all and bytes_per_device."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for parameter, where in zip(parameters, specs, strict=True):
        path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parameter.path)
        axes = [*where, *[None] * (len(parameter.shape) - len(where))]
        shape = " x ".join(f"{n}/{axis}" if axis else str(n) for n, axis in zip(parameter.shape, axes, strict=True))
        row = {"parameter": path, "shape": shape, "shared": any(axes), "bytes": 0, "bytes_per_device": 0}
        row = rows.setdefault((path, shape), row)
        size = NUMBER * math.prod(parameter.shape)
        row["bytes"] += size
        row["bytes_per_device"] += size // math.prod(sizes[axis] for axis in axes if axis)
    return list(rows.values())
