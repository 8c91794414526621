"""The findings, in one or two sentences for each group; only what the numbers carry is written."""

from collections.abc import Callable

from xformers_lab import record
from xformers_lab.report import human, intervals, rows


def sentences(group: rows.Group) -> list[str]:
    """The findings at the greatest length that has results; with none, the one sentence that says so."""
    lengths = [length for length in [*reversed(group.lengths), None] if group.at(length, group.speed)]
    lengths = lengths or [length for length in [*reversed(group.lengths), None] if group.at(length, "metric")]
    if not lengths:
        return ["No cell ended ok, so there is nothing to compare; the table gives the reasons."]
    at = lengths[0]
    quality = _quality(group, at)
    lines = [*quality, *_speed(group, at), *(_growth(group) if group.bench else [])]
    lost = [f"{point.series} ({_why(point)})" for point in group.points if point.seq_len == at and not point.rows]
    if lost:
        lines.append(f"Without a result at this length: {human.listing(lost)}.")
    if quality and rows.seeds(group.rows) == 1:
        lines.append("One seed: differences are not tested.")
    return lines


def place(seq_len: int | None) -> str:
    """How a sentence about a length begins."""
    return "" if seq_len is None else f"At {seq_len:,} tokens: "


def with_interval(estimate: intervals.Estimate | None, form: Callable[[object], str] = human.score) -> str:
    """0.981 ± 0.012, or only the mean where there is one seed."""
    if estimate is None:
        return human.NONE
    mean = form(estimate.mean)
    return mean if estimate.half is None else f"{mean} ± {form(estimate.half)}"


def _quality(group: rows.Group, at: int | None) -> list[str]:
    ranked = group.at(at, "metric")
    if not ranked:
        return []
    name, chance = human.plain(group.first("metric_name", "metric")), human.number(group.first("chance"))
    known = "" if chance is None else f" (chance {human.score(chance)})"
    beaten = [point for point in ranked if chance is not None and not _beats(group, point, chance)]
    if len(beaten) == len(ranked):
        return [f"{place(at)}no variant does better than chance: the best {name} is {_score(ranked[0])}{known}."]
    best = group.best(at, "metric")
    if len(ranked) == 1:
        lines = [f"{place(at)}{ranked[0].series} reaches {name} {_score(ranked[0])}{known}."]
    elif len(best) == len(ranked):
        lines = [f"{place(at)}all variants score the same {name}, {_score(best[0])}{known}."]
    else:
        verb = "share" if len(best) > 1 else "has"
        who = human.listing([point.series for point in best])
        lines = [f"{place(at)}{who} {verb} the best {name}, {_score(best[0])}{known}.", _others(ranked, best)]
    same = [
        point.series
        for point in ranked[1:]
        if intervals.differ(ranked[0].seeds("metric"), point.seeds("metric")) is False
    ]
    if same:
        lines.append(f"Not distinguishable from {ranked[0].series} (paired 95 % interval): {human.listing(same)}.")
    if beaten:
        lines.append(f"No better than chance: {human.listing([point.series for point in beaten])}.")
    return lines


def _why(point: rows.Point) -> str:
    """How the cells of a point without results ended."""
    return human.listing(list(dict.fromkeys(human.status(row) for row in point.failed)))


def _others(ranked: list[rows.Point], best: list[rows.Point]) -> str:
    following, last = ranked[len(best)], ranked[-1]
    if following is last:
        return f"Next and last is {last.series} with {_score(last)}."
    return f"Next is {following.series} with {_score(following)}, last {last.series} with {_score(last)}."


def _beats(group: rows.Group, point: rows.Point, chance: float) -> bool:
    """Better than chance: the whole interval where there is one, else the value."""
    estimate = point.estimate("metric")
    if estimate is None:
        return False
    return estimate.low > chance if group.better("metric") > 0 else estimate.high < chance


def _score(point: rows.Point) -> str:
    return with_interval(point.estimate("metric"))


def _speed(group: rows.Group, at: int | None) -> list[str]:
    ranked = group.at(at, group.speed)
    if not ranked:
        return []
    form = lambda value: human.alone(record.FIGURES[group.speed], value)
    means = [estimate.mean for point in ranked if (estimate := point.estimate(group.speed))]
    what = "Fastest" if group.bench else "Fastest to train"
    lead = place(at) if group.bench else ""
    if len(ranked) == 1:
        return [f"{lead}{ranked[0].series} runs at {form(means[0])}."]
    ratio = max(means[0], means[-1]) / min(means[0], means[-1]) if min(means) > 0 else 0.0
    if group.bench:
        times = f", {ratio:.1f} times as long" if ratio >= 1.05 else ""
        slowest = f"{ranked[-1].series} takes {form(means[-1])}{times}"
        return [f"{lead}{what.lower()} is {ranked[0].series}, {form(means[0])}; {slowest}."]
    times = f"{ratio:.1f} times as fast as" if ratio >= 1.05 else "closely followed by"
    return [f"{what} is {ranked[0].series}, {form(means[0])}, {times} {ranked[-1].series} ({form(means[-1])})."]


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
