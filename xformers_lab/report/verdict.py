"""Who won by the metric of a group, by how much, at what cost, and what guessing and baselines do.

A variant is called better or worse only where a corrected test says so (`contests`).
"""

from collections.abc import Sequence

from xformers_lab.report import human, phrases, rows
from xformers_lab.report.contests import Contest
from xformers_lab.report.intervals import Decision
from xformers_lab.report.phrases import by, metric, names, place, score

# Costs whose ratio is within this of one are the same.
SAME_COST = 1.02
COSTS = {"memory": "memory", "state_bytes": "decoding state", "flops": "FLOPs", "parameters": "parameters"}


def quality(group: rows.Group, at: int | None) -> list[str]:
    """The best by the metric at one length, the differences that hold, and who does no better than a guess; none where
    no variant has a metric there."""
    ranked = group.at(at, "metric")
    if not ranked:
        return []
    known = phrases.guesses(group)
    known = f" ({known})" if known else ""
    guess = "chance" if list(group.guesses) == ["chance"] else "a guess"
    beaten = [point for point in ranked if not group.beats(point)]
    if len(beaten) == len(ranked):
        return [
            f"{place(at)}no variant does better than {guess}: the best {metric(group)} is {score(ranked[0])}{known}."
        ]
    best = group.best(at, "metric")
    contest = group.contest(at)
    if len(ranked) == 1:
        lines = [f"{place(at)}{ranked[0].series} reaches {metric(group)} {score(ranked[0])}{known}."]
    elif len(best) == len(ranked):
        lines = [f"{place(at)}all variants score the same {metric(group)}, {score(best[0])}{known}."]
    elif contest.pairs and not any(each.holds for each in (*contest.pairs.values(), *contest.against.values())):
        ends = " and ".join(f"{score(point)} ({point.series})" for point in (ranked[0], ranked[-1]))
        how = phrases.tests(contest.pairs.values()) + (" over all pairs" if len(contest.pairs) > 1 else "")
        lines = [f"{place(at)}nothing tells the variants apart by {metric(group)}, between {ends}{known}: {how}."]
    else:
        verb = "share" if len(best) > 1 else "has"
        lines = [f"{place(at)}{names(best)} {verb} the best {metric(group)}, {score(best[0])}{known}."]
        names_ranked = [point.series for point in ranked]
        lines += [_others(ranked, best), *against(contest, names_ranked, group.better("metric"))]
        lines += from_the_best(contest, names_ranked)
    if beaten:
        lines.append(f"No better than {guess}: {names(beaten)}.")
    return lines


def elsewhere(group: rows.Group, at: int | None) -> list[str]:
    """Who has the best mean at the other lengths, where it beats a guess there."""
    winners: dict[str, list[str]] = {}
    for length in group.lengths:
        best = [point for point in group.best(length, "metric") if length != at and group.beats(point)]
        if best:
            winners.setdefault(names(best), []).append(f"{length:,}")
    if not winners:
        return []
    parts = [f"{who} at {human.listing(lengths)} tokens" for who, lengths in winners.items()]
    return [f"At other lengths, the best by the mean: {'; '.join(parts)}."]


def costs(group: rows.Group, at: int | None) -> list[str]:
    """What the best, and those that no test tells from it, cost beside the reference."""
    ranked = group.at(at, "metric")
    reference = next((point for point in ranked if point.series == group.reference), None)
    if reference is None or len(ranked) < 2 or not group.beats(ranked[0]):
        return []
    lead = [ranked[0], *(point for point in ranked[1:] if group.same_metric(ranked[0], point))]
    costs = {point.series: _cost(group, point, reference) for point in lead if point is not reference}
    if not any(costs.values()) and ranked[0] is reference:
        return []
    parts = [f"{name} {cost or 'the same'}" for name, cost in costs.items()]
    more = f"; and {len(parts) - 6} more" if len(parts) > 6 else ""
    return [f"Cost beside {reference.series}: {'; '.join(parts[:6])}{more}."] if parts else []


