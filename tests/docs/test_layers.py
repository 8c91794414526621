"""Who may import whom: a module imports from layers below its own, so there is no cycle (docs/architecture.md)."""

import ast
import pathlib
from collections.abc import Iterator

from conftest import ROOT

# From the ground up. A name is a file or folder of the package; those of one line do not import one another. A folder
# within a folder is a layer of its own where it is named here.
LAYERS = [
    "terminal",
    "errors files hardware record drawing cpu_threads",
    "program_cache cpu_speed",
    "layouts",
    "nn",
    "spec",
    "sources named_run",
    "attention._engine",
    "attention._base",
    "attention position ffn tasks",
    "norm memory",
    "depth optimizer",
    # All above are shelves or what they stand on: they know nothing of configs, models and training.
    "config",
    "model progress",
    "generate supervise",
    "engines",
    "measure",
    "train",
    "check doctor",
    "bench shelves compare plan",
    "report",
    "attention_maps",
    "api",
    "experiment",
    "cli",
    "__main__",
]
SHELVES = {"attention", "attention._base", "attention._engine", "position", "norm", "ffn", "depth", "memory"}
SHELVES |= {"tasks", "optimizer"}
ABOVE_SHELVES = {"config", "model", "train"}
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def layer(module: str) -> str:
    """The layer of a module, by the longest name that it begins with."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in names if name in LEVELS), parts[0])


def modules(package: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every module of a package by its name without the package's: attention.local, attention, spec."""
    files = {file.relative_to(package).with_suffix("").parts: file for file in sorted(package.rglob("*.py"))}
    return {".".join(part for part in parts if part != "__init__"): file for parts, file in files.items()}


def imported(file: pathlib.Path, package: str, known: dict[str, pathlib.Path]) -> Iterator[tuple[int, str]]:
    """(line, module) for everything of the package that a file imports, within functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports here are absolute"
            whole = [f"{node.module}.{name}" for name in names]
            names = [name if name.removeprefix(f"{package}.") in known else str(node.module) for name in whole]
        for name in names:
            if name.startswith(f"{package}."):
                yield node.lineno, name.removeprefix(f"{package}.")


def upward(package: pathlib.Path) -> dict[tuple[str, str], str]:
    """Imports of a layer that is not below the module's own: (module, layer imported) -> the place."""
    known, places = modules(package), {}
    for module, file in known.items():
        for line, name in imported(file, package.name, known) if module else ():
            mine, other = layer(module), layer(name)
            for each in (mine, other):
                assert each in LEVELS, f"{each} has no place in LAYERS of {pathlib.Path(__file__).name}"
            if mine != other and LEVELS[other] >= LEVELS[mine]:
                places[module, other] = f"{file}:{line}"
    return places


def test_imports_go_down():
    places = upward(ROOT / "xformers_lab")
    upward_imports = [f"{place} imports {other}" for (_, other), place in places.items()]
    assert not upward_imports, "imports go down alone: " + ", ".join(upward_imports)


def test_shelves_know_nothing_of_configs_models_and_training():
    for name in ABOVE_SHELVES:
        assert all(LEVELS[shelf] < LEVELS[name] for shelf in SHELVES)


def test_planted_imports_are_found(tmp_path):
    package = tmp_path / "planted"
    files = {
        "errors.py": "import json",
        "attention/__init__.py": "from planted import errors\nfrom planted.attention import local",
        "attention/local.py": "def late():\n    from planted.model.decoder import Decoder",
        "model/__init__.py": "import planted.attention.local",
        "model/decoder.py": "from planted import config, model",
        "position/rope.py": "import planted.attention",
        "config.py": "from planted import train as late",
        "train/loop.py": "",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (package / "train" / "__init__.py").touch()
    assert {where: place.rpartition(":")[2] for where, place in upward(package).items()} == {
        ("attention.local", "model"): "2",
        ("config", "train"): "1",
        ("position.rope", "attention"): "1",
    }
