"""How much memory a program takes that a TPU's compiler refused for it, as its message has it."""

import dataclasses
import re

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
NUMBER = r"([\d.]+)([KMGT]?)"
# All of the program, or what it needs beside its arguments.
WHOLE = re.compile(rf"[Uu]sed {NUMBER} of {NUMBER} hbm")
TEMPORARY = re.compile(rf"HLO temporaries \({NUMBER}\) exceeds available HBM \({NUMBER}\)")


@dataclasses.dataclass(frozen=True)
class Needed:
    """Bytes of one device: total, and activations, what is live within the step; why it does not fit, in words."""

    activations: int
    total: int
    why: str


def needed(message: str, given: int) -> Needed | None:
    """What a program with arguments of `given` bytes needs; None where it is not the chip's main memory that it is too
    large for, or the message has another form."""
    whole, temporary = WHOLE.search(message), TEMPORARY.search(message)
    found = whole or temporary
    if found is None:
        return None
    asked, available = (round(float(found[at]) * UNITS[found[at + 1]]) for at in (1, 3))
    activations = max(asked - given, 0) if whole else asked
    return Needed(activations, given + activations, f"the compiler has {available / 2**30:.4g} GiB of it")
