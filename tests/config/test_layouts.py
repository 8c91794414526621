"""The grammar of layout=: what words mean the same, which are refused, and how devices are divided up."""

import math
import subprocess
import sys

import pytest

from xformers_lab import config as configs
from xformers_lab import layouts
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError


@pytest.mark.parametrize("said, meant", [
    ("jit", "data"), ("data", "data"), ("pmap", "pmap"), ("tensor:2+data:4", "data:4+tensor:2"),
    ("sequence + fsdp:2", "fsdp:2+sequence"), ("data:1+fsdp:08", "fsdp:8"), ("tensor:1", "data:1"),
    ("experts", "experts"),
])  # fmt: skip
def test_equal_layouts_are_equal(said, meant):
    config = edit(Config(), layout=said)
    assert config.train.layout == meant and config == edit(Config(), layout=meant)
    assert configs.identity(config) == configs.identity(edit(Config(), layout=meant))


def test_runs_keep_the_ids_that_they_had(tmp_path):
    """A config that was stored when plain data parallelism was called jit is the default, with the same id."""
    assert configs.decisive(Config())["layout"] == "jit"
    (tmp_path / "config.json").write_text('{"task": "copy", "train": {"layout": "jit"}}')
    assert configs.stored(tmp_path / "config.json") == edit(Config(), task="copy")
    ids = {configs.identity(edit(Config(), layout=layout)) for layout in ("data", "fsdp", "fsdp:2", "pmap", "experts")}
    assert len(ids) == 5


@pytest.mark.parametrize("wrong, message", [
    ("fdsp", r'unknown axis "fdsp": did you mean "fsdp"'),
    ("", "unknown axis"),
    ("data+fsdp+data:2", "the axis data stands there twice"),
    ("pmap+tensor", "pmap stands alone.*use layout=pmap"),
    ("fsdp:0", "no number of devices: write fsdp:2, or fsdp alone"),
    ("fsdp:-2", "no number of devices"),
    ("fsdp:2.0", "no number of devices"),
    ("fsdp:", "no number of devices"),
])  # fmt: skip
def test_what_is_no_layout_is_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        edit(Config(), layout=wrong)


@pytest.mark.parametrize("layout, devices, experts, shown", [
    ("data", 8, (), "data:8"), ("pmap", 8, (), "data:8"), ("tensor", 8, (), "tensor:8"),
    ("data+tensor", 8, (), "data:4+tensor:2"), ("data+fsdp+tensor", 12, (), "data:3+fsdp:2+tensor:2"),
    ("data+tensor:4", 8, (), "data:2+tensor:4"), ("data:2+fsdp:2+tensor:2", 8, (), "data:2+fsdp:2+tensor:2"),
    ("experts", 8, (4,), "data:2+experts:4"), ("experts", 6, (4,), "data:3+experts:2"),
    ("fsdp+experts", 8, (8, 4), "fsdp:2+experts:4"), ("experts:2", 2, (4,), "experts:2"),
    ("fsdp+sequence", 1, (), "data:1"), ("fsdp", 7, (), "fsdp:7"),
])  # fmt: skip
def test_devices_are_divided_up(layout, devices, experts, shown):
    sizes = layouts.sizes(layout, devices, experts)
    assert tuple(sizes) == layouts.AXES and math.prod(sizes.values()) == devices
    assert ("+".join(f"{name}:{size}" for name, size in sizes.items() if size > 1) or "data:1") == shown
    assert layouts.devices_of(layout, 99) in (99, devices)


@pytest.mark.parametrize("layout, devices, message", [
    ("data:2+fsdp:2", 8, r"2 x 2 devices, and there are 8: .* multiply to 8, or be left out \(layout=data\+fsdp\)"),
    ("fsdp:8", 1, "8 devices, and there is 1"),
    ("data+tensor:3", 8, r"3 devices, and there are 8.*layout=data\+tensor"),
    ("data:1", 4, "layout=data"),
])  # fmt: skip
def test_sizes_must_multiply_to_the_devices(layout, devices, message):
    with pytest.raises(UsageError, match=message):
        layouts.sizes(layout, devices)


def test_experts_leave_no_device_without_work():
    with pytest.raises(UsageError, match="4 devices are left for the experts, who can use 2"):
        layouts.sizes("data:2+experts", 8, (2,))


def test_a_layout_is_typed_without_jax():
    program = "import sys; from xformers_lab import config; config.edit(config.Config(), layout='fsdp:2+tensor');"
    subprocess.run([sys.executable, "-c", program + "assert 'jax' not in sys.modules"], check=True)
