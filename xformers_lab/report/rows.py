"""Rows in groups, series and points: what belongs in one chart, on one line, at one length."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from xformers_lab.report import human, intervals

# Keys that place a row on the page; every other varied key is part of the name of its series.
PLACES = ("task", "pass", "seq_len", "seed", "kind")


def value(row: dict, key: str):
    """The value of a swept key: from the top of the row, else from its config; None where the row has neither."""
    if key in row:
        return row[key]
    config = row.get("config") or {}
    for section in (config, config.get("model") or {}, config.get("train") or {}):
        if key in section and not isinstance(section[key], Mapping):  # "model" is a section and a key in it
            return section[key]
    return None


def ok(row: dict) -> bool:
    return row.get("status", "ok") == "ok"


def measure(row: dict, name: str) -> float | None:
    """A finite number of an ok row, else None. "memory" is the device's peak, or else the compiled temporaries."""
    if not ok(row):
        return None
    if name == "memory":
        peak = human.number(row.get("peak_bytes"))
        return human.number(row.get("temp_bytes")) if peak is None else peak
    return human.number(row.get(name))


def series(row: dict, varied: Sequence[str]) -> str:
    """The name of a row's line in the charts: "local:window=16 · post"; numbers carry their key, "dim=64"."""
    words = []
    for key in varied:
        if key in PLACES:
            continue
        found = value(row, key)
        words.append(found if isinstance(found, str) else f"{key}={'none' if found is None else found}")
    if not words:
        words = [value(row, "model"), value(row, "attention")]
        words = [str(word) for word in words if word not in (None, "auto")]
    return human.plain(" · ".join(words) or "this model")


def named_by(varied: Sequence[str]) -> list[str]:
    """The keys that a table shows: what varied, and where no variants did, the one mechanism that there is."""
    return [*varied, *([] if any(key not in PLACES for key in varied) else ["attention"])]


def shown(row: dict, key: str) -> str:
    """The value of a key as text for people."""
    found = value(row, key)
    return "none" if found is None else human.plain(found)


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
        found = {value(row, "seed"): measure(row, name) for row in self.rows}
        return {seed: number for seed, number in found.items() if number is not None}

    def estimate(self, name: str) -> intervals.Estimate | None:
        """Mean and interval of a measure over the seeds, or None where no seed has it."""
        found = list(self.seeds(name).values())
        return intervals.estimate(found) if found else None


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
        return "seconds_median" if self.bench else "tokens_per_second"

    def better(self, name: str) -> int:
        """+1 where more of a measure is better, -1 where less is."""
        if name == "metric":
            return 1 if self.first("higher_is_better", True) else -1
        return 1 if name == "tokens_per_second" else -1

    def first(self, key: str, default=None):
        """The first value that a row of the group gives for something all of them share (metric name, chance)."""
        return next((row[key] for row in self.rows if row.get(key) is not None), default)

    def at(self, seq_len: int | None, name: str) -> list[Point]:
        """The points at one length that have a measure, the best first."""
        found = [point for point in self.points if point.seq_len == seq_len and point.estimate(name)]
        return sorted(found, key=lambda point: -self.better(name) * _mean(point, name))

    def best(self, seq_len: int | None, name: str) -> list[Point]:
        """The points at one length that share the best mean; empty with fewer than two to choose from."""
        found = self.at(seq_len, name)
        return [point for point in found if _mean(point, name) == _mean(found[0], name)] if len(found) > 1 else []

    def leading(self, seq_len: int | None, name: str) -> list[Point]:
        """The points to mark: the best, and of a metric those that its seeds cannot tell from the best."""
        best, found = self.best(seq_len, name), self.at(seq_len, name)
        if not best or name != "metric":
            return best
        alike = lambda point: intervals.differ(best[0].seeds(name), point.seeds(name)) is False
        return best + [point for point in found[len(best) :] if alike(point)]


def groups(rows: Sequence[dict], varied: Sequence[str]) -> list[Group]:
    """The groups in order of appearance, the lengths of each in rising order."""
    split: dict[tuple, list[dict]] = {}
    for row in rows:
        bench = row.get("kind") == "bench"
        # A bench runs no task: the one in its config decides nothing.
        key = (row.get("task"), row.get("pass"), True) if bench else (value(row, "task"), None, False)
        split.setdefault(key, []).append(row)
    return [
        Group(task, direction, bench, sorted(found, key=_length), _points(sorted(found, key=_length), varied))
        for (task, direction, bench), found in split.items()
    ]


def seeds(rows: Iterable[dict]) -> int:
    """How many different seeds the rows have."""
    return len({value(row, "seed") for row in rows})


def length(row: dict) -> int | None:
    """The tokens per sequence of a row."""
    found = human.number(value(row, "seq_len"))
    return None if found is None else int(found)


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
    found = point.estimate(name)
    return found.mean if found else float("nan")
