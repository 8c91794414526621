"""How a study was done, where it bears on who won: tuned knobs, matched budgets, and whether the task needs range."""

import statistics
from collections.abc import Mapping

from xformers_lab.report import human, intervals, phrases, rows
from xformers_lab.report.intervals import Decision
from xformers_lab.report.phrases import by, metric, score

# What `match=` may hold equal, in words.
BUDGETS = {
    "params": "parameters",
    "flops": "training FLOPs per token",
    "state": "bytes kept in decoding",
    "wallclock": "seconds of training",
}
# A window does without the rest of the sequence where it keeps this share of what full attention scores above a guess.
KEPT = 0.9


def tuning(group: rows.Group, at: int | None) -> list[str]:
    """What tuning changed beside the shared recipe: the ranking, who gained most, and optima at the end of a grid."""
    tuned = [point for point in group.at(at, "metric") if point.shared.estimate("metric")]
    edges = _edges(group)
    lines = _ranking(group, tuned) + _gain(group, tuned)
    if edges:
        lines.append(f"Best at the end of the grid, so that more may be found beyond it: {human.listing(edges)}.")
    return lines


def matching(group: rows.Group, at: int | None) -> list[str]:
    """The variants that could not be given the budget of the others."""
    unmatched = {}
    for point in group.of_role("variant"):
        matched = next(
            (m for row in point.rows if point.seq_len == at and (m := of(row)) and m.get("ok") is False), None
        )
        if matched:
            unmatched.setdefault(budget(matched), []).append(f"{point.series} ({off(matched)})")
    return [
        f"Unmatched in {what}, so that what they gain or lose may be due to it: {human.listing(who)}."
        for what, who in unmatched.items()
    ]


def reach(group: rows.Group, at: int | None) -> list[str]:
    """Whether the task needs long range, from windows that see a part of the sequence; the words claim only what the
    intervals carry."""
    windows = sorted(group.at(at, "metric", "range"), key=_size)
    full = _full(group, at)
    if not windows or full is None:
        return []
    scores = human.listing([f"{score(point)} ({point.series})" for point in windows])
    layers = rows.value(windows[0].rows[0], "layers")
    each = f" in each of {human.plain(layers)} layers" if human.number(layers) not in (None, 1) else ""
    lead = f"Range control: {full.series} scores {metric(group)} {score(full)}, windows{each} {scores}"
    guess = group.guess
    mean = _mean(full)
    if guess is None:
        return [f"{lead}."]
    gain, sign = mean - guess, group.better("metric")
    if not group.beats(full):
        return [f"{lead}: it does no better than a guess, so that they say nothing of range."]
    decided = _decided(windows, full)
    enough = [point for point in windows if _kept(point, full, decided, sign, gain)]
    if enough:
        words = f"the task does not need long range, {enough[0].series} is enough"
        share = f" for {100 * KEPT:.0f} % of what {full.series} scores above a guess"
        return [f"{lead}: {words}{share}{'' if decided else ' (not tested)'}."]
    short = [point for point in windows if sign * (_mean(point) - mean) < (KEPT - 1) * abs(gain)]
    if len(short) == len(windows) and all((d := decided.get(point.series)) is None or d.holds for point in windows):
        return [f"{lead}: the task needs more than {windows[-1].series}{'' if decided else ' (not tested)'}."]
    return [f"{lead}: too few seeds to tell whether the task needs long range."]


def of(row: Mapping) -> Mapping:
    """What a row says of its matching; empty where nothing was matched."""
    matched = row.get("matched")
    return matched if isinstance(matched, Mapping) and matched.get("budget") not in (None, "none") else {}


def budget(matched: Mapping) -> str:
    """What was held equal, in words."""
    return BUDGETS.get(str(matched.get("budget")), human.plain(matched.get("budget")))


def off(matched: Mapping) -> str:
    """How far from the target a row is: +8 %."""
    reached, target = human.number(matched.get("reached")), human.number(matched.get("target"))
    return phrases.percent(reached / target) if reached is not None and target else "not reached"


