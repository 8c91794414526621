"""A class of the user's own as a choice: the name of a file that defines it, which workers import.

A class that stands in a file called like it is that file. Any other, of a notebook's cell or a script, is written into
a file of the folder of runs, with the imports, constants and helpers that it uses: RUNS/source-DIGEST/my_class.py. The
digest is of the text, so that a class that was changed is another choice, and another run.
"""

import ast
import builtins
import functools
import hashlib
import importlib.util
import inspect
import linecache
import math
import pathlib
import re
import symtable
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xformers_lab import files, spec
from xformers_lab.errors import UsageError

PACKAGE = __name__.partition(".")[0]
# Of compiled code: its file has `from __future__ import annotations`.
POSTPONED = 0x1000000


class _Definition(NamedTuple):
    """Where something is defined. source: all that stands there, another definition or a notebook's cell; postponed:
    its annotations are never evaluated; closed: the values of the functions around it that it uses."""

    text: str
    source: ast.Module
    postponed: bool
    closed: Mapping[str, Any]


def called(value: Any) -> str:
    """What a class or a function is called; also one with options, as `functools.partial` has them."""
    return called(value.func) if isinstance(value, functools.partial) else getattr(value, "__name__", repr(value))


def choice(value: Any, folder: pathlib.Path) -> str:
    """The choice that a class or a function is, `NAME:option=value` with the options of a `functools.partial`. folder:
    that of the runs, where the source of a class that stands in no file of its own is written. Raises UsageError."""
    if not isinstance(value, functools.partial):
        return str(spec.Choice(_name(value, folder), {}))
    if value.args:
        raise UsageError(f"{called(value)}: options have names: functools.partial({called(value)}, window=8)")
    return str(spec.Choice(_name(value.func, folder), dict(value.keywords)))


def _name(value: Any, folder: pathlib.Path) -> str:
    """A name on a shelf, a dotted module, or a path."""
    module = value.__module__ or ""
    last = module.rpartition(".")[2]
    if module.startswith(f"{PACKAGE}."):
        for shelf in spec.SHELVES:
            if last in spec.names(shelf) and spec.entry(shelf, last) is value:
                return last
    home = sys.modules.get(module)
    file = pathlib.Path(getattr(home, "__file__", None) or "")
    its_own = file.suffix == ".py" and home is not None and spec.named_like(home, file.stem) is value
    if home is not None and its_own and home.__name__ != "__main__":
        # Only by its dotted name can it import from the package that it is a part of.
        return home.__name__ if "." in home.__name__ else _short(file)
    return _written(value, folder)


def _short(file: pathlib.Path) -> str:
    """The path as a command in this folder has it, so that both mean the same run."""
    here = pathlib.Path.cwd()
    return str(file.resolve().relative_to(here)) if file.resolve().is_relative_to(here) else str(file)


def _written(value: Any, folder: pathlib.Path) -> str:
    """The path of a new file that defines it."""
    stem = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", called(value)).lower()
    try:
        text = source(value)
    except _Unknown as unknown:
        raise UsageError(
            f"{called(value)}: {unknown}; put the class into a file called {stem}.py, with all that it uses, and give "
            "the path of that file in its place"
        ) from None
    path = folder / f"source-{hashlib.sha256(text.encode()).hexdigest()[:12]}" / f"{stem}.py"
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            files.replace_text(path, text)
    except OSError as error:
        raise UsageError(f"{path}: the source of {called(value)} cannot be written there ({error.strerror})") from None
    return str(path)


class _Unknown(Exception):
    """Something cannot be written down; the message says what, and why."""


def source(value: Any) -> str:
    """A module's text that defines a class or a function as it is: what it uses of where it stands, then itself."""
    imports: dict[str, None] = {}
    parts: dict[str, str] = {}
    postponed = _define(value, imports, parts)
    future = ["from __future__ import annotations"] if postponed else []
    return "\n".join([*future, *sorted(imports), "", *parts.values()]).strip() + "\n"


def _define(value: Any, imports: dict[str, None], parts: dict[str, str]) -> bool:
    """Add what a definition uses, then itself; -> whether any of them has postponed annotations."""
    name = called(value)
    definition = _definition(value)
    around = vars(sys.modules.get(value.__module__, builtins)) | dict(definition.closed)
    postponed = definition.postponed
    parts[name] = ""  # which uses itself, or is used by what it uses
    for used in _used(definition.text):
        if used in parts:
            continue
        if used not in around:
            if hasattr(builtins, used) or used.startswith("__"):
                continue
            raise _Unknown(f"it uses {used}, which is not defined where {name} stands")
        postponed |= _provide(used, around[used], value, definition, imports, parts)
    del parts[name]
    parts[name] = definition.text
    return postponed


def _provide(
    name: str, value: Any, user: Any, definition: _Definition, imports: dict[str, None], parts: dict[str, str]
) -> bool:
    """Add what binds a name to a value; -> whether that has postponed annotations."""
    if getattr(value, "__module__", None) == user.__module__ and getattr(value, "__name__", None) == name:
        return _define(value, imports, parts)  # not imported, so that it is a part of the digest
    if found := _imports(name, value, definition.source):
        imports |= dict.fromkeys(found)
        return False
    text = _literal(value)
    if text is None:
        raise _Unknown(f"it uses {name}, of type {type(value).__name__}, which cannot be written down")
    parts[name] = f"{name} = {text}\n"
    return False


