"""Compiled programs, kept on disk from command to command by JAX's own cache. Needs no jax.

What decides a program is part of its key, XLA's version and flags too. On a CPU the key does not say which
instructions it has, so that each kind of processor that shares the folder has one of its own. A kept program is the
same machine code: it computes the same bits. `JAX_COMPILATION_CACHE_DIR` names another folder, and
`JAX_ENABLE_COMPILATION_CACHE=false` switches the cache off.
"""

import contextlib
import os
import pathlib
import platform
import time
import warnings
import zlib
from collections.abc import MutableMapping

from xformers_lab import files, hardware

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# The programs of a small model are many, and most compile in milliseconds: all of them together are half of the time.
ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
LARGEST = 2 << 30  # bytes
EVERY = 24 * 3600  # seconds from one look at the size to the next


def use(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have JAX keep what it compiles, unless the user has said where; it counts only before jax is imported."""
    place = folder()
    if environment.get(VARIABLE, str(place)) != str(place):
        return
    with contextlib.suppress(OSError):  # no folder, no cache: programs are compiled
        place.mkdir(parents=True, exist_ok=True)
        keep_small(place)
        environment[VARIABLE] = str(place)
        for name, value in ALL.items():
            environment.setdefault(name, value)
    # On a full disk every program would have a warning; what matters there, the run's own files, is said.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def folder() -> pathlib.Path:
    """Where the programs of this kind of processor lie."""
    return files.cache("programs") / f"{platform.machine()}-{zlib.crc32(hardware.instructions().encode()):08x}"


def keep_small(place: pathlib.Path, largest: int = LARGEST) -> None:
    """Once a day, where a folder holds more bytes than `largest`: delete the oldest programs, down to half of that."""
    looked = place / ".looked"
    with contextlib.suppress(FileNotFoundError):
        if time.time() - looked.stat().st_mtime < EVERY:
            return
    looked.touch()
    entries = []
    for path in place.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in entries)
    if total <= largest:
        return
    for _, size, path in sorted(entries):
        if total <= largest // 2:
            break
        path.unlink(missing_ok=True)
        total -= size