def best(row: Mapping) -> Mapping:
    """The tuned value of each knob of a row; empty where none was tuned."""
    known = row.get("tuning")
    values = known.get("best") if isinstance(known, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def knob(row: Mapping, key: str) -> str:
    """The tuned value of one knob: 0.003."""
    value = best(row).get(key)
    return human.plain(value) if human.number(value) is None else human.significant(value)


def at_edge(row: Mapping) -> bool:
    """Whether the best value of a row's knobs is at the end of their grid."""
    known = row.get("tuning")
    return isinstance(known, Mapping) and bool(known.get("edge"))


def _ranking(group: rows.Group, tuned: list[rows.Point]) -> list[str]:
    if len(tuned) < 2:
        return []
    sign = group.better("metric")
    shared = sorted(tuned, key=lambda point: -sign * _mean(point.shared))
    places = {point.series: (shared.index(point) + 1, tuned.index(point) + 1) for point in tuned}
    moved = [f"{name} from place {was} to {now}" for name, (was, now) in places.items() if was != now]
    if not moved:
        return ["Tuned as under the shared recipe, the variants rank alike by their means."]
    first = f" (the best was {shared[0].series}, {score(shared[0].shared)})" if shared[0] is not tuned[0] else ""
    return [f"Tuning changes the ranking by means{first}: {human.listing(moved)}."]


def _gain(group: rows.Group, tuned: list[rows.Point]) -> list[str]:
    """Who gains most by tuning; the intervals are corrected for having looked at all."""
    if not tuned:
        return []
    sign = group.better("metric")
    family = intervals.holm(
        {
            point.series: difference
            for point in tuned
            if (difference := intervals.difference(point.seeds("metric"), point.shared.seeds("metric"))) is not None
        }
    )
    most = max(tuned, key=lambda point: sign * (_mean(point) - _mean(point.shared)))
    change = _mean(most) - _mean(most.shared)
    if sign * change <= 0:
        return ["Tuning raises the score of no variant."] if sign > 0 else ["Tuning lowers the score of no variant."]
    decided = family.get(most.series)
    size = by(decided) if decided else f"{phrases.signed(change)}, not tested"
    held = "" if decided is None or decided.holds else ", which is not distinguishable from none"
    return [f"Tuning gains most for {most.series}, from {score(most.shared)} to {score(most)} ({size}){held}."]


def _edges(group: rows.Group) -> list[str]:
    said = {}
    for point in group.points:
        for row in point.rows:
            if at_edge(row):
                values = human.listing([f"{human.plain(key)} {knob(row, key)}" for key in best(row)])
                said.setdefault(f"{point.series} ({values})", None)
    return list(said)


def _full(group: rows.Group, at: int | None) -> rows.Point | None:
    """What windows are held against: the reference where it has full attention, else the baseline that has it."""
    reference = [point for point in group.at(at, "metric") if point.series == group.reference]
    for point in (*reference, *group.at(at, "metric", "baseline")):
        attends = "attention" in group.varied if point in reference else False
        attends = attends or rows.value(point.rows[0], "model") in (None, "auto")
        if attends and rows.value(point.rows[0], "attention") == "full":
            return point
    return None


def _decided(windows: list[rows.Point], full: rows.Point) -> dict[str, Decision]:
    tested = {point.series: point.scores.minus(full.scores) for point in windows}
    return intervals.holm({name: difference for name, difference in tested.items() if difference is not None})


def _kept(point: rows.Point, full: rows.Point, decided: dict[str, Decision], sign: int, gain: float) -> bool:
    """Whether a window keeps enough of what full attention gains, with the whole of the interval where there is one."""
    known = decided.get(point.series)
    change = sign * (_mean(point) - _mean(full))
    low = change - known.interval.half if known and known.interval.half is not None else change
    return low >= (KEPT - 1) * abs(gain)


def _size(point: rows.Point) -> tuple[float, str]:
    """Windows in rising order: by the number in their name."""
    digits = [int(word) for word in point.series.split() if word.isdigit()]
    return (digits[0] if digits else float("inf")), point.series


def _mean(point: rows.Point) -> float:
    values = list(point.seeds("metric").values())
    return statistics.fmean(values)
