"""One grammar for choices: `name:option=value:option=value`.

A shelf is a folder; its listing is the registry. File name = config value = table row. The entry of a file is the one
class or function in it named like the file (`local.py` -> `Local`, `gated_delta.py` -> `GatedDelta`). An option is a
keyword-only parameter with a default; everything else in the signature comes from the lab.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable
from typing import Any

from xformers_lab.errors import BrokenChoice, UsageError, contained, nearest, said
from xformers_lab.nn.size import Size

_PACKAGE = pathlib.Path(__file__).parent
# Where each axis of a model and its training keeps its choices; a new choice is a file there, never an edit here.
SHELVES = {
    "attention": "attention",
    "position": "position",
    "norm": "norm",
    "normaliser": "norm/normaliser",
    "ffn": "ffn",
    "depth": "depth",
    "memory": "memory",
    "model": "model",
    "task": "tasks",
    "optimizer": "optimizer",
}
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_DEEPER = {"(": 1, ")": -1}
LONGEST_NAME = 4096  # characters of a path, and of all names that could be a choice's
_SUFFIXES = {"k": 1000, "m": 1000_000, "ki": 1024, "mi": 1024**2}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A parsed choice: `local:window=64` is Choice("local", {"window": "64"})."""

    name: str
    options: dict[str, object]

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return ":".join([_quoted(self.name), *(f"{key}={_quoted(show(value))}" for key, value in self.options.items())])


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a mechanism, as its constructor declares it."""

    name: str
    type: object
    default: object
    help: str


def names(shelf: str) -> list[str]:
    """The choices on a shelf: its files, without those that start with an underscore."""
    return sorted(file.stem for file in folder(shelf).glob("*.py") if not file.stem.startswith("_"))


def folder(shelf: str) -> pathlib.Path:
    """Where a shelf keeps its files; raises UsageError."""
    shelf = {"tasks": "task"}.get(shelf, shelf)
    if shelf not in SHELVES:
        raise UsageError(f'no shelf "{shelf}": {nearest(shelf, SHELVES, "shelves")}')
    return _PACKAGE / SHELVES[shelf]


def split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand in no brackets. One pass, however long the text."""
    parts, start, depth = [], 0, 0
    for mark in re.finditer(f"[(){re.escape(separator)}]", text):
        depth += _DEEPER.get(mark[0], 0)
        if mark[0] == separator and depth == 0:
            parts.append(text[start : mark.start()])
            start = mark.end()
    return [*parts, text[start:]]


def cycle(text: str, where: str = "", *, most: int) -> list[str]:
    """The choices of a cycle in turn: a+b, with how often each comes, 5*a+b, or several together, 2*(a+b)+c; raises
    UsageError at a count that is none, and at more than `most` choices."""
    where, choices, total = where or text, [], 0
    for part in split(text, "+"):
        count, inside = _counted(part)
        plain = all(choice and _counted(choice)[0] is None for choice in inside)
        if count is not None and not (plain and re.fullmatch("0*[1-9][0-9]{0,8}", count)):
            raise UsageError(
                f'{where}: "{part}": a choice comes a whole number of times in a cycle, at least once; write '
                "5*local+full for five local layers and a full one"
            )
        times = 1 if count is None else int(count)
        total += times * len(inside)
        choices += inside * times if total <= most else []
    if total > most:
        raise UsageError(f"{where}: a cycle of {total:,} choices; at most {most}")
    return choices


def members(text: str) -> list[str]:
    """What stands in a cycle, however often."""
    return [choice for part in split(text, "+") for choice in _counted(part)[1]]


def _counted(part: str) -> tuple[str | None, list[str]]:
    """A part of a cycle as how often it comes, in its own words, None where nothing is said, and the choices in it."""
    counted = re.match(r"([^*:=()/]*)\*(.*)", part, re.DOTALL)
    if counted is None:
        return None, [part]
    inside = counted[2].strip()
    return counted[1].strip(), split(bare(inside), "+") if bare(inside) != inside else [inside]


