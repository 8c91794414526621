"""Which dimension of which parameter is shared out, on every shelf; and layouts that do not fit are refused."""

import math
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec
from test_train import tiny

from xformers_lab import layouts, spec
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_task
from xformers_lab.train import optimizer, sharding
from xformers_lab.train.layout import plan
from xformers_lab.train.state import abstract

HEADS, HEAD = 4, 12
BASE = {"task": "copy", "seq_len": 36, "dim": 48, "layers": 4, "heads": HEADS, "batch": 8}
NEEDS = {
    ("memory", "xl"): {"position": "rope", "task": "lm"},
    ("memory", "compressive"): {"position": "rope", "task": "lm"},
    ("memory", "same_layer"): {"position": "rope", "task": "lm"},
    ("memory", "recurrent"): {"position": "rope", "task": "lm"},
    ("model", "encoder"): {"task": "listops"},
    ("model", "vit"): {"task": "pathfinder", "seq_len": 1024},
    ("depth", "funnel"): {"task": "listops"},
    ("depth", "mask_decoder"): {"task": "listops"},
    ("depth", "retrospective"): {"task": "listops"},
    ("depth", "distilling"): {"task": "listops"},
}
SHELVES = ("attention", "position", "norm", "ffn", "depth", "memory", "model")
CHOICES = [(shelf, name) for shelf in SHELVES for name in spec.names(shelf)]


def of(**changes) -> tuple[Config, list[sharding.Parameter]]:
    config = edit(Config(), **BASE | changes)
    return config, sharding.parameters(config, build_task(config))


def sized(**sizes: int) -> dict[str, int]:
    return dict.fromkeys(layouts.AXES, 1) | sizes


@pytest.mark.parametrize("shelf, name", CHOICES)
def test_every_parameter_of_every_choice_has_a_place(shelf, name):
    """Each axis divides the dimension that it shares out, which is none of layers, and is used once; fsdp leaves whole
    what has no even dimension alone; a product of matrices in attention or feed-forward layers is shared out."""
    _, parameters = of(**{shelf: name} | NEEDS.get((shelf, name), {}))
    sizes, whole, weights = sized(fsdp=2, tensor=2), 0, 0
    for parameter in parameters:
        where = [*sharding.spec(parameter, sizes, HEADS, HEAD)]
        axes = [axis for axis in where if axis]
        assert len(set(axes)) == len(axes) and set(axes) <= {"fsdp", "tensor"}
        assert all(axis is None for axis in where[: parameter.layers])
        assert all(n % 2 == 0 for n, axis in zip(parameter.shape, where, strict=False) if axis)
        own = parameter.shape[parameter.layers :]
        left = [n for n, axis in zip(parameter.shape, where or [None] * 9, strict=False) if axis != "tensor"]
        assert ("fsdp" in axes) == any(n % 2 == 0 for n in left[parameter.layers :]), parameter
        if parameter.path.rpartition(".")[2] in ("kernel", "up", "down") and "periods" in parameter.path:
            weights += math.prod(own)
            whole += 0 if "tensor" in axes else math.prod(own)
    # What is narrow (gates, projections onto ranks and routers) may be whole.
    assert whole <= 0.4 * weights


# The path of a parameter of a decoder, its shape, and where it lies.
KNOWN = {
    "embedding.embedding": ("tensor", "fsdp"),
    "head.kernel": ("fsdp", "tensor"),
    "head.bias": ("tensor",),
    "position.table": (None, "fsdp"),  # 36 places, 48 channels
    "stack.periods.0.attention.query.kernel": (None, "fsdp", "tensor"),
    "stack.periods.0.attention.key.kernel": (None, "fsdp", None),  # one key head is no two
    "stack.periods.0.attention.out.kernel": (None, "tensor", "fsdp"),
    "stack.periods.0.ffn.up.kernel": (None, "fsdp", "tensor"),
    "stack.periods.0.ffn.up.bias": (None, "tensor"),
    "stack.periods.0.ffn.down.kernel": (None, "tensor", "fsdp"),
    "stack.periods.0.ffn.down.bias": (None, "fsdp"),
    "stack.periods.0.ffn_norm.norm.scale": (None, "fsdp"),
}


