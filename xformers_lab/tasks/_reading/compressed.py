"""The bytes of a file, expanded where they are compressed. What they are is read from them, never from the name."""

import bz2
import gzip
import lzma
import pathlib
import zlib
from collections.abc import Callable
from typing import IO

from xformers_lab.errors import UsageError

# The most bytes that a compressed file may expand to; and, once it has come to so many bytes, how many times its own
# size: text shrinks to a tenth, so what grows a hundred times as much is made to fill the memory.
LIMIT = 4 * 2**30
_FREE, _TIMES = 2**28, 100
_CHUNK = 2**20

_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}
_OTHERS = {
    b"\x1f\x9d": "compressed by compress",
    b"LZIP": "compressed by lzip",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\x5d\x00\x00\x80\x00\xff\xff": "compressed by lzma",
}
_POINTER = b"version https://git-lfs.github.com/spec/"
_TAR = slice(257, 262)
_HEAD = 300


def content(task: str, file: pathlib.Path, limit: int | None = None) -> bytes:
    """The bytes of a file; of gzip, bzip2, xz and zstd what they expand to, at most `limit` (LIMIT) bytes.

    Raises UsageError where it cannot be read, expands to more, or is an archive, which holds files and is none.
    """
    limit = LIMIT if limit is None else limit
    try:
        with file.open("rb") as raw:
            head = raw.read(_HEAD)
            raw.seek(0)
            _refuse(task, file, head)
            expand = _expander(task, file, head)
            if expand is None:
                return raw.read()
            chunks, size = [], 0
            limit = min(limit, max(_FREE, _TIMES * file.stat().st_size))
            with expand(raw) as expanded:
                while chunk := expanded.read(_CHUNK):
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > limit:
                        raise UsageError(
                            f"{task}: {file} expands to more than {limit:,} bytes: unpack it, or take a part of it"
                        )
    except OSError as error:
        raise UsageError(f"{task}: cannot read {file}: {error.strerror or error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise UsageError(f"{task}: cannot read {file}: {error}") from error
    whole = b"".join(chunks)
    _refuse(task, file, whole[:_HEAD])
    if _expander(task, file, whole[:_HEAD]) is not None:
        raise UsageError(f"{task}: {file} is compressed twice: unpack it")
    return whole


def is_archive(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an archive, which holds files."""
    return head[_TAR] == b"ustar" or any(head.startswith(magic) for magic in _ARCHIVES)


def head(file: pathlib.Path) -> bytes:
    """The first bytes of a file as they are; none where it cannot be read."""
    try:
        with file.open("rb") as raw:
            return raw.read(_HEAD)
    except OSError:
        return b""


def _refuse(task: str, file: pathlib.Path, head: bytes) -> None:
    names = [name for magic, name in {**_ARCHIVES, **_OTHERS}.items() if head.startswith(magic)]
    if head[_TAR] == b"ustar":
        names = ["a tar archive"]
    if names:
        raise UsageError(f"{task}: {file} is {names[0]}, which is not read: unpack it, or move it elsewhere")
    if head.startswith(_POINTER):
        raise UsageError(f"{task}: {file} is a pointer of Git LFS, not the data: fetch them with git lfs pull")


def _expander(task: str, file: pathlib.Path, head: bytes) -> Callable[[IO[bytes]], IO[bytes]] | None:
    """What reads a compressed file in pieces; None where the first bytes are those of no compressed file."""
    if head.startswith(b"\x1f\x8b"):
        return lambda raw: gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return lambda raw: bz2.BZ2File(raw)  # type: ignore[return-value]
    if head.startswith(b"\xfd7zXZ\0"):
        return lambda raw: lzma.LZMAFile(raw)  # type: ignore[return-value]
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import pyarrow
        except ImportError as error:
            raise UsageError(f"{task}: {file} is compressed by zstd: unpack it, or pip install pyarrow") from error
        return lambda raw: pyarrow.CompressedInputStream(raw, "zstd")
    return None
