"""Which axis of an ablation mattered: the largest difference from the base that each one makes, with its interval."""

from collections.abc import Mapping, Sequence

from xformers_lab.report import human, intervals
from xformers_lab.report.rows import Group, Point, groups


def lines(rows: Sequence[dict], varied: Sequence[str], axes: Mapping[str, Sequence[str]], base: str) -> list[str]:
    """For each task and length a heading, then a line for each axis in their order. axes: the names of the variants of
    each, base: that of the base. Differences are paired by seed; their intervals are corrected for all variants of that
    task and length (Holm), and one that does not hold is said not to be distinguishable."""
    said = []
    for group in groups(rows, varied):
        for length in group.lengths:
            said += _of_length(group, length, axes, base)
    return said


def _of_length(group: Group, length: int, axes: Mapping[str, Sequence[str]], base: str) -> list[str]:
    points = {point.series: point for point in group.points if point.seq_len == length}
    origin = points.get(base)
    reference = origin.estimate("metric") if origin else None
    name = human.plain(group.first("metric_name", "metric"))
    where = f"{group.title} at {length:,} tokens"
    if origin is None or reference is None:
        return [f"{where}: the base has no result, so nothing is compared with it"]
    known = {name: point for name, point in points.items() if name != base and point.seeds("metric")}
    family = {name: difference for name, point in known.items() if (difference := _difference(point, origin))}
    decisions = intervals.holm(family)
    found = [f"{where}: {name} of the base {human.score(reference.mean)}; the largest difference of each axis"]
    width = max(map(len, axes), default=0)
    for axis, variants in axes.items():
        ran = [variant for variant in variants if variant in known]
        if not ran:
            found.append(f"  {axis:{width}s}  no result")
            continue
        most = max(ran, key=lambda variant: abs(_mean(known[variant], origin)))
        found.append(f"  {axis:{width}s}  {most}: {_shown(_mean(known[most], origin), decisions.get(most))}")
    return found


def _difference(point: Point, origin: Point) -> intervals.Difference | None:
    return intervals.difference(point.seeds("metric"), origin.seeds("metric"))


def _mean(point: Point, origin: Point) -> float:
    """The mean difference over the seeds that both have, or of the means where they share none."""
    one, other = point.seeds("metric"), origin.seeds("metric")
    shared = [one[seed] - other[seed] for seed in one if seed in other]
    if shared:
        return sum(shared) / len(shared)
    return sum(one.values()) / len(one) - sum(other.values()) / len(other)


def _shown(mean: float, decision: intervals.Decision | None) -> str:
    if decision is None:
        return f"{mean:+.3f} (one seed, so not tested)"
    half = decision.interval.half or 0.0
    return f"{mean:+.3f} \u00b1 {half:.3f}{'' if decision.holds else ' (not distinguishable from the base)'}"
