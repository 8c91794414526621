"""Files that are replaced in one go: a reader sees the old or the new one, whole. Needs no jax."""

import os
import pathlib
import secrets


def cache(name: str) -> pathlib.Path:
    """The folder of one kind of things that can be made again, in $XDG_CACHE_HOME (default ~/.cache)."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "xformers_lab" / name


def replace_text(path: pathlib.Path, text: str, *, folder: bool = True) -> None:
    """`replace_bytes` of a text, as UTF-8."""
    replace_bytes(path, text.encode(), folder=folder)


def replace_bytes(path: pathlib.Path, content: bytes | memoryview, *, folder: bool = True) -> None:
    """Write a file, in place of an older one, once the disk holds all of it; its folder is made if `folder`. Raises
    OSError, with the older one as it was."""
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write the same file, such as the verdict on a mechanism, at the same time. "x" opens no file
    # that is there, and follows no link.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    file = temporary.open("xb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: pathlib.Path) -> None:
    """Have the disk hold a file or a folder's entries before anything relies on them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
