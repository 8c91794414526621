"""Tuning: the same grid of a knob for every variant, scored on validation data, and the best of it.

What chooses sees `Point`s alone, which `point` makes of a record and refuses to make of one that was scored on anything
but the validation split: no test number can reach it. The seeds of tuning are none of those that are reported.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.compare.study import SEEDS
from xformers_lab.config import LEAVES, Config, edit
from xformers_lab.errors import IntegrityError, UsageError, nearest

SPLIT = "validation"
LEAST_POINTS = 5
FACTOR = math.sqrt(10)  # between two points
WIDENED = 2  # points that are added on the side at whose end the best was
SEED = 1000  # how far behind the greatest seed that is reported those of tuning begin


@dataclasses.dataclass(frozen=True)
class Tuning:
    """knobs: keys, tuned one after the other; points: of the grid of each; share: of the steps of a reported run;
    seeds: runs of each point, whose mean decides."""

    knobs: tuple[str, ...]
    points: int = LEAST_POINTS
    share: float = 1.0
    seeds: int = 1

    @classmethod
    def read(cls, text: str) -> "Tuning | None":
        """`none`, `lr`, `lr,weight_decay` or `lr+weight_decay`, with `:points=7:share=0.5:seeds=2`; raises
        UsageError."""
        where = f"tune={text}"
        choice = spec.parse(text.replace(",", "+"), where)
        if choice.name == "none" and not choice.options:
            return None
        knobs = tuple(choice.name.split("+"))
        for knob in knobs:
            if knob not in tunable():
                raise UsageError(f'{where}: "{knob}" is no knob to tune: {nearest(knob, tunable(), "there are")}')
        if len(set(knobs)) < len(knobs):
            raise UsageError(f"{where}: a knob is named twice")
        kinds = {"points": int, "share": float, "seeds": int}
        if unknown := choice.options.keys() - kinds.keys():
            raise UsageError(f'{where}: no option "{min(unknown)}": {nearest(min(unknown), kinds, "options")}')
        values = {
            key: spec.coerce(value, kinds[key], f'{where}: option "{key}"') for key, value in choice.options.items()
        }
        tuning = cls(knobs, **values)
        if tuning.points < LEAST_POINTS:
            raise UsageError(f"{where}: points must be at least {LEAST_POINTS}: fewer hide where the best is")
        if not 0 < tuning.share <= 1:
            raise UsageError(f"{where}: share must be above 0 and at most 1: it is of a run's steps")
        if tuning.seeds < 1:
            raise UsageError(f"{where}: seeds must be at least 1")
        return tuning


@dataclasses.dataclass(frozen=True)
class Point:
    """One value of a knob, as validation saw it. value: of the knob that is tuned; knobs: of all; metric and loss: None
    where a run failed or diverged, which is worst."""

    value: float
    knobs: Mapping[str, float]
    status: str
    metric: float | None
    loss: float | None
    metric_name: str | None = None
    higher_is_better: bool = True

    def shown(self) -> dict[str, Any]:
        """The point as a row keeps it."""
        return {**self.knobs, "metric": self.metric, "loss": self.loss, "status": self.status}


def tunable() -> list[str]:
    """The keys that a grid on a logarithmic scale suits: numbers with a fraction that change how a model trains."""
    floats = [key for key, (_, field, kind) in LEAVES.items() if kind is float and not field.metadata["same_result"]]
    return floats


def spaced(knob: str, shared: float, points: int) -> list[float]:
    """Values around the shared one, in the middle, each FACTOR above the last, or nearer where the key is bounded
    above; raises UsageError at a knob that is 0."""
    if shared <= 0:
        raise UsageError(f"tune={knob}: its values are spaced around {knob}={shared}, which must be above 0")
    return [_at(knob, shared, points, place - (points - 1) / 2) for place in range(points)]


def beyond(knob: str, shared: float, points: int, low: bool, high: bool) -> list[float]:
    """WIDENED values more below the least of `spaced`, and as many above the greatest, as far as the key goes."""
    half, bound = (points - 1) / 2, LEAVES[knob][1].metadata["below"]
    below = [_at(knob, shared, points, -half - more) for more in range(WIDENED, 0, -1)] if low else []
    above = [_at(knob, shared, points, half + more) for more in range(1, WIDENED + 1)] if high else []
    return [*below, *(value for value in above if bound is None or value < bound)]


def trial(config: Config, tuning: Tuning, knobs: Mapping[str, float], at: int, greatest: int) -> Config:
    """The run that scores values of knobs: on validation, with a share of the steps and the tuning seed `at`;
    greatest: of the seeds that are reported."""
    own = {key: configs.get(Config(), key) for key in SEEDS}
    own["seed"] = (greatest + SEED + at) % 2**32
    steps = max(round(tuning.share * config.train.steps), 1)
    return edit(config, **{**own, **knobs, "steps": steps, "score": SPLIT})


def point(value: float, knobs: Mapping[str, float], records: Sequence[Mapping]) -> Point:
    """What the records of a point's runs say of it, the mean over them; raises IntegrityError at one with a number of
    another split than validation."""
    for record in records:
        scored = any(record.get(key) is not None for key in ("metric", "loss"))
        if scored and record.get("split") != SPLIT:
            raise IntegrityError(
                f"{record.get('run_dir')}: a run of tuning was scored on {record.get('split') or 'test'}, not on "
                f"{SPLIT}: what it says may not be chosen by; delete that folder"
            )
    failed = next((record for record in records if record.get("status") != "ok"), None)
    if failed is not None or not records:
        return Point(value, dict(knobs), failed.get("status", "failed") if failed else "failed", None, None)
    mean = lambda key: sum(record[key] for record in records) / len(records)
    about = {
        "metric_name": records[0].get("metric_name"),
        "higher_is_better": records[0].get("higher_is_better") is not False,
    }
    return Point(value, dict(knobs), "ok", mean("metric"), mean("loss"), **about)


def best(points: Sequence[Point]) -> Point:
    """The point with the best metric, among equals the one with the least loss, then the nearest to the middle; the
    middle one where every run failed."""
    middle = (len(points) - 1) / 2

    def rank(place: int) -> tuple:
        one = points[place]
        if one.metric is None or one.loss is None or not math.isfinite(one.metric):
            return (1, 0.0, 0.0, abs(place - middle))
        return (0, -one.metric if one.higher_is_better else one.metric, one.loss, abs(place - middle))

    return points[min(range(len(points)), key=rank)]


def edges(points: Sequence[Point]) -> tuple[bool, bool]:
    """Whether the best stands at the low or at the high end; points in rising order of their values."""
    chosen = best(points)
    if chosen.metric is None:
        return False, False
    return chosen is points[0], chosen is points[-1]


def said(tuning: Tuning, curves: Mapping[str, Sequence[Point]], steps: int, widened: bool) -> dict[str, Any]:
    """What a row says of how its knobs were tuned. curves: the points of each knob, in the order that they were
    tuned."""
    every = [one for points in curves.values() for one in points]
    chosen = {knob: best(points) for knob, points in curves.items()}
    return {
        "knobs": list(curves),
        "share": tuning.share,
        "steps": steps,
        "split": SPLIT,
        "metric_name": next((one.metric_name for one in every if one.metric_name), None),
        "higher_is_better": all(one.higher_is_better for one in every),
        "best": {knob: one.value for knob, one in chosen.items()},
        "edge": any(any(edges(points)) for points in curves.values()),
        "widened": widened,
        "points": [one.shown() for one in every],
    }


def _at(knob: str, shared: float, points: int, place: float) -> float:
    """The value so many places above the shared one, to three digits; the shared one itself is not rounded."""
    below = LEAVES[knob][1].metadata["below"]
    factor = FACTOR if below is None else min(FACTOR, (below / shared) ** (1 / (points - 1)))
    return shared if place == 0 else float(f"{shared * factor**place:.3g}")
