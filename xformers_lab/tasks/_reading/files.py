"""What stands at a path: the file or folder itself, the files below a folder, a stamp of their content."""

import difflib
import hashlib
import os
import pathlib
from collections.abc import Container

from xformers_lab.errors import UsageError, nearest

_CHUNK = 2**20


def existing(task: str, path: str) -> pathlib.Path:
    """The file or folder behind an option; raises UsageError with what stands in its place."""
    if not path:
        raise UsageError(f"{task}: path= is empty: give a file or a folder")
    place = pathlib.Path(path).expanduser()
    try:
        if place.is_file() or place.is_dir():
            return place
        if place.is_symlink():
            raise UsageError(f"{task}: path={path} is a link to {os.readlink(place)}, which leads to nothing: mend it")
        if place.exists():
            raise UsageError(f"{task}: path={path} is neither a file nor a folder")
        parent = next(folder for folder in place.parents if folder.is_dir())
        names = [entry.name for entry in sorted(parent.iterdir())]
    except OSError as error:
        raise UsageError(f"{task}: path={path} cannot be opened: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{task}: path={path!r} is no path: {error}") from error
    near = nearest(place.name, difflib.get_close_matches(place.name, names, 8, 0.0), f"in {parent}")
    raise UsageError(f"{task}: path={path} does not exist: {near or 'give a file or a folder'}")


def below(folder: pathlib.Path, skip: Container[str] = ()) -> list[pathlib.Path]:
    """Every regular file below a folder but hidden ones and those in folders to skip, ordered by relative path."""
    paths = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not hidden(name) and name not in skip]
        paths += [pathlib.Path(root, name) for name in names if not name.startswith(".")]
    paths = [file for file in paths if file.is_file()]
    return sorted(paths, key=lambda file: file.relative_to(folder).as_posix())


def unread_links(folder: pathlib.Path) -> list[str]:
    """The links below a folder that `below` does not follow: those to folders, and those that lead to nothing."""
    links = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not hidden(name)]
        visible = [*folders, *(name for name in names if not name.startswith("."))]
        entries = [pathlib.Path(root, name) for name in visible]
        links += [entry for entry in entries if entry.is_symlink() and not entry.is_file()]
    return [link.relative_to(folder).as_posix() for link in sorted(links)]


def hidden(name: str) -> bool:
    """Whether a folder of this name is passed over: those of version control, of caches, of archivers."""
    return name.startswith((".", "__"))


def folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder that are not passed over."""
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not hidden(entry.name))


def stamp(task: str, path: str | None) -> str | None:
    """A hash of all names and contents at a path, by which a cache knows whether they are what it has; None of None.

    Times and sizes would not do: a file may be written anew with both as they were.
    """
    if path is None:
        return None
    place, digest = existing(task, path), hashlib.blake2b(digest_size=16)
    for file in below(place) if place.is_dir() else [place]:
        digest.update(os.fsencode(file) + b"\0")
        try:
            with file.open("rb") as opened:
                while chunk := opened.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise UsageError(f"{task}: cannot read {file}: {error.strerror}") from error
        digest.update(b"\0%d" % file.stat().st_size)
    return digest.hexdigest()
