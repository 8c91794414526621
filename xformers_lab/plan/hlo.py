"""The text of a compiled program, as XLA prints it, in computations and their instructions."""

import dataclasses
import math
import re
from collections.abc import Iterator

# Bytes of an element of an array, by its type; what is not here, a token say, has none.
SIZES = {"pred": 1.0, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "c64": 8.0, "c128": 16.0}
CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)"
    r"=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = type opcode(operands), attributes`; root: whether its value is that of its computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of its value, all arrays of a tuple."""
        return sum(sizes(self.type))

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        each = (name for many, one in CALLED.findall(self.attributes) for name in (one or many).split(","))
        return tuple(name.strip().lstrip("%") for name in each)

    def attribute(self, name: str) -> str | None:
        """The computation or number that stands behind name=."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order that they stand in."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(each for each in self.instructions.values() if each.root)


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and which of them it begins with."""

    computations: dict[str, Computation]
    entry: str


def parsed(text: str) -> Program:
    """The computations of a program; raises ValueError where it has no entry."""
    computations, entry, name, instructions = {}, None, None, {}
    for line in text.splitlines():
        if name is None:
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                name, instructions = head[2], {}
                entry = name if head[1] else entry
        elif line.startswith("}") and not line.startswith(
            "}}"
        ):  # which ends what a kernel's call says on lines of its own
            computations[name], name = Computation(name, instructions), None
        elif (one := _instruction(line)) is not None:
            instructions[one.name] = one
    if entry is None:
        raise ValueError("a program without an entry")
    return Program(computations, entry)


def sizes(text: str) -> Iterator[int]:
    """Bytes of each array in a type."""
    for kind, shape in re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", text):
        bits = re.search(r"\d+", kind)
        each = SIZES.get(kind, int(bits[0]) / 8 if bits and kind[0] in "fbsu" else 0)
        yield math.ceil(each * math.prod(int(size) for size in re.findall(r"\d+", shape)))


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closed(rest) if rest.startswith("(") else rest.index(" ")
    called = re.match(r" ([\w\-]+)\(", rest[end:])
    if called is None:
        return None
    begin = end + called.end() - 1
    close = begin + _closed(rest[begin:])
    inside = rest[begin + 1 : close - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head[2], rest[:end], called[1], operands, inside, rest[close:], bool(head[1]))


def _closed(text: str) -> int:
    """Where the bracket that a text begins with is closed, one behind it."""
    depth = 0
    for at, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"a bracket that is not closed: {text[:80]}")
