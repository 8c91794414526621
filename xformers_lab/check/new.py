"""Writes the skeleton of a choice of one's own: a file that works at once, to be changed line by line."""

import keyword
import pathlib
import re

from xformers_lab import spec
from xformers_lab.errors import UsageError, nearest

_SKELETONS = pathlib.Path(__file__).parent / "skeletons"


def new(shelf: str, name: str, folder: str | pathlib.Path = ".") -> pathlib.Path:
    """Write folder/name.py, a commented skeleton for a shelf whose class is the file's name in CamelCase; -> its path.

    Raises UsageError at a shelf without a skeleton, a name that is no Python identifier in lower case, a name that is
    taken on the shelf, a folder that cannot be written, and where the file exists.
    """
    spec.folder(shelf)
    shelf = {"tasks": "task"}.get(shelf, shelf)
    known = sorted(path.name.split(".")[0] for path in _SKELETONS.glob("*.py.txt"))
    if shelf not in known:
        raise UsageError(f'new: no skeleton for shelf "{shelf}": {nearest(shelf, known, "there are")}')
    legal = _legal(name)
    if name != legal:
        raise UsageError(
            f'new: "{name}" is no name for the shelf {shelf}: names are lower-case letters, digits and _, '
            f'for example "{legal}"'
        )
    if name in spec.names(shelf):
        raise UsageError(f'new: shelf {shelf} has "{name}" already: choose another name, for example "my_{name}"')
    path = pathlib.Path(folder).expanduser() / f"{name}.py"
    text = (_SKELETONS / f"{shelf}.py.txt").read_text().replace("MyName", _camel(name))
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"new: {path} exists already; it is left as it is") from None
    except OSError as error:
        raise UsageError(f"new: cannot write {path}: {error.strerror}") from None
    return path


def _legal(name: str) -> str:
    """The nearest name that can be a module: lower case, no keyword, no leading digit or underscore."""
    snake = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    plain = re.sub(r"[^a-z0-9_]+", "_", snake.lower()).strip("_")
    if not plain or plain[0].isdigit() or keyword.iskeyword(plain):
        plain = f"my_{plain}".rstrip("_")
    return plain


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
