"""What must be known before the numbers are compared: written under the table and at the head of the page."""

import collections
import math
from collections.abc import Collection, Mapping, Sequence

from xformers_lab.record import BUSY
from xformers_lab.report import human, rows, study

# Costs of two rows whose ratio is greater are not the same.
UNEQUAL = 1.02

# What runs attention over a pattern where no kernel of an accelerator does.
BLOCKS = "blocks"

# Passes of a bench that are timed with all that a layer does.
WHOLE = ("call", "decode", "decode_several")


def of(cells: Sequence[dict]) -> list[str]:
    """One sentence for each thing in which cells beside each other differ, or that was left out."""
    timed = [row for row in cells if rows.ok(row)]
    return [
        *_unchecked(timed),
        *_untimed(timed),
        *_hosts(timed),
        *_mixed_machines(timed),
        *_mixed_timing(timed),
        *_unseen(timed),
    ]


def of_group(group: rows.Group, *, sizes: bool = False) -> list[str]:
    """One sentence for each thing in which the rows of one table differ beside what was varied, or that makes their
    times uncertain. sizes: whether their sizes were varied, so that these are no such thing."""
    return [*_matched(group), *_other_examples(group), *([] if sizes else _unequal(group)), *_busy(group)]


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


def _matched(group: rows.Group) -> list[str]:
    """What was held equal, of the variants and of what stands beside them."""
    held: dict[str, dict] = {}
    for point in group.points:
        for matched in filter(None, map(study.of, point.rows)):
            held.setdefault(study.budget(matched), {}).setdefault(point.series, []).append(matched)
    lines = []
    for budget, by_series in held.items():
        off = [
            f"{name} ({study.off(next(m for m in all_of if m.get('ok') is False))})"
            for name, all_of in by_series.items()
            if any(m.get("ok") is False for m in all_of)
        ]
        but = f", but for {human.listing(off)}" if off else ""
        lines.append(f"Held equal within 2 % at each length: {budget}{but}.")
    return lines


def _other_examples(group: rows.Group) -> list[str]:
    """Who was scored on other examples than the rest: what remembers reads on, what does not has examples from
    everywhere."""
    parts = {point.series: point.rows[0].get("consecutive") is True for point in group.points if point.rows}
    partly = any(rows.partly(row) for point in group.points for row in point.rows)
    if not partly or len(set(parts.values())) < 2:
        return []
    runs = human.listing([name for name, in_runs in parts.items() if in_runs])
    return [
        f"Scored on other examples than the rest: {runs}, for what remembers reads on; eval_batches=all scores all."
    ]


def _unequal(group: rows.Group) -> list[str]:
    """Widths, parameters and FLOPs that are not the same in all variants: a comparison of one thing is of these as
    well."""
    variants = group.of_role("variant")
    widths = _differing(_by_program(variants, "dim"))
    lines = [f"Widths (dim) differ by more than 2 %: {widths}."] if widths else []
    for name, words in (("parameters", "Parameters"), ("flops", "FLOPs")):
        if apart := _at_lengths(group, name):
            lines.append(f"{words} differ by more than 2 %{apart}.")
    lengths = [_by_program([point for point in variants if point.seq_len == at], "parameters") for at in group.lengths]
    sizes = {program: [size[program] for size in lengths if program in size] for size in lengths for program in size}
    grown = [f"{human.times(mine[-1] / mine[0])} ({program})" for program, mine in sizes.items() if _unlike(mine)]
    if grown:
        times = human.listing(grown, 4)
        lines.append(f"Parameters change with the length, from the shortest to the longest: {times}.")
    return lines


def _by_program(points: Sequence[rows.Point], name: str) -> dict[str, float]:
    """What each program has of a figure, or of a key of its config; rows that differ in their training alone have the
    same. Without what is not known or not positive."""
    known: dict[str, float] = {}
    for point in points:
        estimate = point.estimate(name)
        number = estimate.mean if estimate else human.number(rows.value(point.rows[0], name)) if point.rows else None
        if number is not None and number > 0:
            known.setdefault(point.program, number)
    return known


