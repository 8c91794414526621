"""Golden tests can be run without their files: every name they ask for can come from the peer itself."""

import ast
import pathlib
import sys
from collections.abc import Iterator

import peers
import pytest

TESTS = pathlib.Path(__file__).parents[1]


def parametrised(test: ast.FunctionDef, used: set[str]) -> list[dict]:
    """The values of those of a test's parameters that are used, case by case; [{}] where none is."""
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parametrize":
            parameters = [name.strip() for name in ast.literal_eval(mark.args[0]).split(",")]
            if used & set(parameters):
                cases = ast.literal_eval(mark.args[1])
                return [dict(zip(parameters, case if len(parameters) > 1 else [case], strict=True)) for case in cases]
    return [{}]


def asked() -> Iterator[str]:
    """What tests give to `golden`, read from their source."""
    for path in TESTS.rglob("test_*.py"):
        for test in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(test, ast.FunctionDef) or "golden" not in {name.arg for name in test.args.args}:
                continue
            for call in ast.walk(test):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "golden":
                    used = {node.id for node in ast.walk(call.args[0]) if isinstance(node, ast.Name)}
                    for case in parametrised(test, used):
                        yield eval(ast.unparse(call.args[0]), {}, case)


def test_every_name_can_be_run_live():
    names = set(asked())
    assert {"dense_mha", "nystrom_lucidrains", "reformer_local_causal"} <= names  # plain, parametrised, put together
    assert not names - set(peers.names())


def test_a_package_that_is_missing_is_named(request, monkeypatch):
    monkeypatch.setenv("GOLDEN", "live")
    monkeypatch.delitem(sys.modules, "peers.torch_layers", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(pytest.skip.Exception, match=r"GOLDEN=live: .*torch"):
        request.getfixturevalue("golden")("dense_mha")