def bare(text: str) -> str:
    """The text without the one pair of brackets that encloses all of it, if there is one: (a) but not (a)|(b)."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for mark in re.finditer("[()]", text):
        depth += _DEEPER[mark[0]]
        if depth == 0:
            return text[1:-1] if mark.end() == len(text) else text
    return text


def parse(text: str, where: str = "") -> Choice:
    """Split `name:option=value:...`; raises UsageError where it cannot be read.

    What has a separator in it stands in brackets, which are no part of it: a choice with options as the value of an
    option, `pre:normaliser=(powernorm:decay=0.95)`, and a path, `lm:path=(a:b.txt)` or `(a:b.py):window=4`.
    """
    where, text = where or text, str(text).strip()
    whole = bare(text)
    text = text if _is_file(whole) and any("=" not in part for part in split(whole, ":")[1:]) else whole
    name, *rest = split(text, ":")
    name = bare(name)
    if not name:
        raise UsageError(f'{where}: a choice starts with a name, got "{text}"')
    options: dict[str, object] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(
                f'{where}: "{part}" is not option=value (write {name}:option=value:option=value; '
                "what has : or , in it, put it in brackets)"
            )
        if key in options:
            raise UsageError(f'{where}: option "{key}" is given twice')
        if value.startswith("(") and value.count("(") != value.count(")"):
            raise UsageError(f'{where}: the brackets of "{value}" are not closed')
        options[key] = bare(value)
    return Choice(name, options)


def _quoted(text: str) -> str:
    """The text in brackets if it needs them to be read back as one."""
    separated = any(len(split(text, separator)) > 1 for separator in ":,+")
    return f"({text})" if separated or bare(text) != text else text


def entry(shelf: str, name: str, where: str = "") -> Any:
    """The class or function behind a name on a shelf, a dotted module path, or the path of a Python file."""
    where = where or f"{shelf}={name}"
    module = _module(shelf, name, where)
    plain = module.__name__.rpartition(".")[2] if not _is_file(name) else pathlib.Path(name).stem
    if (named := named_like(module, plain)) is not None:
        return named
    camel = "".join(part.capitalize() for part in re.split("[_-]", plain))
    raise UsageError(f'{where}: {module.__file__} must define a class named like the file, "class {camel}"')


def named_like(module: types.ModuleType, name: str) -> Any:
    """The class or function of a module that is called like its file, MyAttention in my_attention.py; None without."""
    wanted = name.replace("_", "").replace("-", "").lower()
    for attribute, value in vars(module).items():
        if attribute.replace("_", "").lower() == wanted and callable(value):
            return value
    return None


def home(text: str) -> tuple[str, str]:
    """The shelf of a choice, and the choice: `depth/fixed`, or `depth=fixed` as configs say it, a name that one shelf
    alone has, or a module or file of one's own, whose class says by what it derives from where it belongs. Raises
    UsageError."""
    word, equals, value = text.partition("=")
    text = f"{word}/{value}" if equals and word in SHELVES else text
    shelf, slash, rest = text.partition("/")
    plain = parse(text).name
    if slash and shelf in SHELVES and not pathlib.Path(plain).is_file():
        return shelf, rest
    homes = [shelf for shelf in SHELVES if plain in names(shelf)]
    if len(homes) > 1:
        raise UsageError(f'"{plain}" is on several shelves: write {" or ".join(f"{home}/{plain}" for home in homes)}')
    if homes:
        return homes[0], text
    if not _is_file(plain) and "." not in plain:
        known = {choice for shelf in SHELVES for choice in names(shelf)}
        raise UsageError(f'no choice "{plain}" on any shelf: {nearest(plain, known, "there are")}')
    # A shelf's base class stands in its package, or in what is shared there.
    bases = [base.__module__ for base in getattr(entry("attention", plain, plain), "__mro__", ())]
    of_shelf = lambda module, package: module == package or module.startswith(f"{package}._")
    if derived := [shelf for shelf in SHELVES if any(of_shelf(base, _package(shelf)) for base in bases)]:
        return derived[0], text
    raise UsageError(f"{plain} derives from no shelf's class, so say where it belongs: for example normaliser/{plain}")


def options(build: Callable) -> dict[str, Option]:
    """What a constructor declares: keyword-only parameters with a default; help from the docstring's `Options:`."""
    try:
        with contained():
            hints = typing.get_type_hints(_constructor(build))
    except Exception as error:
        name, reason = getattr(build, "__name__", build), f"{type(error).__name__}: {error}"
        raise UsageError(
            f"{_file_of(build)}: the annotations of {name} cannot be read ({reason}); what they name must be imported "
            "where the file runs, not under TYPE_CHECKING alone"
        ) from None
    help_lines = _help_of_options(inspect.getdoc(build) or "")
    declared = {}
    for name, parameter in inspect.signature(_constructor(build)).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            kind = hints.get(name, type(parameter.default))
            declared[name] = Option(name, kind, parameter.default, help_lines.get(name, ""))
    return declared


def _help_of_options(docstring: str) -> dict[str, str]:
    """What a docstring's `Options:` say of each, on one line: `name: help`, which goes on in lines indented deeper."""
    helps: dict[str, str] = {}
    indent, name = None, ""
    for line in docstring.partition("Options:")[2].splitlines()[1:]:
        depth = len(line) - len(line.lstrip())
        if not line.strip() or depth == 0:
            break
        indent = depth if indent is None else indent
        option = re.match(r"(\w+): (.+)", line.strip()) if depth <= indent else None
        if option:
            name = option[1]
            helps[name] = option[2]
        elif name:
            helps[name] += " " + line.strip()
    return helps


