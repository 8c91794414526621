"""The rows that a comparison left in a file, read so that whatever is drawn of them can be drawn.

Rows travel as JSON and may be of another version, cut off, or edited: each value that reports use is of the kind that
the schema says, or the file is refused with the place. Nothing that the rows name is looked up or run.
"""

import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from xformers_lab.errors import UsageError
from xformers_lab.record import PLACES, Record

# How deep a value may be nested: a config has sections and lists.
DEPTH = 20
# Lists of points, by the number of values that each point has.
POINTS = {"curve": (3, 2), "validation": (3,)}  # of a curve without seconds, as older versions left it, two
NUMBERS = {"seconds_rounds": None, "metric_interval": 2, "plane": 2}
# Numbers beyond are none that a run, its data or a clock has.
LARGEST = 1e30
MEND = "run xlab compare again"


def read(path: pathlib.Path) -> tuple[list[dict], list[str], str]:
    """The rows, the keys that vary, and the command of a comparison; raises UsageError."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no comparison there yet; run xlab compare, or name its folder with --runs") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise UsageError(f"{path}: not a saved comparison (nested too deeply); {MEND}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not a saved comparison ({str(error)[:200]}); {MEND}") from None
    if not isinstance(saved, dict):
        raise UsageError(f"{path}: not a saved comparison (it holds no rows, varied and command); {MEND}")
    for key, kind in {"rows": list, "varied": list, "command": str}.items():
        _check(isinstance(saved.get(key), kind), path, key, saved.get(key), _NAMES[kind])
    rows, varied = saved["rows"], saved["varied"]
    for at, key in enumerate(varied):
        _check(isinstance(key, str), path, f"varied[{at}]", key, "text")
    for at, row in enumerate(rows):
        _check(isinstance(row, dict), path, f"rows[{at}]", row, "a mapping")
        _check_row(row, varied, path, f"rows[{at}]")
    return [_sound(row) for row in rows], [_sound(key) for key in varied], _sound(saved["command"])


def _check_row(row: dict, varied: Sequence[str], path: pathlib.Path, where: str) -> None:
    hints = typing.get_type_hints(Record)
    _check(not _deeper(row, DEPTH), path, where, "values in more than " + str(DEPTH) + " levels", "values less deep")
    for key, value in row.items():
        place = f"{where}.{key}"
        if key in POINTS:
            widths = POINTS[key]
            fits = isinstance(value, list) and all(
                isinstance(point, list)
                and len(point) in widths
                and _is_number(point[0])
                and all(one is None or _is_number(one) for one in point)
                for point in value
            )
            _check(fits or value is None, path, place, value, f"a list of points of {widths[0]} numbers")
        elif key in NUMBERS:
            width = NUMBERS[key]
            fits = isinstance(value, list) and all(map(_is_number, value)) and len(value) == (width or len(value))
            _check(fits or value is None, path, place, value, f"a list of {width or 'any number of'} numbers")
        elif key in hints:
            kinds = _kinds(hints[key])
            _check(value is None or any(_IS[kind](value) for kind in kinds), path, place, value, _NAMES[kinds[0]])
    for key in ("model", "train"):
        section = (row.get("config") or {}).get(key)
        right = section is None or _is_scalar(section) or isinstance(section, dict)
        _check(right, path, f"{where}.config.{key}", section, "a mapping")
    machine = row.get("machine") or {}
    _check(all(isinstance(word, str) for word in machine.values()), path, f"{where}.machine", machine, "texts")
    for key in dict.fromkeys([*PLACES, *varied]):
        for values, place in ((row, f"{where}.{key}"), (row.get("config") or {}, f"{where}.config.{key}")):
            value = values.get(key)
            section = values is not row and isinstance(value, dict)  # "model" is a section of a config too
            _check(value is None or _is_scalar(value) or section, path, place, value, "one value")
            if key == "seq_len" and value is not None:
                _check(_is_whole(value, 1, 2**53), path, place, value, "a whole number of tokens")
            if key in ("task", "pass") and value is not None:
                _check(isinstance(value, str), path, place, value, "text")


def _check(right: bool, path: pathlib.Path, place: str, value: object, wanted: str) -> None:
    if not right:
        shown = _called(value) if value is None or isinstance(value, dict | list) else repr(value)[:60]
        place = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in place[:100])
        raise UsageError(f"{path}: {place} is {shown}, where {wanted} should be; {MEND}")


def _kinds(hint: Any) -> list[type]:
    """The kinds of values that a hint of the schema admits, without None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for one in arguments if one is not types.NoneType for kind in _kinds(one)]
    if origin is typing.Literal:
        return [str]
    origin = origin or hint
    if origin is Mapping:
        return [dict]
    return [list] if origin is Sequence else [origin]


def _is_number(value: object) -> bool:
    """A number that can be drawn, or NaN or an infinity, which are shown as a dash."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (isinstance(value, float) and not math.isfinite(value)) or abs(value) <= LARGEST


def _is_whole(value: object, least: int, below: int) -> bool:
    return isinstance(value, int | float) and least <= value < below and int(value) == value


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | bool) or _is_number(value)


_IS = {
    str: lambda value: isinstance(value, str),
    bool: lambda value: isinstance(value, bool),
    int: _is_number,
    float: _is_number,
    dict: lambda value: isinstance(value, dict),
    list: lambda value: isinstance(value, list),
}
_NAMES = {str: "text", bool: "true or false", int: "a number", float: "a number", dict: "a mapping", list: "a list"}


def _called(value: object) -> str:
    if value is None:
        return "missing"
    return _NAMES.get(type(value), type(value).__name__)


def _deeper(value: object, levels: int) -> bool:
    """Whether containers stand in each other more than so many levels deep."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(one, levels - 1) for one in inner)


def _sound(value: Any) -> Any:
    """The same with every half of a surrogate pair, which no file can hold, replaced."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_sound(key): _sound(item) for key, item in value.items()}
    return [_sound(item) for item in value] if isinstance(value, list) else value
