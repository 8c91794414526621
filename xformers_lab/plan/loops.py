"""How often a loop of a compiled program runs, where its text tells."""

import math
import re

from xformers_lab.plan.hlo import Computation, Instruction, Program

# What gives on the value that it is given.
THROUGH = ("bitcast", "copy", "copy-done", "copy-start", "convert", "reshape", "broadcast", "opt-barrier")


def trips(loop: Instruction, around: Computation, program: Program) -> int | None:
    """The trips of a `while` within a computation: what XLA says of it, or a counter that begins at a constant, grows
    by one and stays below another; None where neither is there."""
    if said := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(said[1])
    condition = program.computations.get(loop.attribute("condition") or "")
    body = program.computations.get(loop.attribute("body") or "")
    if condition is None or body is None:
        return None
    counter, limit = _compared(condition, program)
    if counter is None or limit is None:
        return None
    first = _element(around, loop.operands[0], counter)
    grown = _element(body, body.root.name, counter)
    first = None if first is None else _constant(around, first)
    step = None if grown is None else _added(body, grown, counter, program)
    if first is None or not step or step < 0:
        return None
    return max(math.ceil((limit - first) / step), 0)


def _compared(condition: Computation, program: Program) -> tuple[int | None, int | None]:
    """Of `counter < constant`: which element of the loop's values is the counter, and the constant."""
    root, operands, place = condition.root, condition.root.operands, condition
    if root.opcode == "fusion" and len(root.called) == 1:
        inner = program.computations[root.called[0]]
        outer = {each.name: int(each.inside) for each in inner.instructions.values() if each.opcode == "parameter"}
        operands = tuple(
            root.operands[outer[name]] if name in outer else f"{inner.name}/{name}" for name in inner.root.operands
        )
        root, place = inner.root, _joined(condition, inner)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None, None
    left, right = (_followed(place, name) for name in operands)
    if left is None or right is None or left.opcode != "get-tuple-element" or right.opcode != "constant":
        return None, None
    index = left.attribute("index")
    return (None if index is None else int(index)), _number(right)


def _joined(outer: Computation, inner: Computation) -> Computation:
    """Both, with the names of the inner one apart."""
    within = {f"{inner.name}/{name}": each for name, each in inner.instructions.items()}
    return Computation(outer.name, outer.instructions | within)


def _added(body: Computation, name: str, counter: int, program: Program) -> int | None:
    """What a value is more than the counter, in the body of a loop."""
    one = _followed(body, name)
    operands, place = (), body
    if one is not None and one.opcode == "fusion" and len(one.called) == 1:
        inner = program.computations[one.called[0]]
        outer = {each.name: int(each.inside) for each in inner.instructions.values() if each.opcode == "parameter"}
        place = _joined(body, inner)
        operands = tuple(
            one.operands[outer[given]] if given in outer else f"{inner.name}/{given}" for given in inner.root.operands
        )
        one = inner.root
    elif one is not None:
        operands = one.operands
    if one is None or one.opcode != "add":
        return None
    parts = [_followed(place, operand) for operand in operands]
    constants = [_number(part) for part in parts if part is not None and part.opcode == "constant"]
    counters = [part for part in parts if part is not None and part.attribute("index") == str(counter)]
    return constants[0] if len(constants) == len(counters) == 1 else None


def _element(place: Computation, name: str, index: int) -> str | None:
    """The value that is an element of a tuple."""
    one = place.instructions.get(name)
    while one is not None and one.opcode in THROUGH:
        one = place.instructions.get(one.operands[0])
    if one is None or one.opcode != "tuple" or index >= len(one.operands):
        return None
    return one.operands[index]


def _constant(place: Computation, name: str) -> int | None:
    one = _followed(place, name)
    return None if one is None or one.opcode != "constant" else _number(one)


def _followed(place: Computation, name: str) -> Instruction | None:
    """What a value comes from, behind whatever gives it on."""
    one = place.instructions.get(name)
    while one is not None and one.opcode in THROUGH and one.operands:
        one = place.instructions.get(one.operands[0])
    return one


def _number(constant: Instruction) -> int | None:
    return int(constant.inside) if re.fullmatch(r"-?\d+", constant.inside.strip()) else None
