"""What an instruction of a compiled program computes, read from the program's text."""

import dataclasses
import math
import re

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Product:
    """left (batch, M, K) times right (batch, K, N). left_major, right_major: whether the contracted axis is the outer
    one of the two in memory, as it is of a right side that is read as it lies."""

    batch: int
    M: int
    K: int
    N: int
    left_major: bool
    right_major: bool

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.M * self.K * self.N

    def __str__(self) -> str:
        left = f"({self.K}, {self.M})^T" if self.left_major else f"({self.M}, {self.K})"
        right = f"({self.K}, {self.N})" if self.right_major else f"({self.N}, {self.K})^T"
        return (f"{self.batch} x " if self.batch > 1 else "") + f"{left} {right}"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """shape: the text of what it gives; rest: its operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("),")[0])

    @property
    def source(self) -> str:
        """The path of names that JAX gave it."""
        named = re.search(r'op_name="([^"]*)"', self.rest)
        return named.group(1) if named else ""


class Program:
    """A compiled program's instructions by name."""

    def __init__(self, text: str):
        self.instructions: dict[str, Instruction] = {}
        self.computations: dict[str, list[str]] = {}
        inside: list[str] = []
        for line in text.splitlines():
            if begun := COMPUTATION.match(line):
                inside = self.computations[begun.group(1)] = []
            elif line.startswith(" ") and (read := INSTRUCTION.match(line)):
                self.instructions[read.group(1)] = Instruction(*read.groups())
                inside.append(read.group(1))

    def products(self, instruction: Instruction) -> list[Product]:
        """The matrix products that an instruction computes, itself or in what it calls."""
        if instruction.opcode == "dot":
            return [self._product(instruction)]
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.rest)
        if instruction.opcode not in ("fusion", "call") or called is None:
            return []
        inner = [self.instructions[name] for name in self.computations.get(called.group(1), [])]
        return [product for each in inner for product in self.products(each)]

    def bytes(self, instruction: Instruction) -> int:
        """What it reads and writes, each array once."""
        read = [self.instructions[name].shape for name in instruction.operands if name in self.instructions]
        return sum(size(shape) for shape in (instruction.shape, *read))

    def _product(self, dot: Instruction) -> Product:
        axes = lambda what: [int(i) for i in _list(rf"{what}_dims=\{{([\d,]*)\}}", dot.rest)]
        left, right = (dimensions(self.instructions[name].shape) for name in dot.operands[:2])
        batch = math.prod(left[axis] for axis in axes("lhs_batch"))
        K = math.prod(left[axis] for axis in axes("lhs_contracting"))
        sides = (math.prod(left) // (batch * K), math.prod(right) // (batch * K))
        return Product(
            batch, sides[0], K, sides[1], _outer(left, axes("lhs_contracting")), _outer(right, axes("rhs_contracting"))
        )


def dimensions(shape: str) -> list[int]:
    """The sizes of the first array of a shape."""
    found = ARRAY.search(shape)
    return [] if found is None else [int(size) for size in found.group(2).split(",") if size]


def size(shape: str) -> int:
    """Bytes of all arrays of a shape."""
    arrays = ARRAY.findall(shape)
    return sum(SIZES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in arrays)


def _list(pattern: str, text: str) -> list[str]:
    found = re.search(pattern, text)
    return [part for part in found.group(1).split(",") if part] if found else []


def _outer(sizes: list[int], contracted: list[int]) -> bool:
    """Whether the contracted axes are not the last one."""
    return len(sizes) - 1 not in contracted
