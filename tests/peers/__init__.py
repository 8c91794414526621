"""Other implementations, run where a test asks for their numbers: a function for each file of ../shared/golden.

A function builds a peer from its own package, with small random weights, and returns what the file holds: inputs,
weights under `w.<torch name>`, outputs, and the hyper-parameters as "meta". With GOLDEN=live the fixture `golden` calls
it instead of reading the file, so that the same tests hold the laboratory to the packages as they are installed.

Files with `_` are helpers. The others import a peer's package, so none is imported before a test asks for a name of it.
"""

import ast
import importlib
import pathlib

SEED = 0


def names() -> dict[str, str]:
    """Every name that can be run, and the file of this folder that has its function; imports nothing."""
    files = [path for path in sorted(pathlib.Path(__file__).parent.glob("*.py")) if not path.stem.startswith("_")]
    return {
        node.name: path.stem
        for path in files
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def live(name: str) -> dict:
    """Runs one peer: {name: array}, and its hyper-parameters as "meta". ImportError names a package that is missing."""
    function = getattr(importlib.import_module(f"peers.{names()[name]}"), name)
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        case = {"meta": {}} | function()
    return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in case.items()}
