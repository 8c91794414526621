"""All choices of some shelves, by default of all, a line each: in tests/, `python -m default_flags.table norm ffn`."""

import sys

from xformers_lab import spec

from . import process


def main() -> int:
    shelves = sys.argv[1:] or [shelf for shelf in spec.SHELVES if shelf != "task"]
    faults = 0
    for shelf in shelves:
        for choice in spec.names(shelf):
            ended = process.run(shelf, choice)
            faults += ended.fault is not None
            words = ended.words if ended.fault is None else f"FAULT {ended.fault}"
            print(f"{shelf:<11} {choice:<20} {ended.seconds:6.1f} s  {words}", flush=True)
    print(f"{faults} faults")
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
