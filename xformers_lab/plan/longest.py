"""The longest sequence that fits: by doubling, then by halving what lies between."""

import dataclasses
from collections.abc import Callable

from xformers_lab.config import LEAVES

MOST = LEAVES["seq_len"][1].metadata["below"] - 1
# The search ends where what lies between is less than this share of the longest that fits.
CLOSE = 16


@dataclasses.dataclass(frozen=True)
class Found:
    """fits: the longest that does, of those tried; too_long: the shortest that does not; stopped: one of which nothing
    tells, where the search ended for it. Each None where there is none."""

    fits: int | None = None
    too_long: int | None = None
    stopped: int | None = None


def longest(fits: Callable[[int], bool | None], first: int, most: int = MOST) -> Found:
    """Search from the length `first` on; fits(length) is None where nothing tells.

    Lengths are multiples of the first one, or where that does not fit itself halves of it.
    """
    step = first
    found = Found()
    length = first
    while found.too_long is None and length <= most:  # up
        answer = fits(length)
        if answer is None:
            return dataclasses.replace(found, stopped=length)
        found = Found(length) if answer else dataclasses.replace(found, too_long=length)
        length *= 2
    while found.fits is None and found.too_long is not None and found.too_long % 2 == 0:  # down
        step = found.too_long // 2
        answer = fits(step)
        if answer is None:
            return dataclasses.replace(found, stopped=step)
        found = Found(step, found.too_long) if answer else Found(None, step)
    while found.fits is not None and found.too_long is not None:
        between = found.too_long - found.fits
        middle = found.fits + between // (2 * step) * step
        if middle == found.fits or between <= found.fits // CLOSE:
            break
        answer = fits(middle)
        if answer is None:
            return dataclasses.replace(found, stopped=middle)
        found = Found(middle, found.too_long) if answer else Found(found.fits, middle)
    return found
