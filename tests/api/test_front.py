"""`import xformers_lab as xl`: light, the same whatever was imported before, and told by help()."""

import importlib.util
import inspect
import subprocess
import sys

import pytest
from rich.console import Console

import xformers_lab as xl
from xformers_lab import config, progress

NAMES = [
    "Run",
    "Table",
    "ablate",
    "bench",
    "build",
    "catalogue",
    "check",
    "compare",
    "error",
    "load",
    "plan",
    "runs",
    "scale",
    "signals",
    "train",
]
LIGHT = """
import sys, time
began = time.process_time()
import xformers_lab as xl
seconds, loaded = time.process_time() - began, set(sys.modules)
xl.compare
print(seconds, *sorted({"jax", "numpy", "pandas", "rich"} & loaded), *sorted({"jax", "pandas"} & set(sys.modules)))
"""


def test_the_import_is_light():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert not heavy and float(seconds) <= 0.2


def test_dir_lists_what_is_public():
    assert dir(xl) == NAMES
    with pytest.raises(AttributeError, match="no attribute 'compair'"):
        xl.compair  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_folders_of_the_same_name_hide_no_function():
    from xformers_lab import bench, check, compare, train
    from xformers_lab.bench import rows
    from xformers_lab.check import cache
    from xformers_lab.compare import run
    from xformers_lab.train import records

    assert all(map(inspect.ismodule, (rows, cache, run, records)))
    assert all(map(inspect.isfunction, (bench, check, compare, train, xl.train, xl.compare)))


@pytest.mark.parametrize("name", [name for name in NAMES if name[0].islower()])
def test_help_is_enough_to_work_from(name):
    function = getattr(xl, name)
    text = inspect.getdoc(function) or ""
    assert f"xl.{name}(" in text and "Raises:" in text  # an example, and what goes wrong
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert f"    {parameter.name}: " in text, f"{parameter.name} is not told"
    if any(parameter.name == "keys" for parameter in parameters):
        study = name in ("ablate", "compare", "scale")
        assert all(f"  {key}=" in text for key in (*config.KEYS, *(config.STUDY if study else ())))


def test_progress_is_live_where_something_can_draw_it(monkeypatch):
    notebook, pipe = Console(force_jupyter=True), Console(force_terminal=False, force_jupyter=False)
    for there, live in ((object(), True), (None, False)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: there)
        assert progress.live(notebook) is live  # rich draws it with ipywidgets, and warns without
        assert not progress.live(pipe) and progress.live(Console(force_terminal=True, force_jupyter=False))
