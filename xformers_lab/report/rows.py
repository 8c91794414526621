"""Rows in groups, series and points: what belongs in one chart, on one line, at one length."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xformers_lab import record
from xformers_lab.record import PLACES
from xformers_lab.report import human, intervals


def value(row: dict, key: str) -> Any:
    """The value of a swept key: from the top of the row, else from its config; None where the row has neither."""
    if key in row:
        return row[key]
    config = row.get("config") or {}
    for section in (config, config.get("model") or {}, config.get("train") or {}):
        if key in section and not isinstance(section[key], Mapping):  # "model" is a section and a key in it
            return section[key]
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


def series(row: dict, varied: Sequence[str]) -> str:
    """The name of a row's line in the charts: "local:window=16 · post"; numbers carry their key, "dim=64"."""
    words = []
    for key in varied:
        if key in PLACES:
            continue
        choice = value(row, key)
        words.append(choice if isinstance(choice, str) else f"{key}={'none' if choice is None else choice}")
    if not words:
        words = [value(row, "model"), value(row, "attention")]
        words = [str(word) for word in words if word not in (None, "auto")]
    return human.plain(" · ".join(words) or "this model")


def named_by(varied: Sequence[str]) -> list[str]:
    """The keys that a table shows: what varied, and where no variants did, the one mechanism that there is."""
    return [*varied, *([] if any(key not in PLACES for key in varied) else ["attention"])]


def shown(row: dict, key: str) -> str:
    """The value of a key as text for people."""
    choice = value(row, key)
    return "none" if choice is None else human.plain(choice)


def label(row: dict, varied: Sequence[str]) -> str:
    """A cell's name in a sentence: "local:window=16 at 256 tokens, seed 2"."""
    at, seed = length(row), f", seed {shown(row, 'seed')}" if "seed" in varied else ""
    return f"{series(row, varied)}{'' if at is None else f' at {at:,} tokens'}{seed}"


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

    def seeds(self, name: str) -> dict:
        """Seed -> value of a measure."""
        numbers = {value(row, "seed"): measure(row, name) for row in self.rows}
        return {seed: number for seed, number in numbers.items() if number is not None}

    def estimate(self, name: str) -> intervals.Estimate | None:
        """Mean and interval of a measure over the seeds, or None where no seed has it."""
        numbers = list(self.seeds(name).values())
        return intervals.estimate(numbers) if numbers else None


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows that share charts: one task, and for a bench one pass."""

    task: str | None
    direction: str | None
    bench: bool
    rows: list[dict]
    points: list[Point]

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

    def at(self, seq_len: int | None, name: str) -> list[Point]:
        """The points at one length that have a measure, the best first."""
        measured = [point for point in self.points if point.seq_len == seq_len and point.estimate(name)]
        return sorted(measured, key=lambda point: -self.better(name) * _mean(point, name))

    def best(self, seq_len: int | None, name: str) -> list[Point]:
        """The points at one length that share the best mean; empty with fewer than two to choose from."""
        ranked = self.at(seq_len, name)
        return [point for point in ranked if _mean(point, name) == _mean(ranked[0], name)] if len(ranked) > 1 else []

    def leading(self, seq_len: int | None, name: str) -> list[Point]:
        """The points to mark: the best, and of a metric those that its seeds cannot tell from the best."""
        best, ranked = self.best(seq_len, name), self.at(seq_len, name)
        if not best or name != "metric":
            return best
        alike = lambda point: intervals.differ(best[0].seeds(name), point.seeds(name)) is False
        return best + [point for point in ranked[len(best) :] if alike(point)]


def groups(rows: Sequence[dict], varied: Sequence[str]) -> list[Group]:
    """The groups in order of appearance, the lengths of each in rising order."""
    split: dict[tuple, list[dict]] = {}
    for row in rows:
        bench = row.get("kind") == "bench"
        # A bench runs no task: the one in its config decides nothing.
        key = (row.get("task"), row.get("pass"), True) if bench else (value(row, "task"), None, False)
        split.setdefault(key, []).append(row)
    return [
        Group(task, direction, bench, sorted(mine, key=_length), _points(sorted(mine, key=_length), varied))
        for (task, direction, bench), mine in split.items()
    ]


def seeds(rows: Iterable[dict]) -> int:
    """How many different seeds the rows have."""
    return len({value(row, "seed") for row in rows})


def length(row: dict) -> int | None:
    """The tokens per sequence of a row."""
    tokens = human.number(value(row, "seq_len"))
    return None if tokens is None else int(tokens)


def _points(rows: Iterable[dict], varied: Sequence[str]) -> list[Point]:
    split: dict[tuple, Point] = {}
    for row in rows:
        key = (series(row, varied), length(row))
        point = split.setdefault(key, Point(*key, [], []))
        (point.rows if ok(row) else point.failed).append(row)
    return list(split.values())


def _length(row: dict) -> int:
    return length(row) or 0


def _mean(point: Point, name: str) -> float:
    estimate = point.estimate(name)
    return estimate.mean if estimate else float("nan")
