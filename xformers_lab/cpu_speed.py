"""What XLA and the C library leave of a CPU's speed unless they are asked: its widest vectors, and memory that a
process keeps. Neither changes which numbers a program computes but by the order of sums. Needs no jax."""

import ctypes
import os
import platform
from collections.abc import MutableMapping

from xformers_lab import hardware

WIDE = "--xla_cpu_prefer_vector_width"
# Processors from these on run vectors of 512 bits without a lower clock: Sapphire Rapids, Zen 4 and later.
INSTRUCTIONS = "avx512_bf16"
# A flag that XLA does not know ends the process; it is tried up to here.
JAXLIB_BEFORE = (0, 13)
# Of mallopt(3): blocks that are not mapped apart, memory at the end of the heap that is not given back, and one heap
# for all threads, for others hold no large blocks.
KEPT = {-3: 2**31 - 1, -1: 2**31 - 1, -8: 1}


def wide_vectors(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have XLA compile for 512 bits where the processor is good at them, unless the user has said a width.

    XLA takes half of that by default: exponentials of masked scores then take 3.6 times as long (Sapphire Rapids, jax
    0.12). It counts only before JAX makes its devices."""
    flags = environment.get("XLA_FLAGS", "")
    if WIDE in flags or INSTRUCTIONS not in hardware.instructions().split():
        return
    from jaxlib.version import __version__  # here, for it takes longer than all that is imported above

    major, minor, *_ = __version__.split(".")
    if (int(major), int(minor)) < JAXLIB_BEFORE:
        environment["XLA_FLAGS"] = f"{flags} {WIDE}=512".strip()


def keep_memory(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Have the C library keep the memory that a step gives back for the next one; -> whether it does.

    A step's temporary arrays are one block, which is otherwise mapped anew in every step, and each of its pages
    cleared by the kernel: a fifth of the time of a small model's step. The process stays as large as it once was. Not
    where the user has set the library's own variables, nor where the library is not glibc."""
    theirs = [name for name in environment if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if theirs or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, value) for option, value in KEPT.items()]
    return all(taken)
