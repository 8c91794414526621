"""What must be known before the numbers are compared: written under the table and at the head of the page."""

from collections.abc import Mapping, Sequence

from xformers_lab.report import human, rows

# Passes of a bench that are timed with all that a layer does.
WHOLE = ("call", "decode", "decode_several")


def of(cells: Sequence[dict]) -> list[str]:
    """One sentence for each thing in which cells beside each other differ, or that was left out."""
    timed = [row for row in cells if rows.ok(row)]
    return [*_unchecked(timed), *_mixed_machines(timed), *_mixed_timing(timed), *_unseen(timed)]


def machines(cells: Sequence[dict]) -> list[tuple[dict, int]]:
    """The different machines that measured the cells which ended ok, in order, each with the number of its cells."""
    counted: list[tuple[dict, int]] = []
    for machine in (row["machine"] for row in cells if rows.ok(row) and isinstance(row.get("machine"), Mapping)):
        at = next((at for at, (known, _) in enumerate(counted) if known == machine), None)
        if at is None:
            counted.append((dict(machine), 1))
        else:
            counted[at] = machine, counted[at][1] + 1
    return counted


def _unchecked(timed: Sequence[dict]) -> list[str]:
    if not any(row.get("checked") is False for row in timed):
        return []
    return ["Timed without the conformance check: nothing here shows that these mechanisms compute what they should."]


def _mixed_machines(timed: Sequence[dict]) -> list[str]:
    """Cells that a comparison kept from another machine, or from another version."""
    known = machines(timed)
    parts = []
    if len(known) > 1:
        keys = dict.fromkeys(key for machine, _ in known for key in machine)
        differing = [key for key in keys if len({machine.get(key) for machine, _ in known}) > 1]
        parts = [
            f"{', '.join(f'{key} {machine.get(key, human.NONE)}' for key in differing)} ({_cells(count)})"
            for machine, count in known
        ]
    unknown = len(timed) - sum(count for _, count in known)
    if unknown and known:
        parts.append(f"not recorded ({_cells(unknown)})")
    if not parts:
        return []
    return [f"Measured on different machines or versions, so times and memory do not compare: {'; '.join(parts)}."]


def _mixed_timing(timed: Sequence[dict]) -> list[str]:
    """Mechanisms of a bench that did more, or less, than the others."""
    lines = []
    whole = _named(timed, lambda row: row.get("timed") in WHOLE)
    if whole:
        others = _named(timed, lambda row: row.get("timed") is not None and row["timed"] not in WHOLE)
        apart = ", which the others are without" if others else ""
        lines.append(f"Timed as a whole layer with its projections{apart}: {human.listing(whole)}.")
    both = _named(timed, lambda row: row.get("causal") is False)
    if both and _named(timed, lambda row: row.get("causal") is True):
        lines.append(f"Not causal, while the others are: {human.listing(both)}.")
    return lines


def _unseen(timed: Sequence[dict]) -> list[str]:
    if not any(row.get("temp_bytes") == 0 and row.get("peak_bytes") is None for row in timed):
        return []
    return ["Memory of 0 B: XLA on CPU does not count what its YNNPACK kernels take for themselves."]


def _named(timed: Sequence[dict], holds) -> list[str]:
    return list(dict.fromkeys(human.plain(row.get("attention")) for row in timed if holds(row)))


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
