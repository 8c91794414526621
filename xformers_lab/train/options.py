"""What an evaluation changes of a config: options of the run's own choices, and keys of its model that are no choice.

`depth.threshold` is the option of the choice that the run has for its depth, `layers` a key. Where choices are cycled
over the layers, an option is changed in each one that has it.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.config import LEAVES, Config
from xformers_lab.errors import UsageError, nearest

CHOICES = [key for key, (path, field, _) in LEAVES.items() if field.metadata["shelf"] and path[0] != "train"]
KEYS = [key for key, (path, field, _) in LEAVES.items() if path[0] == "model" and not field.metadata["shelf"]]


@dataclasses.dataclass(frozen=True)
class Change:
    """name: "depth.threshold"; was, now: the value that it was trained with, different ones of a cycle with + between
    them, and the one asked for; where: which choices of a cycle have the option and which have not, in words, empty
    where all have; kinds: the classes of those that have it, none of a key that is no choice."""

    name: str
    was: Any
    now: Any
    where: str = ""
    kinds: tuple[type, ...] = ()


def parted(name: str, where: str = "") -> tuple[str, str]:
    """The key of a config, and the option of its choice, that a name means; the option of a key that is no choice is
    empty. Raises UsageError."""
    where = where or name
    key, dot, option = name.partition(".")
    if (option and key in CHOICES) or name in KEYS:
        return key, option
    if key in CHOICES:
        raise UsageError(f"{where}: eval keeps a run's choices; name what changes of it, {key}.OPTION=value")
    known = nearest(key, CHOICES, "choices") if dot else nearest(key, ["seq_len", *KEYS], "keys")
    raise UsageError(
        f'{where}: eval takes no "{key}": {known}; it scores a run as it is, at other lengths or with other options if '
        "asked: seq_len=64,128 attention.window=16"
    )


def grid(config: Config, kind: str, asked: Mapping[str, str | Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values asked for, each once, typed; a text is read as a word of a command is. kind: the
    model's, `auto` resolved. Raises UsageError, also where no choice of the run has such an option."""
    axes = {name: list(dict.fromkeys(_values(config, kind, name, given))) for name, given in asked.items()}
    if (rows := math.prod(map(len, axes.values()))) > configs.MOST_CELLS:
        raise UsageError(f"these options make {rows:,} rows; at most {configs.MOST_CELLS:,} at once")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def changed(config: Config, kind: str, asked: Mapping[str, Any]) -> tuple[Config, list[Change]]:
    """The config with other values of options, and what changes; as of `grid`."""
    changes = []
    for name, value in asked.items():
        key, option = parted(name)
        if not option:
            changes.append(Change(name, configs.get(config, key), value))
            config = configs.edit(config, **{key: value})
            continue
        having = _having(config, kind, name)
        was = list(dict.fromkeys(choice.options[option] for choice in having.values()))
        trained = was[0] if len(was) == 1 else "+".join(map(spec.show, was))
        kinds = tuple(spec.entry(_shelf(key), choice.name) for choice in having.values())
        changes.append(Change(name, trained, value, _where(_parts(config, kind, key), having), kinds))
        parts = [_with(part, option, value) if part in having else part for part in _parts(config, kind, key)]
        config = configs.edit(config, **{key: "+".join(parts)})
    return config, changes


def _values(config: Config, kind: str, name: str, given: str | Sequence[Any]) -> list[Any]:
    key, option = parted(name)
    of = LEAVES[key][2]
    if option:
        choice = next(iter(_having(config, kind, name).values()))
        of = spec.options(spec.entry(_shelf(key), choice.name))[option].type
    values = configs.spread(given, of, f"{name}={given}") if isinstance(given, str) else list(given)
    if not values:
        raise UsageError(f"{name}: an empty list")
    if not option:
        return [configs.typed(key, value) for value in values]
    plain = lambda value: spec.bare(value) if isinstance(value, str) else value
    return [spec.coerce(plain(value), of, f"{name}={spec.show(value)}") for value in values]


def _having(config: Config, kind: str, name: str) -> dict[str, spec.Choice]:
    """Those of a key's choices that have an option, each with all of its options typed; raises UsageError where none
    has it."""
    key, option = parted(name)
    resolved = {part: spec.resolve(_shelf(key), part) for part in _parts(config, kind, key)}
    if having := {part: choice for part, choice in resolved.items() if option in choice.options}:
        return having
    known = {each for choice in resolved.values() for each in choice.options}
    hint = nearest(option, known, "options") if known else "it has no options"
    raise UsageError(f'{name}: the run has {key}={"+".join(resolved)}, without an option "{option}": {hint}')


def _where(parts: list[str], having: Mapping[str, spec.Choice]) -> str:
    without = [part for part in dict.fromkeys(parts) if part not in having]
    return f" in {' and '.join(having)}, not in {' and '.join(without)}" if without else ""


def _with(part: str, option: str, value: Any) -> str:
    choice = spec.parse(part)
    return str(spec.Choice(choice.name, choice.options | {option: value}))


def _parts(config: Config, kind: str, key: str) -> list[str]:
    """The choices that a config has under a key: several of one that is cycled."""
    value = kind if key == "model" else configs.get(config, key)
    return spec.split(value, "+") if LEAVES[key][1].metadata["cycle"] else [value]


def _shelf(key: str) -> str:
    return LEAVES[key][1].metadata["shelf"]