def test_a_decoder_lies_as_it_should():
    _, parameters = of(task="lm", kv_heads=1)
    known = {parameter.path: parameter for parameter in parameters}
    for path, where in KNOWN.items():
        assert sharding.spec(known[path], sized(fsdp=2, tensor=2), HEADS, HEAD) == PartitionSpec(*where), path
    (row,) = (row for row in rows(parameters, fsdp=2, tensor=2) if row["parameter"].endswith("up.kernel"))
    assert row == {
        "parameter": "stack.periods.*.ffn.up.kernel", "shape": "4 x 48/fsdp x 192/tensor", "shared": True,
        "bytes": 4 * 4 * 48 * 192, "bytes_per_device": 4 * 48 * 192,
    }  # fmt: skip


def rows(parameters, **sizes) -> list[dict]:
    where = [sharding.spec(parameter, sized(**sizes), HEADS, HEAD) for parameter in parameters]
    return sharding.groups(parameters, where, sized(**sizes))


def test_banks_are_shared_out_by_expert():
    _, parameters = of(ffn="moe:experts=6")
    where = {p.path: sharding.spec(p, sized(experts=3, fsdp=2, tensor=2), HEADS, HEAD) for p in parameters if p.bank}
    assert where == {
        "stack.periods.0.ffn.up": PartitionSpec(None, "experts", "fsdp", "tensor"),
        "stack.periods.0.ffn.down": PartitionSpec(None, "experts", "tensor", "fsdp"),
    }
    assert not any(sharding.spec(p, sized(experts=4), HEADS, HEAD) for p in parameters)


@pytest.mark.parametrize("changes, message", [
    ({"layout": "sequence"}, "seq_len=36 is not divisible by 8: such as seq_len=32"),
    ({"layout": "tensor"}, "heads=4 is not divisible by 8: such as heads=8, or another size"),
    ({"layout": "data:2+tensor:4", "batch": 7}, "batch=7 cannot be shared out over 2 groups of the 8 devices.*batch=8"),
    ({"layout": "fsdp", "batch": 12}, "batch=12 cannot be shared out over 8 devices"),
    ({"layout": "fsdp+sequence:2", "accumulate": 4}, "accumulate=4 parts.*divisible by 16, such as batch=16"),
    ({"layout": "experts+data"}, "ffn=mlp has none: use ffn=moe or layout=data"),
    ({"layout": "experts:4+data", "ffn": "moe:experts=6"}, "cannot share out 6 experts over 4 devices"),
    ({"layout": "tensor", "model": "lstm", "task": "copy:symbols=2"}, "tensor:8, and no dimension that it may share"),
    ({"layout": "fsdp:4"}, "must multiply to 8"),
])  # fmt: skip
def test_what_an_axis_does_not_divide_is_refused(changes, message):
    config = edit(Config(), **BASE | changes)
    with pytest.raises(UsageError, match=message):
        plan(config, build_task(config), 8)


def test_memory_and_moments_live_with_what_they_are_of():
    """Whatever in a state ends in a parameter's path and is as large lies as it does."""
    config = tiny("lm", memory="xl:length=8", position="rope", layout="fsdp:4+tensor:2", dim=16)
    task = build_task(config)
    layout, state = plan(config, task, 8), abstract(config, task, optimizer.of(config, task))
    places: Any = layout.of_state(state)
    kernel = lambda tree: [leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "up" in str(path)]
    assert kernel(places.opt) == 2 * kernel(places.params) and any(kernel(places.params)[0])
    assert {leaf.spec for leaf in jax.tree.leaves(places.memory)} == {PartitionSpec(None, layouts.ROWS)}
    assert places.step.spec == places.seed.spec == PartitionSpec()
