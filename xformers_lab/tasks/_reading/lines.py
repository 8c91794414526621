"""Bytes to lines and to text. A line ends at a line feed, or at a carriage return and a line feed; at nothing else."""

import codecs
import pathlib

from xformers_lab.errors import UsageError
from xformers_lab.tasks._reading import compressed

_WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def text_bytes(task: str, file: pathlib.Path) -> bytes:
    """The bytes of a file of text, expanded, without the mark that says they are UTF-8; raises UsageError."""
    content = compressed.content(task, file)
    for mark, name in _WIDE.items():
        if content.startswith(mark):
            mend = f"iconv -f {name} -t UTF-8"
            raise UsageError(f"{task}: {file} cannot be read: it is {name}: turn it into UTF-8 ({mend})")
    return content.removeprefix(codecs.BOM_UTF8)


def split(task: str, file: pathlib.Path, content: bytes) -> list[bytes]:
    """Lines without their ends; the last one need not have any. Raises UsageError where every end is a lone CR."""
    if b"\r" in content and b"\n" not in content and b"\r" in content.rstrip(b"\r"):
        raise UsageError(
            f"{task}: {file} cannot be read: its lines end in a carriage return alone: turn it into a line feed "
            r"(tr '\r' '\n')"
        )
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def decoded(task: str, file: pathlib.Path, content: bytes) -> str:
    """UTF-8 to text; raises UsageError that names the line."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{task}: {file} cannot be read: line {line} is no UTF-8: turn the file into it (iconv -t UTF-8)"
        ) from None
