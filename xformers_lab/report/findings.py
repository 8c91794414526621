"""The findings, in one or two sentences for each group; only what the numbers carry is written."""

import statistics

from xformers_lab import record
from xformers_lab.report import crossover, human, rows, study, verdict
from xformers_lab.report.phrases import guesses, place, with_interval

__all__ = ["guesses", "place", "sentences", "with_interval"]

SAMPLED = "tested against the choice of test examples alone, not against another seed"


def sentences(group: rows.Group) -> list[str]:
    """The findings at the greatest length that has results; with none, the one sentence that says so. The first says
    who won."""
    lengths = [length for length in [*reversed(group.lengths), None] if group.at(length, group.speed)]
    lengths = lengths or [length for length in [*reversed(group.lengths), None] if group.at(length, "metric")]
    if not lengths:
        return ["No cell ended ok, so there is nothing to compare; the table gives the reasons."]
    at = lengths[0]
    quality = verdict.quality(group, at)
    lines = [*quality]
    if quality and rows.seeds(group.rows) == 1:
        sampled = any(map(rows.sampling, group.rows))
        lines.append(f"One seed: differences are {SAMPLED if sampled else 'not tested'}.")
    for part in (
        verdict.elsewhere,
        verdict.costs,
        verdict.baselines,
        study.tuning,
        study.matching,
        study.reach,
        _speed,
    ):
        lines += part(group, at)
    lines += crossover.sentences(group)
    lines += _growth(group) if group.bench else []
    lost = [f"{point.series} ({_why(point)})" for point in group.points if point.seq_len == at and not point.rows]
    if lost:
        lines.append(f"Without a result at this length: {human.listing(lost)}.")
    return lines


def _why(point: rows.Point) -> str:
    """How the cells of a point without results ended."""
    return human.listing(list(dict.fromkeys(human.status(row) for row in point.failed)))


def _speed(group: rows.Group, at: int | None) -> list[str]:
    ranked = group.programs(at)
    if not ranked:
        return []
    if not group.one_machine(*ranked):
        return ["Not ranked by speed: different machines measured it."]
    form = lambda value: human.alone(record.FIGURES[group.speed], value)
    means = [statistics.fmean(rows.numbers(pool.rows, group.speed)) for pool in ranked]
    what = "Fastest" if group.bench else "Fastest to train"
    lead = place(at) if group.bench else ""
    first, last = ranked[0], ranked[-1]
    if len(ranked) == 1:
        if len(group.at(at, group.speed)) == 1:
            return [f"{lead}{first.series} runs at {form(means[0])}."]
        same = f"{lead}all variants run the same program, so they are not ranked by speed"
        return [f"{same[0].upper()}{same[1:]}: {form(means[0])} on average."]
    alike = [pool for pool in ranked[1:] if group.same_speed(first, pool)]
    if len(alike) == len(ranked) - 1:
        both = f"{form(means[0])} ({first.series}) and {form(means[-1])} ({last.series})"
        return [f"{lead}{'Nothing' if not lead else 'nothing'} tells the speeds apart from noise, between {both}."]
    ratio = max(means[0], means[-1]) / min(means[0], means[-1]) if min(means) > 0 else 0.0
    if group.bench:
        times = f", {ratio:.1f} times as long" if ratio >= 1.05 else ""
        slowest = f"{last.series} takes {form(means[-1])}{times}"
        lines = [f"{lead}{what.lower()} is {first.series}, {form(means[0])}; {slowest}."]
    else:
        times = f"{ratio:.1f} times as fast as" if ratio >= 1.05 else "closely followed by"
        lines = [f"{what} is {first.series}, {form(means[0])}, {times} {last.series} ({form(means[-1])})."]
    if alike:
        lines.append(f"Not told from it by speed: {human.listing([pool.series for pool in alike])}.")
    return lines


def _growth(group: rows.Group) -> list[str]:
    grown = {}
    for row in group.rows:
        power = rows.measure(row, "exponent")
        if power is not None:
            grown.setdefault(next(p.series for p in group.points if any(r is row for r in p.rows)), power)
    if not grown:
        return []
    return [
        "Time grows with length N as "
        + human.listing([f"{human.power(power)} ({name})" for name, power in grown.items()])
        + "."
    ]
