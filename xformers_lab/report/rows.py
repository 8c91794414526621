"""Rows in groups, series and points: what belongs in one chart, on one line, at one length."""

import dataclasses
import functools
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xformers_lab import record
from xformers_lab.record import PLACES
from xformers_lab.report import human, intervals
from xformers_lab.report.contests import Contest, Scores

# Keys that change what a program is run on, and how often, but not the program.
TRAINING = ("lr", "schedule", "warmup", "steps", "eval_every", "eval_batches", "save_every", "runs", "stall")
# Keys that change the program only between zero and anything else.
SWITCHES = ("clip", "weight_decay", "dropout")
# Keys that say which draw of a variant a row is.
SEEDS = ("seed", "init_seed", "data_seed")
# The least ratio of two speeds that one run each can tell apart, however steady its times were.
LEAST_RATIO = 1.05
# Where a class that was given from Python is kept.
_KEPT = re.compile(r"(?:[^\s:+()]*/)?source-([0-9a-f]{6})[0-9a-f]{6}/(\w+)\.py")


def value(row: dict, key: str) -> Any:
    """The value of a swept key: from the top of the row, else from its config; None where the row has neither."""
    if key in row:
        return row[key]
    config = row.get("config") or {}
    for section in (config, config.get("model"), config.get("train")):
        known = section.get(key) if isinstance(section, Mapping) else None
        if known is not None and not isinstance(known, Mapping):  # "model" is a section and a key in it
            return known
    return None


def ok(row: dict) -> bool:
    """Whether a cell ended as it should; a row without a status did."""
    return row.get("status", "ok") == "ok"


def measure(row: dict, name: str) -> float | None:
    """A finite number of an ok row, by the name of its figure or its key, else None."""
    if not ok(row):
        return None
    figure = record.FIGURES.get(name)
    return human.number(figure.value(row) if figure else row.get(name))


def draw(row: dict) -> Any:
    """The seed of a row; with the others where it has seeds of their own for its weights and its data."""
    seed, *others = (value(row, key) for key in SEEDS)
    return seed if others == [None] * len(others) else (seed, *others)


def role(row: dict) -> str:
    """What a row is for: "variant" where it does not say another one."""
    known = row.get("role")
    return known if known in ("baseline", "range") else "variant"


def shared(row: dict) -> dict:
    """The run of a tuned row under the recipe that all share, as a row; {} where there is none."""
    known = row.get("shared")
    return dict(known) if isinstance(known, Mapping) else {}


def by_length(row: dict) -> dict[int, dict]:
    """Length -> the test split scored at it, as a row; {} where it was scored at none but the row's own."""
    scores = row.get("by_length")
    scores = [each for each in scores if isinstance(each, Mapping)] if isinstance(scores, Sequence) else []
    return {int(at): dict(each) for each in scores if (at := human.number(each.get("seq_len"))) is not None}


def sampling(row: dict) -> float:
    """Half the width of the interval that scoring a sample of the test split leaves around the metric; its wider
    side, and 0 where the row has none."""
    bounds, mean = row.get("metric_interval"), measure(row, "metric")
    if mean is None or not isinstance(bounds, Sequence) or len(bounds) != 2:
        return 0.0
    low, high = map(human.number, bounds)
    return 0.0 if low is None or high is None else max(mean - low, high - mean, 0.0)


def scored(row: dict) -> str:
    """On how many examples the metric was taken: "256 of 1,821" where a part of the split was scored; empty where the
    row does not say."""
    examples, every = human.number(row.get("examples")), human.number(row.get("examples_of"))
    if examples is None:
        return ""
    return f"{examples:,.0f}" if every is None or examples >= every else f"{examples:,.0f} of {every:,.0f}"


def partly(row: dict) -> bool:
    """Whether a part of the split was scored, and not all of it."""
    examples, every = human.number(row.get("examples")), human.number(row.get("examples_of"))
    return examples is not None and every is not None and examples < every


