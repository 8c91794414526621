"""One reader of what the functions take: words as on the command line, keys with their values, configs, classes."""

import functools
import inspect
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.api import own
from xformers_lab.errors import UsageError

What = str | Mapping[str, Any] | configs.Config | Sequence[Mapping[str, Any] | configs.Config]
"""A word ("attention=full,local"), keys with their values, a config, or a list of these."""
Function = TypeVar("Function", bound=Callable)


def items(what: Sequence[What], keys: Mapping[str, Any]) -> list[configs.Item]:
    """What `config.study` reads of what a function was given: `what` by place, `keys` by name, which win.

    A class of the user's own becomes the name of a file in the folder of runs that is asked for. Raises UsageError
    where its source is not to be had.
    """
    given = [*what, *([keys] if keys else [])]
    folder = _folder(given)
    return [_plain(item, folder) for item in given]


def documented(*, study: bool = False, place: bool = False) -> Callable[[Function], Function]:
    """Write the keys that a function takes, with their defaults, below its docstring, as `--help` has them."""

    def write(function: Function) -> Function:
        lines = [inspect.getdoc(function) or ""]
        if study:
            lines += ["", "Keys of the whole study:", *configs.help_lines(configs.STUDY)]
        lines += ["", "Keys:", *configs.help_lines(configs.LEAVES)]
        if place:
            lines += ["", "Keys of each of several processes of one run:", *configs.help_lines(configs.PLACE)]
        function.__doc__ = "\n".join(lines)
        return function

    return write


def _folder(given: Iterable[Any]) -> pathlib.Path:
    """The folder of runs that is asked for last."""
    folder = configs.Config().runs
    for item in given:
        if isinstance(item, str) and item.startswith("runs="):
            folder = item.partition("=")[2]
        elif isinstance(item, configs.Config):
            folder = item.runs
        elif isinstance(item, Mapping):
            folder = item.get("runs", folder)
    return spec.located(folder, "runs")


def _plain(item: Any, folder: pathlib.Path) -> Any:
    """The same without classes, every sequence a list."""
    if isinstance(item, str | configs.Config):
        return item
    if isinstance(item, Mapping):
        return {key: _value(value, folder) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_plain(each, folder) for each in item]
    raise UsageError(
        f"{item!r} is no key=value, mapping or Config; a class of your own is a value: attention={own.called(item)}"
        if callable(item)
        else f"{item!r} is a {type(item).__name__}, not a word, a mapping, a Config or a list of these"
    )


def _value(value: Any, folder: pathlib.Path) -> Any:
    """The value of a key as files have it."""
    if isinstance(value, Mapping):
        return {key: _value(inner, folder) for key, inner in value.items()}
    if isinstance(value, list | tuple | range) or type(value).__name__ == "ndarray":
        return [_value(each, folder) for each in value]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, type | functools.partial) or inspect.isroutine(value):
        return own.choice(value, folder)
    return value
