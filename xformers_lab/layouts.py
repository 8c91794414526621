"""The grammar of `layout=`: the axes that the devices of a run are divided over, `data:2+fsdp:2+tensor:2`.

A layout is one axis or several, each with the number of its devices or without; their product is the number of devices.
No jax here: a config is typed, and refused, without it.
"""

import math
from collections.abc import Mapping, Sequence

from xformers_lab.errors import UsageError, nearest

DATA, FSDP, EXPERTS, SEQUENCE, TENSOR = "data", "fsdp", "experts", "sequence", "tensor"
# From the outermost to the innermost: devices that lie next to one another talk the most.
AXES = (DATA, FSDP, EXPERTS, SEQUENCE, TENSOR)
# Those that share out the sequences of a batch.
ROWS = (DATA, FSDP, EXPERTS)
PMAP = "pmap"
# What plain data parallelism was called when the ids of runs were first given out: ids still say it.
FORMER = "jit"


def canonical(text: str, where: str = "") -> str:
    """A layout with its axes in the order of AXES, without axes of one device; raises UsageError."""
    where = where or f"layout={text}"
    if text == FORMER:
        return DATA
    if text == PMAP:
        return text
    sizes: dict[str, int | None] = {}
    for part in text.split("+"):
        name, colon, size = part.strip().partition(":")
        if name == PMAP:
            raise UsageError(f"{where}: pmap stands alone, it shares out the batch and nothing else; use layout=pmap")
        if name not in AXES:
            raise UsageError(f'{where}: unknown axis "{name}": {nearest(name, [*AXES, PMAP], "axes")}')
        if name in sizes:
            raise UsageError(f"{where}: the axis {name} stands there twice; say it once, with both sizes multiplied")
        if colon and not (size.isascii() and size.isdigit() and 0 < len(size) < 7 and int(size) > 0):
            raise UsageError(f'{where}: "{size}" is no number of devices: write {name}:2, or {name} alone')
        sizes[name] = int(size) if colon else None
    said = [name if sizes[name] is None else f"{name}:{sizes[name]}" for name in AXES if sizes.get(name, 1) != 1]
    return "+".join(said) or f"{DATA}:1"


def former(layout: str) -> str:
    """A canonical layout as the id of a run has it."""
    return FORMER if layout == DATA else layout


def asked(layout: str) -> dict[str, int | None]:
    """The axes of a canonical layout and their sizes, None where the devices decide; pmap's are those of `data`."""
    parts = (part.partition(":") for part in (DATA if layout == PMAP else layout).split("+"))
    return {name: int(size) if size else None for name, _, size in parts}


def devices_of(layout: str, here: int) -> int:
    """How many devices a canonical layout is for: what its sizes multiply to where all have one, else those here."""
    sizes = asked(layout).values()
    return here if None in sizes else math.prod(size for size in sizes if size is not None)


def sizes(layout: str, devices: int, experts: Sequence[int] = ()) -> dict[str, int]:
    """The size of every axis of AXES for so many devices; raises UsageError where they do not multiply to them.

    What is left for axes without a size goes to `experts` first, as many as divide every number of `experts`. The
    others share the rest as evenly as its prime factors can be dealt, earlier axes of AXES the larger part. Where there
    are no others, `data` takes what `experts` leaves.
    """
    given = asked(layout)
    left, over = divmod(devices, math.prod(size for size in given.values() if size is not None))
    open_axes = [name for name, size in given.items() if size is None]
    if over or (left > 1 and not open_axes):
        product = " x ".join(str(size) for size in given.values() if size is not None)
        raise UsageError(
            f"layout={layout}: {product} devices, and there {'is 1' if devices == 1 else f'are {devices}'}: the sizes "
            f"must multiply to {devices}, or be left out (layout={'+'.join(given)}) to be divided up"
        )
    result = dict.fromkeys(AXES, 1) | {name: size or 1 for name, size in given.items()}
    if EXPERTS in open_axes:
        open_axes.remove(EXPERTS)
        result[EXPERTS] = math.gcd(left, *experts)
        left //= result[EXPERTS]
        if not open_axes and given.get(DATA) is not None and left > 1:
            raise UsageError(
                f"layout={layout}: {left * result[EXPERTS]} devices are left for the experts, who can use "
                f"{result[EXPERTS]} of them: leave out the size of {DATA}"
            )
        open_axes = open_axes or [DATA]
    for factor in _prime_factors(left) if open_axes else ():
        smallest = min(open_axes, key=lambda name: (result[name], AXES.index(name)))
        result[smallest] *= factor
    return result


def rows(sizes: Mapping[str, int]) -> int:
    """Over how many groups of devices the sequences of a batch are shared out."""
    return math.prod(sizes[name] for name in ROWS)


def _prime_factors(number: int) -> list[int]:
    """From the largest on."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors[::-1]