def validation(row: dict) -> list[tuple[int, float | None, float | None]]:
    """(step, loss, metric) of each validation, None for what was not finite."""
    points = [tuple(map(human.number, point)) for point in row.get("validation") or []]
    return [(int(step), loss, metric) for step, loss, metric in points if step is not None]


def scored_at(row: dict) -> int | None:
    """The step that the metric is of."""
    step = human.number(row.get("step", row.get("steps"))) if ok(row) else None
    return None if step is None or measure(row, "metric") is None else int(step)


def numbers(rows: Iterable[dict], name: str) -> list[float]:
    """What the rows have of a measure, without those that have none."""
    return [number for row in rows if (number := measure(row, name)) is not None]


def ratio(row: dict) -> float | None:
    """Median over least time of the row's equal work: what noise its speed has; None where it is not known."""
    known = measure(row, "seconds_ratio")
    if known is not None or row.get("seconds_rounds"):
        return known
    median, least = measure(row, "seconds_median"), measure(row, "seconds_min")
    return None if median is None or not least else median / least


def program(row: dict, varied: Sequence[str]) -> str:
    """What tells the row's program from those of other rows, as `series` says it; rows that differ in how they are
    trained alone, with another lr, say, run the same one."""
    words = [key for key in varied if key not in TRAINING]
    apart = [f"{key} {'> 0' if value(row, key) else '= 0'}" for key in varied if key in SWITCHES]
    name = series(row, [key for key in words if key not in SWITCHES])
    return human.plain(" · ".join([name, *apart]))


def series(row: dict, varied: Sequence[str]) -> str:
    """The name of a row's line in the charts: "local:window=16 · post"; numbers carry their key, "dim=64". A row that
    has a name of its own, as a baseline has, is called by that."""
    if isinstance(row.get("name"), str) and row["name"].strip():
        return human.plain(row["name"])
    words = []
    for key in varied:
        if key in PLACES:
            continue
        choice = value(row, key)
        words.append(_called(choice) if isinstance(choice, str) else f"{key}={'none' if choice is None else choice}")
    if not words:
        words = [value(row, "model"), value(row, "attention")]
        words = [str(_called(word)) for word in words if word not in (None, "auto")]
    return human.plain(" · ".join(words) or "this model")


def named_by(varied: Sequence[str]) -> list[str]:
    """The keys that a table shows: what varied, and where no variants did, the one mechanism that there is."""
    return [*varied, *([] if any(key not in PLACES for key in varied) else ["attention"])]


def shown(row: dict, key: str) -> str:
    """The value of a key as text for people."""
    choice = value(row, key)
    return "none" if choice is None else human.plain(_called(choice))


def _called(choice: Any) -> Any:
    """A value with a class that was given from Python called by its name, not by where it is kept."""
    return _KEPT.sub(r"\2@\1", choice) if isinstance(choice, str) else choice


def label(row: dict, varied: Sequence[str]) -> str:
    """A cell's name in a sentence: "local:window=16 at 256 tokens, seed 2"."""
    at, seeds = length(row), [key for key in SEEDS if key in varied]
    seed = f", {drawn(row, seeds)}" if seeds else ""
    return f"{series(row, varied)}{'' if at is None else f' at {at:,} tokens'}{seed}"


def drawn(row: dict, keys: Iterable[str]) -> str:
    """The seeds of a row that vary, as text: "seed 2"."""
    return ", ".join(f"{key} {shown(row, key)}" for key in SEEDS if key in keys) or f"seed {shown(row, 'seed')}"


def order(rows: Iterable[dict], varied: Sequence[str]) -> list[str]:
    """The series in order of appearance; a series keeps its colour and shape on the whole page."""
    return list(dict.fromkeys(series(row, varied) for row in rows))


