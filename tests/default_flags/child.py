"""One choice of one shelf, checked: in tests/, without XLA_FLAGS, `python -m default_flags.child attention full`.

It says on a line what it begins, so that the last one is where it crashed or hangs. Where it comes to its end, the last
line is what it measured or, with exit code BROKEN, what is wrong.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

from xformers_lab import spec
from xformers_lab.check.subject import Broken

from . import attention, configs, trained
from .process import BROKEN


def measured(shelf: str, choice: str, report: Callable[[str], None], *, deep: bool = False) -> str:
    """In words; raises Broken. deep: attention against its reference alone, at lengths that take longer."""
    words = []
    if shelf == "attention":
        lengths = attention.DEEP if deep else attention.LENGTHS
        apart = max(attention.largest_difference(*case, report) for case in attention.cases(choice, lengths))
        words.append(f"attend off by {apart:.0e}")
    return ", ".join(words if deep else words + _trained(shelf, choice, report))


def _trained(shelf: str, choice: str, report: Callable[[str], None]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        config = configs.of_choice(shelf, choice, pathlib.Path(folder))
        begun = time.perf_counter()
        losses = trained.losses(config, report)
        seconds = time.perf_counter() - begun
    words = [f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}", f"{seconds:.1f} s in all"]
    if shelf == "attention":
        words.append(f"forward+backward {1e3 * trained.bench_seconds(config, report):.1f} ms")
    return words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shelf", choices=[shelf for shelf in spec.SHELVES if shelf != "task"])
    parser.add_argument("choice")
    parser.add_argument("--deep", action="store_true", help="attention at the lengths that take longer")
    options = parser.parse_args()
    try:
        print(measured(options.shelf, options.choice, lambda what: print(what, flush=True), deep=options.deep))
    except Broken as broken:
        print(broken)
        return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
