"""The findings, in one or two sentences for each group; only what the numbers carry is written."""

import statistics
from collections.abc import Callable

from xformers_lab import record
from xformers_lab.report import human, intervals, rows

SAMPLED = "tested against the choice of test examples alone, not against another seed"


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
        sampled = any(map(rows.sampling, group.rows))
        lines.append(f"One seed: differences are {SAMPLED if sampled else 'not tested'}.")
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
    name, known = human.plain(group.first("metric_name", "metric")), guesses(group)
    known = f" ({known})" if known else ""
    guess = "chance" if group.majority is None else "a guess"
    beaten = [point for point in ranked if not group.beats(point)]
    if len(beaten) == len(ranked):
        return [f"{place(at)}no variant does better than {guess}: the best {name} is {_score(ranked[0])}{known}."]
    best = group.best(at, "metric")
    same = [point for point in ranked[1:] if group.same_metric(ranked[0], point)]
    if len(ranked) == 1:
        lines = [f"{place(at)}{ranked[0].series} reaches {name} {_score(ranked[0])}{known}."]
    elif len(best) == len(ranked):
        lines = [f"{place(at)}all variants score the same {name}, {_score(best[0])}{known}."]
    elif len(same) == len(ranked) - 1:
        ends = " and ".join(f"{_score(point)} ({point.series})" for point in (ranked[0], ranked[-1]))
        return [f"{place(at)}nothing tells the variants apart by {name}, between {ends}{known}."]
    else:
        verb = "share" if len(best) > 1 else "has"
        who = human.listing([point.series for point in best])
        lines = [f"{place(at)}{who} {verb} the best {name}, {_score(best[0])}{known}.", _others(ranked, best)]
    if same and len(best) < len(ranked):
        how, names = "paired " if rows.seeds(group.rows) > 1 else "", human.listing([point.series for point in same])
        lines.append(f"Not distinguishable from {ranked[0].series} ({how}95 % interval): {names}.")
    if beaten:
        lines.append(f"No better than {guess}: {human.listing([point.series for point in beaten])}.")
    return lines


def guesses(group: rows.Group) -> str:
    """What is to be beaten, in words: "chance 0.500 · majority 0.947", the second where classes are unequal."""
    known = {"chance": human.number(group.first("chance")), "majority": group.majority}
    return " · ".join(f"{name} {human.score(share)}" for name, share in known.items() if share is not None)


def _why(point: rows.Point) -> str:
    """How the cells of a point without results ended."""
    return human.listing(list(dict.fromkeys(human.status(row) for row in point.failed)))


def _others(ranked: list[rows.Point], best: list[rows.Point]) -> str:
    following, last = ranked[len(best)], ranked[-1]
    if following is last:
        return f"Next and last is {last.series} with {_score(last)}."
    return f"Next is {following.series} with {_score(following)}, last {last.series} with {_score(last)}."


def _score(point: rows.Point) -> str:
    return with_interval(point.estimate("metric"))


def _speed(group: rows.Group, at: int | None) -> list[str]:
    ranked = group.programs(at)
    if not ranked:
        return []
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