def _file_of(build: Callable) -> str:
    """The file that defines something, as far as that is known."""
    try:
        return inspect.getsourcefile(build) or build.__module__
    except (OSError, TypeError):
        return build.__module__


def _constructor(build: Callable) -> Callable:
    return build.__init__ if isinstance(build, type) else build


def resolve(shelf: str, text: str, where: str = "") -> Choice:
    """The choice with every option typed and every default filled in; raises UsageError on unknown or ill-typed."""
    where = where or f"{shelf}={text}"
    choice = parse(text, where)
    declared = options(entry(shelf, choice.name, where))
    for key in choice.options:
        if key not in declared:
            known = nearest(key, declared, "options") if declared else "it has no options"
            raise UsageError(f'{where}: {choice.name} has no option "{key}": {known}')
    typed = {
        name: coerce(choice.options[name], option.type, f'{where}: option "{name}"')
        if name in choice.options
        else option.default
        for name, option in declared.items()
    }
    return Choice(choice.name, typed)


def build(shelf: str, text: str, size: Any = None, *, where: str = "", **kwargs: Any) -> Any:
    """Build one choice: `build("attention", "local:window=64", Size(length=512, dim=64, heads=1))`.

    `size` is what the shelf's constructors take first: a Setting for tasks, a Given for optimizers, else a Size, which
    may also be spelled out
    as `length=512, dim=64, heads=1`. `kwargs` are further things the lab provides; each is passed only to a
    constructor that names it. `rngs` defaults to seed 0.
    """
    where = where or f"{shelf}={text}"
    choice = resolve(shelf, text, where)
    target = entry(shelf, choice.name, where)
    parameters = inspect.signature(_constructor(target)).parameters
    if "rngs" in parameters and kwargs.get("rngs") is None:
        from flax import nnx

        kwargs["rngs"] = nnx.Rngs(0)
    if size is None:
        size = Size(**{name: kwargs.pop(name) for name in list(kwargs) if name in Size.__dataclass_fields__})
    provided = {name: value for name, value in kwargs.items() if name in parameters}
    try:
        with contained():
            return target(size, **choice.options, **provided)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{where}: {error}") from error


def at_hand(shelf: str, text: str) -> bool:
    """Whether a choice can be looked up without running a file that this process has not run: it is the package's own,
    or from a file that was imported before."""
    try:
        name = parse(text).name
        return name in names(shelf) or (_is_file(name) and module_of(located(name, name)) in sys.modules)
    except UsageError:
        return False