def _literal(value: Any) -> str | None:
    """A constant as Python has it, a set in an order that is the same in every process; None for anything else."""
    kind = type(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if kind in (int, complex, bool, str, bytes, types.NoneType):
        return repr(value)
    if kind is dict:
        texts = [(_literal(key), _literal(inner)) for key, inner in value.items()]
        pairs = [f"{key}: {inner}" for key, inner in texts if key is not None and inner is not None]
        return "{" + ", ".join(pairs) + "}" if len(pairs) == len(value) else None
    if kind not in (list, tuple, set):
        return None
    inner = [text for each in value if (text := _literal(each)) is not None]
    if len(inner) < len(value):
        return None
    if kind is set:
        return "{" + ", ".join(sorted(inner)) + "}" if inner else "set()"
    return f"[{', '.join(inner)}]" if kind is list else f"({', '.join(inner)}{',' * (len(inner) == 1)})"


def _used(text: str) -> list[str]:
    """The names that a module of this text takes from outside of it."""
    used: dict[str, None] = {}

    def look(table: symtable.SymbolTable, outermost: bool) -> None:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (not symbol.is_assigned() if outermost else symbol.is_global()):
                used.setdefault(symbol.get_name())
        for inner in table.get_children():
            look(inner, False)

    look(symtable.symtable(text, "<source>", "exec"), True)
    return list(used)


# ---- where it stands ---------------------------------------------------------------------------------------------


def _definition(value: Any) -> _Definition:
    """Raises _Unknown where the text is not to be had, as of what was typed at a plain prompt."""
    name, functions = called(value), list(_functions(value))
    places = [(_text(each.__code__.co_filename), each.__code__.co_firstlineno) for each in functions]
    if not functions:  # a class without any is told by its name: the latest so called
        file = getattr(sys.modules.get(value.__module__), "__file__", None)
        places = [(text, None) for text in ([_text(file)] if file else reversed(_cells()))]
    for text, line in places:
        tree, lines = _parsed(text), text.splitlines(keepends=True)
        named = [one for one in ast.walk(tree) if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == name]
        for node in reversed(named):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            last = node.end_lineno or first
            if line is None or first <= line <= last:
                text = textwrap.dedent("".join(lines[first - 1 : last])).rstrip() + "\n"
                postponed = any(each.__code__.co_flags & POSTPONED for each in functions)
                return _Definition(text, tree, postponed, _closed(value))
    raise _Unknown("its source is not to be had")


def _text(file: str) -> str:
    return "".join(linecache.getlines(file))


def _cells() -> list[str]:
    """What was typed into a notebook, which no file has, in order."""
    return ["".join(entry[2]) for entry in list(linecache.cache.values()) if len(entry) > 1 and not entry[1]]


def _functions(value: Any) -> Iterator[Any]:
    """The functions that a class defines, or the function itself, without what decorators put around them."""
    for member in vars(value).values() if isinstance(value, type) else [value]:
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        inner = inspect.unwrap(member) if callable(member) else None
        if hasattr(inner, "__code__"):
            yield inner


def _closed(value: Any) -> dict[str, Any]:
    """What functions around a definition gave it."""
    closed = {}
    for function in _functions(value):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                closed[name] = cell.cell_contents
            except ValueError:  # not bound yet
                continue
    closed.pop("__class__", None)
    return closed


def _imports(name: str, value: Any, source: ast.Module) -> list[str]:
    """The statements that import a value by a name: those of where it is used, or of other cells of a notebook, else
    one that its own home makes. Empty where it is of no module."""
    for tree in (source, *map(_parsed, _cells())):
        statements = dict.fromkeys(
            ast.unparse(statement) for statement in _importing(name, tree) if _binds(statement, name, value)
        )
        if statements:
            return list(statements)
    if inspect.ismodule(value):
        statement = f"import {value.__name__} as {name}"
    else:
        home, known = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if not isinstance(home, str) or home == "__main__" or not known.isidentifier():
            return []
        statement = f"from {home} import {known} as {name}" if known != name else f"from {home} import {name}"
    return [statement] if _importable(value) and _binds(ast.parse(statement).body[0], name, value) else []


def _importing(name: str, tree: ast.Module) -> Iterator[ast.stmt]:
    """The imports that bind a name, each of it alone; those within a package have no meaning elsewhere."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name.partition(".")[0]) != name:
                continue
            if isinstance(node, ast.Import):
                yield ast.Import([alias])
            elif node.level == 0:
                yield ast.ImportFrom(node.module, [alias], 0)


def _binds(statement: ast.stmt, name: str, value: Any) -> bool:
    """Whether an import, which this process has made before, gives the very value."""
    names: dict[str, Any] = {}
    try:
        exec(compile(ast.fix_missing_locations(ast.Module([statement], [])), "<import>", "exec"), names)
    except Exception:
        return False
    return names.get(name) is value


def _importable(value: Any) -> bool:
    """Whether another process finds the module of a value: that of a notebook or a script is none."""
    home = value.__name__ if inspect.ismodule(value) else value.__module__
    return home != "__main__" and importlib.util.find_spec(home.partition(".")[0]) is not None


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.Module([], [])