def baselines(group: rows.Group, at: int | None) -> list[str]:
    """What the best of the baselines scores, and which variants do no better."""
    beside, ranked = group.at(at, "metric", "baseline"), group.at(at, "metric")
    if not beside or not ranked:
        return []
    base, best, sign = beside[0], ranked[0], group.better("metric")
    of_all = "The baseline" if len(beside) == 1 else "The best baseline,"
    comma = "" if len(beside) == 1 else ","
    lead = f"{of_all} {base.series}{comma} scores {score(base)}"
    decided = {point.series: group.contest(at).between(base.series, point.series) for point in ranked}
    lines = [f"{lead}: {_beside(decided[best.series], best, _ahead(base, best, sign))}."]
    ahead = [point for point in ranked[1:] if _ahead(base, point, sign) and _told(decided[point.series])]
    alike = [point for point in ranked[1:] if (known := decided[point.series]) is not None and not known.holds]
    if ahead:
        lines.append(f"Below {base.series}: {names(ahead)}.")
    if alike:
        lines.append(f"Not distinguishable from {base.series}: {names(alike)}.")
    return lines


def _ahead(first: rows.Point, second: rows.Point, sign: int) -> bool:
    one, other = first.estimate("metric"), second.estimate("metric")
    return one is not None and other is not None and sign * (one.mean - other.mean) > 0


def _told(decision: Decision | None) -> bool:
    """Whether a difference is more than noise, as far as it was tested."""
    return decision is None or decision.holds


def _beside(decision: Decision | None, best: rows.Point, ahead: bool) -> str:
    """How a baseline does beside the best variant."""
    who = f"{best.series}, the best variant"
    if decision is None:
        return f"{'ahead of' if ahead else 'not ahead of'} {who} (not tested)"
    if not decision.holds:
        return f"not distinguishable from {who} ({by(decision)})"
    return f"{'better' if ahead else 'worse'} than {who} ({by(decision)})"


def _others(ranked: Sequence[rows.Point], best: Sequence[rows.Point]) -> str:
    following, last = ranked[len(best)], ranked[-1]
    if following is last:
        return f"Next and last is {last.series} with {score(last)}."
    return f"Next is {following.series} with {score(following)}, last {last.series} with {score(last)}."


def against(contest: Contest, ranked: Sequence[str], sign: int) -> list[str]:
    """The family against the reference: better, worse, not distinguishable. ranked: the variants, the best first; sign:
    +1 where more is better, -1 where less is."""
    if contest.reference not in contest.variants:
        missing = f"{contest.reference}, the reference, has no result here: nothing is tested against it."
        return [missing] if contest.pairs else []
    decided = [(name, contest.against[name]) for name in ranked if name in contest.against]
    if not decided:
        return []
    better = [f"{name} ({by(each)})" for name, each in decided if each.holds and sign * each.difference.mean > 0]
    worse = [f"{name} ({by(each)})" for name, each in decided if each.holds and sign * each.difference.mean <= 0]
    alike = [name for name, each in decided if not each.holds]
    said = {"better": better, "worse": worse, "not distinguishable": alike}
    parts = [f"{word}: {human.listing(who)}" for word, who in said.items() if who]
    return [
        f"Against {contest.reference}, the reference ({phrases.tests(contest.against.values())}), {'; '.join(parts)}."
    ]


def from_the_best(contest: Contest, ranked: Sequence[str]) -> list[str]:
    """Who is not told from the best, where the sentence about the reference does not say it."""
    best, *others = ranked
    decided = {name: contest.between(best, name) for name in others}
    alike = [name for name, each in decided.items() if each is not None and not each.holds]
    if best == contest.reference or not alike:
        return []
    how = phrases.tests(contest.pairs.values())
    return [f"Not distinguishable from {best} ({how} over all pairs): {human.listing(alike)}."]


def _cost(group: rows.Group, point: rows.Point, reference: rows.Point) -> str:
    """ "0.31 times the time and 0.5 times the memory": what differs; empty where nothing does."""
    parts = []
    mine, others = point.estimate(group.speed), reference.estimate(group.speed)
    timed = mine and others and mine.mean > 0 and others.mean > 0 and group.one_machine(point, reference)
    if mine and others and timed and not _same_speed(group, point, reference):
        ratio = mine.mean / others.mean
        parts.append(f"{human.times(ratio if group.better(group.speed) < 0 else 1 / ratio)} the time")
    for name, words in COSTS.items():
        mine, others = point.estimate(name), reference.estimate(name)
        if mine and others and mine.mean > 0 and others.mean > 0:
            ratio = mine.mean / others.mean
            if not 1 / SAME_COST <= ratio <= SAME_COST:
                parts.append(f"{human.times(ratio)} the {words}")
    return human.listing(parts)


def _same_speed(group: rows.Group, point: rows.Point, reference: rows.Point) -> bool:
    pools = {pool.program: pool for pool in group.programs(point.seq_len)}
    one, other = pools[point.program], pools[reference.program]
    return one is other or group.same_speed(one, other)
