"""What the devices of a compiled program exchange: its collectives by kind, with how often they run and their bytes."""

import dataclasses
import functools
from collections.abc import Iterable

from xformers_lab.plan.hlo import Computation, Instruction, Program, parsed
from xformers_lab.plan.loops import trips

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: bytes: the arrays that a device gives or gets, whichever are more, each time; times:
    how often it runs; known: whether that is known, for one in a loop without a count counts once; channel: what tells
    it from others, where XLA says."""

    kind: str
    bytes: int
    times: int = 1
    known: bool = True
    channel: str | None = None


def of(text: str) -> list[dict]:
    """A row for each kind in a compiled program, the most bytes first: kind, count (how often one runs), bytes (of one
    device, in all), uncounted (how many stand in loops that nothing tells the trips of, and count once)."""
    program = parsed(text)
    rows: dict[str, dict] = {}
    for each in _Walk(program).of(program.entry):
        row = rows.setdefault(each.kind, {"kind": each.kind, "count": 0, "bytes": 0, "uncounted": 0})
        row["count"] += each.times
        row["bytes"] += each.times * each.bytes
        row["uncounted"] += not each.known
    return sorted(rows.values(), key=lambda row: -row["bytes"])


class _Walk:
    """The collectives of each computation, with those of what it runs."""

    def __init__(self, program: Program):
        self.program = program
        self.of = functools.cache(self._of)

    def _of(self, name: str) -> tuple[Collective, ...]:
        computation, found = self.program.computations[name], []
        fused: set[str | None] = set()
        for each in computation.instructions.values():
            if (kind := _kind(each.opcode)) is not None:
                found.append(Collective(kind, _bytes(each, computation), channel=each.attribute("channel_id")))
            elif each.opcode == "while":
                found += self._looped(each, computation)
            elif each.opcode == "conditional":
                branches = [self.of(branch) for branch in self._known(each.called)]
                found += max(branches, key=_total, default=())
            elif each.called:
                inside = [one for called in self._known(each.called) for one in self.of(called)]
                # A TPU begins and ends one in fusions with other work, and it stands in each of them.
                found += [one for one in inside if one.channel is None or one.channel not in fused]
                fused |= {one.channel for one in inside}
        return tuple(found)

    def _looped(self, loop: Instruction, around: Computation) -> list[Collective]:
        inside = [one for called in self._known(loop.called) for one in self.of(called)]
        count = trips(loop, around, self.program) if inside else None
        times, known = (1, False) if count is None else (count, True)
        return [
            dataclasses.replace(one, times=times * one.times, known=known and one.known, channel=None) for one in inside
        ]

    def _known(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.program.computations]


def _kind(opcode: str) -> str | None:
    """What a collective is called, of one that runs beside other work its start; None of all else."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _bytes(one: Instruction, computation: Computation) -> int:
    given = sum(computation.instructions[name].size for name in one.operands if name in computation.instructions)
    got = one.size
    if one.opcode.endswith("-start") and not one.opcode.startswith("all-reduce"):
        got -= given  # whose value holds what it was given, too
    return max(given, got)


def _total(found: Iterable[Collective]) -> int:
    return sum(one.times * one.bytes for one in found)
