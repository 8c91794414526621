"""The arrays of an npz file, whose members are checked before room is made for them."""

import math
import pathlib
import zipfile
import zlib

import numpy as np
from numpy.lib import format as npy

from xformers_lab.errors import UsageError
from xformers_lab.tasks._reading import compressed

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def arrays(task: str, file: pathlib.Path) -> tuple[list[tuple[str, np.ndarray]], list[str]]:
    """(name, array) of every array, and the names of the members that are none; raises UsageError where one cannot be
    read, is not of numbers, or is not as large as its header says."""
    if not zipfile.is_zipfile(file):
        raise UsageError(f"{task}: cannot read {file}: it is no npz file, or not all of one")
    named, odd, total = [], [], 0
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    odd.append(member.filename)
                    continue
                total += member.file_size
                if total > compressed.LIMIT:
                    raise UsageError(f"{task}: {file} expands to more than {compressed.LIMIT:,} bytes")
                with archive.open(member) as opened:
                    named.append((member.filename.removesuffix(".npy"), _array(task, file, member, opened)))
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, MemoryError,
            SyntaxError, TypeError, KeyError, OverflowError) as error:  # fmt: skip
        raise UsageError(f"{task}: cannot read {file}: {error}") from error
    if len({name for name, _ in named}) < len(named):
        raise UsageError(f"{task}: cannot read {file}: two of its arrays have the same name")
    return named, odd


def _array(task: str, file: pathlib.Path, member: zipfile.ZipInfo, opened) -> np.ndarray:
    version = npy.read_magic(opened)
    if version not in _HEADERS:
        raise ValueError(f"{member.filename} is of npy version {version}")
    shape, columns_first, kind = _HEADERS[version](opened)
    if kind.hasobject or kind.names is not None or kind.itemsize == 0:
        raise ValueError(f"{member.filename} is an array of {kind}, not of numbers")
    size = math.prod(shape) * kind.itemsize
    if min(shape, default=0) < 0 or size != member.file_size - opened.tell():
        raise ValueError(
            f"{member.filename} says that it is {' x '.join(map(str, shape))} of {kind}, but holds "
            f"{member.file_size - opened.tell():,} bytes"
        )
    flat = np.frombuffer(opened.read(), kind)
    return flat.reshape(shape, order="F" if columns_first else "C")
