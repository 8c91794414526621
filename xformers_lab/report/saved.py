"""The rows that a comparison left in a file, read so that whatever is drawn of them can be drawn.

Rows travel as JSON and may be of another version, cut off, or edited: each value that reports use is of the kind that
the schema says, or the file is refused with the place. Nothing that the rows name is looked up or run.
"""

import functools
import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xformers_lab.errors import UsageError
from xformers_lab.record import PLACES, Record

# How deep a value may be nested: a config has sections and lists.
DEPTH = 20
# Lists of points, by the number of values that a point may have.
POINTS = {"curve": (2, 3), "validation": (3,)}
# What is nested in a row -> whether it is a list of mappings, or one mapping.
NESTED = {
    "by_length": True,
    "wrong": True,
    "matched.changed": False,
    "shared.knobs": False,
    "tuning.best": False,
    "tuning.points": True,
}
NUMBERS = {"seconds_rounds": None, "metric_interval": 2, "plane": 2}
# Numbers beyond are none that a run, its data or a clock has.
LARGEST = 1e30
MEND = "run xlab compare again"


class Odd(ValueError):
    """A value of a row that reports cannot draw: the message says which, and what should be there."""


class Comparison(NamedTuple):
    """What `compare` keeps: its rows, the keys that vary, the command, and what was said of the whole, its notes."""

    rows: list[dict]
    varied: list[str]
    command: str
    notes: list[str]


def read(path: pathlib.Path) -> Comparison:
    """A comparison that was kept; raises UsageError."""
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
    try:
        for key, kind in {"rows": list, "varied": list, "command": str}.items():
            _check(isinstance(saved.get(key), kind), key, saved.get(key), _NAMES[kind])
        rows, varied = saved["rows"], saved["varied"]
        for at, key in enumerate(varied):
            _check(isinstance(key, str), f"varied[{at}]", key, "text")
        notes = saved.get("notes", [])  # older versions kept none
        _check(
            isinstance(notes, list) and all(isinstance(note, str) for note in notes), "notes", notes, "a list of texts"
        )
        for at, row in enumerate(rows):
            _check(isinstance(row, dict), f"rows[{at}]", row, "a mapping")
            check_row(row, varied, f"rows[{at}].")
    except Odd as odd:
        raise UsageError(f"{path}: {odd}; {MEND}") from None
    return Comparison(*map(sound, (rows, varied, saved["command"], notes)))


def check_row(row: dict, varied: Sequence[str], before: str = "") -> None:
    """Raises Odd at the first value of a row that is not of its kind; the place begins with `before`."""
    hints = _hints()
    shown = before.rstrip(".") or "it"
    _check(not _deeper(row, DEPTH), shown, "values in more than " + str(DEPTH) + " levels", "values less deep")
    for key, value in row.items():
        place = f"{before}{key}"
        if key in POINTS:
            widths = POINTS[key]
            fits = isinstance(value, list) and all(
                isinstance(point, list)
                and len(point) in widths
                and _is_number(point[0])
                and all(one is None or _is_number(one) for one in point)
                for point in value
            )
            _check(fits or value is None, place, value, f"a list of points of {' or '.join(map(str, widths))} numbers")
        elif key in NUMBERS:
            width = NUMBERS[key]
            fits = isinstance(value, list) and all(map(_is_number, value)) and len(value) == (width or len(value))
            _check(fits or value is None, place, value, f"a list of {width or 'any number of'} numbers")
        elif key in hints:
            kinds = _kinds(hints[key])
            _check(value is None or any(_IS[kind](value) for kind in kinds), place, value, _NAMES[kinds[0]])
    for path, listed in NESTED.items():
        value = row
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        mappings = value if listed and isinstance(value, list) else [value]
        fits = isinstance(value, list) == listed and all(isinstance(one, dict) for one in mappings)
        _check(fits or value is None, f"{before}{path}", value, "a list of mappings" if listed else "a mapping")
    for key in ("model", "train"):
        section = (row.get("config") or {}).get(key)
        right = section is None or _is_scalar(section) or isinstance(section, dict)
        _check(right, f"{before}config.{key}", section, "a mapping")
    machine = row.get("machine") or {}
    _check(all(isinstance(word, str) for word in machine.values()), f"{before}machine", machine, "texts")
    for key in dict.fromkeys([*PLACES, *varied]):
        for values, place in ((row, f"{before}{key}"), (row.get("config") or {}, f"{before}config.{key}")):
            value = values.get(key)
            section = values is not row and isinstance(value, dict)  # "model" is a section of a config too
            _check(value is None or _is_scalar(value) or section, place, value, "one value")
            if key == "seq_len" and value is not None:
                _check(_is_whole(value, 1, 2**53), place, value, "a whole number of tokens")
            if key in ("task", "pass") and value is not None:
                _check(isinstance(value, str), place, value, "text")


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Record)


def _check(right: bool, place: str, value: object, wanted: str) -> None:
    if not right:
        shown = _called(value) if value is None or isinstance(value, dict | list) else repr(value)[:60]
        place = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in place[:100])
        raise Odd(f"{place} is {shown}, where {wanted} should be")


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


def sound(value: Any) -> Any:
    """The same value with every half of a surrogate pair, which no file can hold, replaced."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {sound(key): sound(item) for key, item in value.items()}
    return [sound(item) for item in value] if isinstance(value, list) else value