def _unlike(numbers: Collection[float]) -> bool:
    return bool(numbers) and max(numbers) > UNEQUAL * min(numbers)


def _at_lengths(group: rows.Group, name: str) -> str:
    """Who differs in a figure from the first row of its length, at the length where they differ most; empty where
    nowhere."""
    lengths = {}
    for at in dict.fromkeys(point.seq_len for point in group.of_role("variant")):
        figures = _by_program([point for point in group.of_role("variant") if point.seq_len == at], name)
        if _unlike(figures.values()):
            lengths[at] = max(figures.values()) / min(figures.values()), figures
    if not lengths:
        return ""
    at = max(lengths, key=lambda length: lengths[length][0])
    more = "" if len(lengths) == 1 else f" (also at {len(lengths) - 1} other length{'s' * (len(lengths) > 2)})"
    place = "" if at is None else f" at {at:,} tokens"
    return f"{place}: {_differing(lengths[at][1])}{more}"


def _differing(known: Mapping[str, float]) -> str:
    """ "linformer 1.47 times those of full": what is not the first one's; empty where all agree within 2 %."""
    if not _unlike(known.values()):
        return ""
    first, *others = known
    ratios = {name: known[name] / known[first] for name in others}
    apart = {name: ratio for name, ratio in ratios.items() if not 1 / UNEQUAL <= ratio <= UNEQUAL}
    # Two that differ from each other may each be close to the first.
    apart = apart or dict(sorted(ratios.items(), key=lambda item: item[1])[:: max(1, len(ratios) - 1)])
    names = sorted(apart, key=lambda name: -abs(math.log(apart[name])))
    return human.listing([f"{name} {human.times(apart[name])}" for name in names]) + f" those of {first}"


def _busy(group: rows.Group) -> list[str]:
    """Cells whose times of equal work spread, so that something else was busy."""
    spread: dict[str, float] = {}
    for point in group.points:
        for row in point.rows:
            ratio = rows.ratio(row)
            if ratio is not None and ratio > BUSY:
                name = point.series + ("" if point.seq_len is None else f" at {point.seq_len:,} tokens")
                spread[name] = max(ratio, spread.get(name, 0.0))
    if not spread:
        return []
    worst = sorted(spread, key=lambda name: -spread[name])
    cells = human.listing([f"{spread[name]:.2f} ({name})" for name in worst], 4)
    loads = [load for row in group.rows if (load := rows.measure(row, "load")) is not None]
    load = f"; load up to {max(loads):.1f}" if loads else ""
    return [f"Warning: median over least time above {BUSY}, so the machine was busy or the work uneven: {cells}{load}."]


def _unchecked(timed: Sequence[dict]) -> list[str]:
    if not any(row.get("checked") is False for row in timed):
        return []
    return ["Timed without the conformance check: nothing shows that mechanisms of your own compute what they should."]


def _untimed(trained: Sequence[dict]) -> list[str]:
    """Cells without times, and why."""
    why = [human.plain(row["untimed"]) for row in trained if isinstance(row.get("untimed"), str)]
    if not why:
        return []
    which = "" if len(why) == len(trained) else f" of {_cells(len(why))}"
    reasons = human.listing(list(dict.fromkeys(why)))
    return [f"No times{which}, since cells beside one another disturb them: {reasons}."]


def _hosts(trained: Sequence[dict]) -> list[str]:
    """Where cells trained, where that is several hosts."""
    counted = collections.Counter(human.plain(row["host"]) for row in trained if isinstance(row.get("host"), str))
    if len(counted) < 2:
        return []
    hosts = human.listing([f"{host} ({_cells(count)})" for host, count in counted.items()], 8)
    return [f"Trained on {len(counted)} hosts: {hosts}."]


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
    for kernel in dict.fromkeys(row["kernel"] for row in timed if row.get("kernel") not in (None, BLOCKS)):
        run = _named(timed, lambda row, kernel=kernel: row.get("kernel") == kernel)
        lines.append(f"Attention is run by the kernel {kernel} in {human.listing(run)}.")
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
