"""How often a loop of a compiled program runs, where its text tells."""

import math
import re

from xformers_lab.plan.hlo import Computation, Instruction, Program

# What gives on the value that it is given.
THROUGH = ("bitcast", "copy", "copy-done", "copy-start", "convert", "reshape", "opt-barrier")


def trips(loop: Instruction, around: Computation, program: Program) -> int | None:
    """The trips of a `while` within a computation: what XLA says of it, or those of a counter that begins at a
    constant, grows by another and stays below a third; None where neither is there."""
    if said := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(said[1])
    condition, body = (program.computations.get(loop.attribute(name) or "") for name in ("condition", "body"))
    if condition is None or body is None:
        return None
    counter, limit = _compared(condition)
    first, grown = _element(around, loop.operands[0], counter), _element(body, body.root.name, counter)
    first, step = _constant(around, first), _added(body, grown, counter)
    if limit is None or first is None or step is None or step <= 0:
        return None
    return max(math.ceil((limit - first) / step), 0)


def _compared(condition: Computation) -> tuple[str | None, int | None]:
    """Of `counter < constant`: which element of the loop's values the counter is, and the constant."""
    root = condition.root
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None, None
    left, right = root.operands
    return _index(condition, left), _constant(condition, right)


def _added(body: Computation, name: str | None, counter: str | None) -> int | None:
    """The constant that a value is more than the counter, in the body of a loop."""
    one = _followed(body, name)
    if one is None or one.opcode != "add":
        return None
    left, right = one.operands
    if _index(body, left) == counter:
        return _constant(body, right)
    return _constant(body, left) if _index(body, right) == counter else None


def _index(place: Computation, name: str) -> str | None:
    """Which element of a tuple a value is."""
    one = _followed(place, name)
    return None if one is None or one.opcode != "get-tuple-element" else one.attribute("index")


def _element(place: Computation, name: str, index: str | None) -> str | None:
    """The value that is an element of a tuple."""
    one = _followed(place, name)
    return None if one is None or one.opcode != "tuple" or index is None else one.operands[int(index)]


def _constant(place: Computation, name: str | None) -> int | None:
    one = _followed(place, name)
    found = None if one is None or one.opcode != "constant" else re.fullmatch(r"-?\d+", one.inside.strip())
    return int(found[0]) if found else None


def _followed(place: Computation, name: str | None) -> Instruction | None:
    """What a value comes from, behind whatever gives it on."""
    one = place.instructions.get(name or "")
    while one is not None and one.opcode in THROUGH and one.operands:
        one = place.instructions.get(one.operands[0])
    return one