def digest(shelf: str, text: str) -> str | None:
    """A hash of the source behind a choice that lives outside the package, None inside: it is part of a run's id."""
    module = _module(shelf, parse(text).name, text)
    path = pathlib.Path(module.__file__ or "")
    if path.is_relative_to(_PACKAGE):
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` (text from the command line, or typed from a file) as the type `kind`; raises UsageError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none" and types.NoneType in arguments):
            return None
        words = [word for a in arguments if typing.get_origin(a) is typing.Literal for word in typing.get_args(a)]
        if isinstance(value, str) and value.lower() in words:
            return value.lower()
        kind = next(a for a in arguments if a is not types.NoneType)
        try:
            return coerce(value, kind, where)
        except UsageError:
            if not words or kind not in _WANTED:
                raise
            raise UsageError(f'{where} wants {_WANTED[kind]} or {" or ".join(words)}, got "{_seen(value)}"') from None
    if origin is typing.Literal:
        if value not in arguments:
            raise UsageError(f'{where}: unknown value "{_seen(value)}": {nearest(_seen(value), map(str, arguments))}')
        return value
    if origin is tuple:
        parts = value.lower().split("x") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise UsageError(f'{where} wants sizes like 32x32, got "{_seen(value)}"')
        return tuple(coerce(part, arguments[0], where) for part in parts)
    try:
        return _SCALARS[kind](value)
    except KeyError:
        kinds = ", ".join(scalar.__name__ for scalar in _SCALARS)
        raise UsageError(
            f"{where}: its type {kind} is none that an option can have; declare one of {kinds}, a Literal, "
            "a tuple of them, or one of these | None"
        ) from None
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f'{where} wants {_WANTED[kind]}, got "{_seen(value)}"') from None


def run_file(path: pathlib.Path, where: str) -> types.ModuleType:
    """The module of a Python file the user named; whatever it raises becomes one message with file and line."""
    return _imported(functools.partial(_from_file, path.resolve()), str(path), where)


def located(text: str | pathlib.Path, where: str) -> pathlib.Path:
    """A path as the user wrote it, with the home folder for ~; raises UsageError where there can be none."""
    try:
        path = pathlib.Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise UsageError(f'{where}: "{text}" is no path ({reason})') from None
    return path


def writable(path: pathlib.Path, where: str) -> pathlib.Path:
    """The same path; raises UsageError where no file can be written to it."""
    if path.is_dir():
        raise UsageError(f"{where}: a folder is there; name a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{where}: {above} is no folder")
    return path


def show(value: Any) -> str:
    """The text that `coerce` reads back as `value`."""
    if isinstance(value, (tuple, list)):
        return "x".join(map(_seen, value))
    return str(value).lower() if isinstance(value, bool) or value is None else _seen(value)


def _seen(value: Any) -> str:
    """The value as messages show it, which Python refuses of numbers of thousands of digits and of endless nesting."""
    try:
        return str(value)
    except (ValueError, RecursionError):
        return "a value too large to show"


def _whole(value) -> int:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str):
        match = re.fullmatch(r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)(k|m|ki|mi)?", value.strip().lower())
        if match is None:
            raise ValueError
        value = (
            float(match[1]) * _SUFFIXES.get(match[2] or "", 1) if not match[1].isdigit() or match[2] else int(match[1])
        )
    if int(value) != value:
        raise ValueError
    return int(value)


def _real(value) -> float:
    if isinstance(value, bool) or value is None:
        raise ValueError
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError
    return value


def _truth(value) -> bool:
    if str(value).lower() not in _BOOLEANS:
        raise ValueError
    return _BOOLEANS[str(value).lower()]


def _text(value) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return value


_SCALARS = {int: _whole, float: _real, bool: _truth, str: _text}
_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _package(shelf: str) -> str:
    return ".".join(folder(shelf).relative_to(_PACKAGE.parent).parts)


def _is_file(name: str) -> bool:
    return name.endswith(".py") or "/" in name


def module_of(path: pathlib.Path) -> str:
    """The name that the module of a Python file has once it is imported. It is the path's own, for two files may be
    called alike, and a module that Python knows is never hidden."""
    path = path.expanduser().resolve()
    return f"_xlab_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}_{path.stem}"


@functools.cache
def _from_file(path: pathlib.Path) -> types.ModuleType:
    # Registered as an import would: dataclasses and annotations look their module up.
    name = module_of(path)
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module(shelf: str, name: str, where: str) -> types.ModuleType:
    if len(name) > LONGEST_NAME:
        raise UsageError(f'{where}: "{name}" is no name')
    if name in names(shelf):
        return importlib.import_module(f"{_package(shelf)}.{name}")
    if _is_file(name):
        path = located(name, where)
        if not path.is_file():
            raise UsageError(f'{where}: no file "{name}"')
        if path.suffix != ".py":
            raise UsageError(f'{where}: "{name}" is no Python file: its name must end in .py')
        return run_file(path, where)
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        if str(pathlib.Path.cwd()) not in sys.path:
            sys.path.insert(0, str(pathlib.Path.cwd()))
        return _imported(functools.partial(importlib.import_module, name), name, where)
    if elsewhere := [f"{other} has {name}: {_spelled(other, name)}" for other in SHELVES if name in names(other)]:
        raise UsageError(f"{where}: there is no {shelf} called {name}; {'; '.join(elsewhere)}")
    hint = nearest(name, names(shelf))
    raise UsageError(f'{where}: no {shelf} "{name}": {hint}; or a dotted module path, or the path of a .py file')


def _spelled(shelf: str, name: str) -> str:
    """How a choice is written: a shelf inside another is an option of what stands there."""
    outer = SHELVES[shelf].rpartition("/")[0]
    return f"{outer}=NAME:{shelf}={name}" if outer else f"{shelf}={name}"


def _imported(load: Callable[[], types.ModuleType], name: str, where: str) -> types.ModuleType:
    """Run an outsider's file; whatever it raises becomes one message that names the file and the line."""
    try:
        with contained():
            return load()
    except Exception as error:
        raised = error.__cause__ if isinstance(error, BrokenChoice) and error.__cause__ is not None else error
        reason = f"{type(raised).__name__}: {said(raised)}"
        frames = [at for at in traceback.extract_tb(raised.__traceback__) if not at.filename.startswith("<frozen")]
        # What a base class of the package refuses is the outsider's line.
        theirs = [at for at in frames if not pathlib.Path(at.filename).is_relative_to(_PACKAGE)]
        line = next((f" ({at.filename}:{at.lineno})" for at in reversed(theirs or frames)), "")
        raise UsageError(f"{where}: importing {name} failed: {reason}{line}") from error
