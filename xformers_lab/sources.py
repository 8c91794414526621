"""Code outside the package that a config names: which files it would run, and what is in them, without running any.

A config that was typed is its writer's wish. One that lies in a file, be it a run's config.json, a @file.toml or the
rows of a comparison, only names things, and names may lead to code that somebody else put there or changed meanwhile.
"""

import hashlib
import importlib.machinery
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from xformers_lab import spec
from xformers_lab.errors import UsageError


def of(tree: Any) -> dict[str, str]:
    """Every file or module outside the package that the values of a nested or flat mapping name as a choice, or as one
    in the options of a choice -> the sha256 of what it would run. What is not there is left out."""
    digests = ((name, _digest(name)) for name in sorted(set(_named(tree))))
    return {name: digest for name, digest in digests if digest is not None}


def differing(tree: Any, trusted: Mapping[str, Any]) -> str | None:
    """The first thing that a mapping names outside the package whose source is not what `trusted`, an earlier `of`,
    says of it; in words, None where there is none."""
    for name, digest in of(tree).items():
        if name not in trusted:
            return f"{name}, of which no source is stored"
        if trusted[name] != digest:
            return f"{name}, which changed since"
    return None


def _named(value: Any) -> Iterator[str]:
    """The names in a value of whatever type: a file may hold anything."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "runs":
                yield from _named(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _named(item)
    elif isinstance(value, str):
        # A comma sweeps in some files, and is a part of a path in others.
        for text in dict.fromkeys([value, *spec.split(value, ",")]):
            for part in spec.members(text):
                yield from _chosen(part)


def _chosen(text: str) -> Iterator[str]:
    try:
        choice = spec.parse(text)
    except UsageError:  # so it is refused before it is looked up
        return
    if "." in choice.name:
        yield choice.name
    for key, option in choice.options.items():
        if key != "path":  # data, which may well be Python's text
            yield from _named(option)


def _digest(name: str) -> str | None:
    files = [_located(name)] if _is_python(name) else _module_files(name)
    whole = hashlib.sha256()
    try:
        for file in files:
            whole.update(hashlib.sha256(file.read_bytes()).digest())
    except (OSError, ValueError):
        return None
    return whole.hexdigest() if files else None


def _is_python(name: str) -> bool:
    """Whether it names a Python file: the path's own suffix, for a/b.py/ and a/b.py/. are a/b.py."""
    return _located(name).suffix == ".py"


def _located(name: str) -> pathlib.Path:
    try:
        return spec.located(name, name)
    except UsageError:
        return pathlib.Path(name)


def _module_files(name: str) -> list[pathlib.Path]:
    """What importing a dotted name runs: its packages from the outermost on, then itself. Empty for a module of this
    package, and for what is none."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts) or parts[0] == __package__:
        return []
    files: list[pathlib.Path] = []
    where = [*([] if str(pathlib.Path.cwd()) in sys.path else [str(pathlib.Path.cwd())]), *sys.path]
    for count in range(1, len(parts) + 1):
        try:
            whole = ".".join(parts[:count])
            spot = importlib.machinery.PathFinder.find_spec(whole, where)
            if spot is None and count == 1:  # an outermost one is not run by being looked for
                spot = importlib.util.find_spec(whole)
        except (ImportError, ValueError):
            break
        if spot is None:
            break
        if spot.origin and spot.has_location:
            files.append(pathlib.Path(spot.origin))
        if spot.submodule_search_locations is None:
            break
        where = list(spot.submodule_search_locations)
    return files
