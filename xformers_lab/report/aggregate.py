"""Scores over several tasks: the interquartile mean with an interval by stratified bootstrap.

Agarwal et al., 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264): the
mean of the middle half of all runs of all tasks, which one easy or one failed task moves less than it moves a mean, and
less uncertain than a median. Seeds are drawn anew, with replacement, within each task; a task at another length counts
as another one.

A bootstrap of three seeds is too narrow, so that no claim rests on it: differences are tested like those of one task,
paired by seed, over the interquartile means of each seed alone.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from xformers_lab.report import human, intervals, rows, verdict
from xformers_lab.report.contests import Contest, Scores

DRAWS = 10_000
SEED = 0
# What the interquartile mean leaves out at each end.
CUT = 0.25


@dataclasses.dataclass(frozen=True)
class Score:
    """One series over all tasks: its interquartile mean, 0 for a guess and 1 for the best there can be; the ends of its
    95 % interval, None with one seed; and how many seeds all tasks have."""

    series: str
    role: str
    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class Overall:
    """The aggregates of a comparison, the best first. settings: tasks at their lengths, in words; tasks: how many of
    them are different tasks; missing: series -> the settings that it has no result in; left_out: tasks whose metric has
    no known range; contest: which of the variants differ."""

    scores: list[Score]
    settings: list[str]
    tasks: int
    missing: Mapping[str, list[str]]
    left_out: list[str]
    contest: Contest

    def of_role(self, role: str) -> list[Score]:
        """The scores of a role, the best first."""
        return [score for score in self.scores if score.role == role]


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """The mean of the middle half along the last axis; of n values, the n / 4 at each end, rounded down, are cut."""
    cut = int(CUT * scores.shape[-1])
    middle = np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut]
    return middle.mean(axis=-1)


def bootstrap(scores: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> tuple[float, float]:
    """The 95 % percentile interval of the interquartile mean of (tasks, seeds) scores, seeds drawn anew within each
    task."""
    tasks, seeds = scores.shape
    drawn = np.random.default_rng(seed).integers(0, seeds, (draws, tasks, seeds))
    means = interquartile_mean(scores[np.arange(tasks)[:, None], drawn].reshape(draws, -1))
    low, high = np.percentile(means, [100 * intervals.LEVEL / 2, 100 * (1 - intervals.LEVEL / 2)])
    return float(low), float(high)


def normalised(group: rows.Group, metric: float) -> float | None:
    """A metric as a share of what can be gained over a guess: 0 for a guess, 1 for a perfect score, which is 1 where
    more is better and 0 where less is. None where that is not the range of the metric, or a guess is not known."""
    guess = group.guess
    if group.better("metric") < 0:
        return None if guess is None or guess <= 0 else (guess - metric) / guess
    if guess is None or not 0 <= guess < 1 or not 0 <= metric <= 1:
        return None
    return (metric - guess) / (1 - guess)


def over_tasks(groups: Sequence[rows.Group]) -> Overall | None:
    """The aggregates of trained variants and baselines; None with fewer than two tasks to take them over."""
    settings: dict[tuple[str, int | None], dict[str, Scores]] = {}
    roles: dict[str, str] = {}
    left_out = []
    for group in groups:
        lengths = [*group.lengths, *({point.seq_len for point in group.points} & {None})]
        points = [point for at in lengths for role in ("variant", "baseline") for point in group.at(at, "metric", role)]
        shares = {id(point): _shares(group, point) for point in points}
        if any(share is None for share in shares.values()):
            left_out.append(group.title)
            continue
        for point in points:
            roles.setdefault(point.series, point.role)
            share = shares[id(point)]
            if share is not None:
                settings.setdefault((group.title, point.seq_len), {})[point.series] = share
    if len({task for task, _ in settings}) < 2:
        return None
    missing: dict[str, list[str]] = {}
    for (task, at), known in settings.items():
        for series in roles.keys() - known.keys():
            missing.setdefault(series, []).append(_words(task, at))
    whole = {series: [known[series] for known in settings.values()] for series in roles if series not in missing}
    seeds = {series: _seeds(parts) for series, parts in whole.items()}
    scores = [_score(series, roles[series], parts, seeds[series]) for series, parts in whole.items() if seeds[series]]
    if not scores:
        return None
    by_seed = [_by_seed(series, parts, seeds[series]) for series, parts in whole.items() if seeds[series]]
    split = {role: [one for one in by_seed if roles[one.series] == role] for role in ("variant", "baseline")}
    reference = next((group.reference for group in groups if group.reference in whole), None)
    return Overall(
        sorted(scores, key=lambda score: -score.mean),
        [_words(task, at) for task, at in settings],
        len({task for task, _ in settings}),
        missing,
        left_out,
        Contest(split["variant"], split["baseline"], reference, 0.0),
    )


def sentences(groups: Sequence[rows.Group]) -> list[str]:
    """The verdict over all tasks; none with fewer than two."""
    overall = over_tasks(groups)
    if overall is None:
        return []
    variants, baselines = overall.of_role("variant"), overall.of_role("baseline")
    where = f"{overall.tasks} tasks" + (
        f" ({len(overall.settings)} with their lengths)" if len(overall.settings) > overall.tasks else ""
    )
    lines = []
    if variants:
        what = "interquartile mean of what is gained over a guess, 1 at most"
        lines.append(f"Over {where}, by the {what}: {human.listing([words(score) for score in variants])}.")
        lines += verdict.against(overall.contest, [score.series for score in variants], 1)
        lines += verdict.from_the_best(overall.contest, [score.series for score in variants])
    if variants and baselines:
        lines.append(f"Of the baselines, the best is {words(baselines[0])}.")
    if overall.missing:
        parts = [f"{series} (no result: {human.listing(where, 3)})" for series, where in overall.missing.items()]
        lines.append(f"Not over all tasks: {human.listing(parts)}.")
    if overall.left_out:
        lines.append(f"Left out, since the range of the metric is not known: {human.listing(overall.left_out)}.")
    return lines


def words(score: Score) -> str:
    """ "full 0.812 [0.790, 0.830]"."""
    interval = "" if score.low is None else f" [{human.score(score.low)}, {human.score(score.high)}]"
    return f"{score.series} {human.score(score.mean)}{interval}"


def _shares(group: rows.Group, point: rows.Point) -> Scores | None:
    """The scores of a point, normalised; None where one of them cannot be."""
    shares = {seed: normalised(group, metric) for seed, metric in point.seeds("metric").items()}
    known = {seed: share for seed, share in shares.items() if share is not None}
    guess = group.guess or 0.0
    scale = guess if group.better("metric") < 0 else 1 - guess
    return Scores(point.series, known, point.sampling / scale) if len(known) == len(shares) and known else None


def _seeds(parts: Iterable[Scores]) -> list:
    """The seeds that all settings have, in order."""
    first, *others = parts
    return [seed for seed in first.by_seed if all(seed in other.by_seed for other in others)]


def _score(series: str, role: str, parts: Sequence[Scores], seeds: Sequence) -> Score:
    scores = np.array([[part.by_seed[seed] for seed in seeds] for part in parts])
    low, high = bootstrap(scores) if len(seeds) > 1 else (None, None)
    return Score(series, role, float(interquartile_mean(scores.ravel())), low, high, len(seeds))


def _by_seed(series: str, parts: Sequence[Scores], seeds: Sequence) -> Scores:
    """The interquartile mean of each seed alone, and what scoring samples leaves open of it."""
    means = {seed: float(interquartile_mean(np.array([part.by_seed[seed] for part in parts]))) for seed in seeds}
    return Scores(series, means, math.hypot(*(part.sampled for part in parts)) / len(parts))


def _words(task: str, at: int | None) -> str:
    return task if at is None else f"{task} at {at:,} tokens"