@dataclasses.dataclass(frozen=True)
class Point:
    """One series at one length: the rows of its seeds that ended ok, and those that did not."""

    series: str
    seq_len: int | None
    rows: list[dict]
    failed: list[dict]
    program: str = ""

    @property
    def role(self) -> str:
        """What its rows are for."""
        return role((self.rows or self.failed or [{}])[0])

    def seeds(self, name: str) -> dict:
        """Seed -> value of a measure."""
        numbers = {draw(row): measure(row, name) for row in self.rows}
        return {seed: number for seed, number in numbers.items() if number is not None}

    def estimate(self, name: str) -> intervals.Estimate | None:
        """Mean and interval of a measure over the seeds, or None where no seed has it. In the metric's is the error of
        scoring a sample too: all seeds score the same one, so it does not shrink with their number."""
        numbers = list(self.seeds(name).values())
        if not numbers:
            return None
        return intervals.estimate(numbers, self.sampling if name == "metric" else 0.0)

    @property
    def shared(self) -> "Point":
        """The runs of tuned rows under the recipe that all share; a point without rows where there are none."""
        runs = [{key: value(row, key) for key in SEEDS} | shared(row) for row in self.rows if shared(row)]
        split = {fine: [run for run in runs if ok(run) is fine] for fine in (True, False)}
        return Point(self.series, self.seq_len, split[True], split[False], self.program)

    def beyond(self, seq_len: int) -> "Point":
        """The same runs scored at another length."""
        scored = [
            {key: value(row, key) for key in SEEDS} | at[seq_len]
            for row in self.rows
            if seq_len in (at := by_length(row))
        ]
        return Point(self.series, seq_len, scored, [], self.program)

    @property
    def scores(self) -> Scores:
        """What a contest needs of it."""
        return Scores(self.series, self.seeds("metric"), self.sampling)

    @property
    def sampling(self) -> float:
        """The mean over the seeds of what `sampling` says of a row."""
        return statistics.fmean(sampling(row) for row in self.rows) if self.rows else 0.0


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows that share charts: one task, and for a bench one pass. Baselines and controls of range stand beside the
    variants: they are not ranked with them."""

    task: str | None
    direction: str | None
    bench: bool
    rows: list[dict]
    points: list[Point]
    varied: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        words = [human.plain(word) for word in (self.task, self.direction) if word]
        return " · ".join(words) or ("bench" if self.bench else "comparison")

    @property
    def lengths(self) -> list[int]:
        return sorted({point.seq_len for point in self.points if point.seq_len is not None})

    @property
    def speed(self) -> str:
        """The measure that says how fast: seconds of one pass in a bench, else training tokens per second."""
        return record.SPEED["bench" if self.bench else "compare"]

    def better(self, name: str) -> int:
        """+1 where more of a measure is better, -1 where less is."""
        if name == "metric":
            return 1 if self.first("higher_is_better", True) else -1
        return record.FIGURES[name].better

    def first(self, key: str, default: Any = None) -> Any:
        """The first value that a row of the group has for something all of them share (metric name, chance)."""
        return next((row[key] for row in self.rows if row.get(key) is not None), default)

    def at(self, seq_len: int | None, name: str, role: str = "variant") -> list[Point]:
        """The points of a role at one length that have a measure, the best first."""
        mine = [point for point in self.of_role(role) if point.seq_len == seq_len]
        measured = [point for point in mine if point.estimate(name)]
        return sorted(measured, key=lambda point: -self.better(name) * _mean(point, name))

    def of_role(self, role: str) -> list[Point]:
        """The points of a role; where no row is a variant, all are taken for variants."""
        if any(point.role == "variant" for point in self.points):
            return [point for point in self.points if point.role == role]
        return self.points if role == "variant" else []

    @functools.cached_property
    def reference(self) -> str | None:
        """The series that the others are tested against, chosen before there are scores: full attention where the
        attention is varied, else the first variant of the sweep."""
        variants = self.of_role("variant")
        rows = [(point.series, row) for point in variants for row in (*point.rows, *point.failed)]
        full = (series for series, row in rows if "attention" in self.varied and value(row, "attention") == "full")
        return next(itertools.chain(full, (series for series, _ in rows)), None)

    def contest(self, seq_len: int | None) -> Contest:
        """Which metrics of one length differ."""
        known = self._contests
        if seq_len not in known:
            variants, baselines = (
                [point.scores for point in self.at(seq_len, "metric", role)] for role in ("variant", "baseline")
            )
            known[seq_len] = Contest(variants, baselines, self.reference, self.guess)
        return known[seq_len]

    @functools.cached_property
    def _contests(self) -> dict[int | None, Contest]:
        return {}

    @property
    def guess(self) -> float | None:
        """What is to be beaten without looking at the input: the best of `guesses`; None where none is known."""
        known = self.guesses.values()
        return (max if self.better("metric") > 0 else min)(known, default=None)

    @property
    def guesses(self) -> dict[str, float]:
        """What is scored without looking at the input, by name: by chance, by always saying the most frequent class, by
        how often each token comes in training data; what is not known is left out."""
        data = self.first("data")
        unigram = human.number(data.get("unigram")) if isinstance(data, Mapping) else None
        known = {"chance": human.number(self.first("chance")), "majority": self.majority, "unigram": unigram}
        return {name: score for name, score in known.items() if score is not None}

    @property
    def majority(self) -> float | None:
        """The share of the most frequent class; None where the classes are equal, so that it says what chance does."""
        chance, majority = human.number(self.first("chance")), human.number(self.first("majority"))
        return None if majority is None or human.score(majority) == human.score(chance) else majority

    def beats(self, point: Point) -> bool:
        """Better than a guess: by the test where there is one, else by the value; any value where no guess is known."""
        estimate, guess = point.estimate("metric"), self.guess
        if estimate is None or guess is None:
            return estimate is not None
        if (estimate.mean - guess) * self.better("metric") <= 0:
            return False
        tested = self.contest(point.seq_len).guesses.get(point.series)
        return tested is None or tested.holds

    def programs(self, seq_len: int | None) -> list[Point]:
        """The points at one length with a speed, those that run the same program as one; the fastest first. Its series
        is what tells the program apart."""
        pools: dict[str, Point] = {}
        for point in self.at(seq_len, self.speed):
            pool = pools.setdefault(point.program, Point(point.program, seq_len, [], [], point.program))
            pool.rows.extend(point.rows)
        return sorted(pools.values(), key=lambda pool: -self.better(self.speed) * _pooled(pool, self.speed))

    def one_machine(self, *points: Point) -> bool:
        """Whether the same machine, as far as that is known, measured the speeds of all these points."""
        timed = [row for point in points for row in point.rows if measure(row, self.speed) is not None]
        known = [dict(row["machine"]) for row in timed if isinstance(row.get("machine"), Mapping)]
        return all(machine == known[0] for machine in known)

    def same_metric(self, first: Point, second: Point) -> bool | None:
        """Whether nothing tells two points' metrics apart: the test of their difference, paired by seed, with what
        scoring a sample leaves open, and corrected for its family. None where there is none."""
        decision = self.contest(first.seq_len).between(first.series, second.series)
        return None if decision is None else not decision.holds

    def same_speed(self, first: Point, second: Point) -> bool:
        """Whether noise explains the difference between two programs of `programs`: its interval, paired by round of a
        bench or by seed, holds zero; of 95 % over all pairs of programs. Few seeds have a wide one, and one none: there
        the runs of one program must all be faster than those of the other, by more than any median differs from its
        least time."""
        pairs = max(1, math.comb(len(self.programs(first.seq_len)), 2))
        apart = intervals.differ(trials(first, self.speed), trials(second, self.speed), intervals.LEVEL / pairs)
        if apart or (self.bench and apart is False):
            return not apart
        one, other = (sorted(numbers(pool.rows, self.speed)) for pool in (first, second))
        low, high = (one, other) if one[-1] < other[0] else (other, one)
        noise = max(LEAST_RATIO, *(ratio(row) or record.BUSY for row in (*first.rows, *second.rows)))
        return high[0] <= low[-1] * noise

    def best(self, seq_len: int | None, name: str) -> list[Point]:
        """The points at one length that share the best mean; empty with fewer than two to choose from."""
        ranked = self.at(seq_len, name)
        return [point for point in ranked if _mean(point, name) == _mean(ranked[0], name)] if len(ranked) > 1 else []

    def leading(self, seq_len: int | None, name: str) -> list[Point]:
        """The points to mark: the best by the metric or the speed, and those that nothing tells from the best. None
        where that is all of them, or of the metric where a guess does as well."""
        ranked = self.at(seq_len, name)
        if name == self.speed:
            programs = self.programs(seq_len) if self.one_machine(*ranked) else []
            fast = {pool.program for pool in programs if pool is programs[0] or self.same_speed(programs[0], pool)}
            lead = [point for point in ranked if point.program in fast]
        else:
            best = self.best(seq_len, name)
            lead = best + [point for point in ranked[len(best) :] if best and self.same_metric(best[0], point)]
            lead = [point for point in lead if self.beats(point)]
        return lead if len(lead) < len(ranked) else []


def groups(rows: Sequence[dict], varied: Sequence[str]) -> list[Group]:
    """The groups in order of appearance, the lengths of each in rising order."""
    split: dict[tuple, list[dict]] = {}
    for row in rows:
        bench = row.get("kind") == "bench"
        # A bench runs no task: the one in its config decides nothing.
        key = (row.get("task"), row.get("pass"), True) if bench else (value(row, "task"), None, False)
        split.setdefault(key, []).append(row)
    return [
        Group(task, direction, bench, ordered, _points(ordered, varied), tuple(varied))
        for (task, direction, bench), ordered in ((key, sorted(mine, key=_length)) for key, mine in split.items())
    ]


def tested(group: Group) -> str:
    """What a group marks beside the best, in words: what a test over seeds, rounds or test examples does not tell from
    it. Empty where there is none of these."""
    trials = [len(row["seconds_rounds"]) for row in group.rows if isinstance(row.get("seconds_rounds"), Sequence)]
    paired = seeds(group.rows) > 1 or max(trials, default=0) > 1
    if not paired and not any(map(sampling, group.rows)):
        return ""
    return f", or not told from it by a {'paired ' if paired else ''}test with 5 % error over all pairs"


def seeds(rows: Iterable[dict]) -> int:
    """How many different seeds the rows have."""
    return len({draw(row) for row in rows})


def length(row: dict) -> int | None:
    """The tokens per sequence of a row."""
    tokens = human.number(value(row, "seq_len"))
    return None if tokens is None else int(tokens)


def _points(rows: Iterable[dict], varied: Sequence[str]) -> list[Point]:
    split: dict[tuple, Point] = {}
    for row in rows:
        key = (series(row, varied), length(row))
        point = split.setdefault(key, Point(*key, [], [], program(row, varied)))
        (point.rows if ok(row) else point.failed).append(row)
    return list(split.values())


def _length(row: dict) -> int:
    return length(row) or 0


def _mean(point: Point, name: str) -> float:
    estimate = point.estimate(name)
    return estimate.mean if estimate else float("nan")


def _pooled(pool: Point, name: str) -> float:
    """The mean of a measure over all rows of a program."""
    return statistics.fmean(numbers(pool.rows, name))


def trials(pool: Point, name: str) -> dict:
    """Logarithms of a program's speeds, by what a trial shares with one of another program: the round of a bench, else
    the seed and how it was trained. A difference of them is a ratio."""
    if len(pool.rows) == 1 and isinstance(rounds := pool.rows[0].get("seconds_rounds"), Sequence):
        numbers = {at: human.number(seconds) for at, seconds in enumerate(rounds)}
    else:
        numbers = {
            tuple(str(value(row, key)) for key in (*SEEDS, *TRAINING, *SWITCHES)): measure(row, name)
            for row in pool.rows
        }
    return {key: math.log(number) for key, number in numbers.items() if number is not None and number > 0}
