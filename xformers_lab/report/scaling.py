"""Losses over sizes: the curve of each variant, and where the curves of two cross.

Tay et al., 2022, "Scaling Laws vs Model Architectures" (arXiv 2207.10551): which architecture is best may change with
the size. `measure.power_law` fits the curves. Seeds are drawn anew for all variants and sizes at once, so that what a
seed does to all of them is in no difference; intervals are of Student's t over as many seeds.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xformers_lab.compare import scaling as studies
from xformers_lab.compare.scaling import Scale
from xformers_lab.measure import power_law
from xformers_lab.measure.power_law import Fit
from xformers_lab.report import human, intervals, rows

# How far beyond the sizes that were measured curves are followed, and at how many sizes they are compared.
BEYOND = 10.0
GRID = 257
# A curve strays from its means by more than the seeds explain where that is less likely than this.
STRAYS = 0.01
# Why a line is fitted though the sizes would do for a floor.
UNTOLD = "the seeds do not tell its floor from 0"

# A size: the values of the keys that vary it.
Size = tuple


class Score(NamedTuple):
    """What one row has: the size on the axis, and the loss."""

    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """One variant: its fit, the interval of the exponent and of the floor, None where nothing tells it; the sizes and
    seeds that it is of, and the loss of each seed at each size (sizes, seeds)."""

    name: str
    fit: Fit
    exponent: tuple[float, float] | None
    floor: tuple[float, float] | None
    sizes: tuple[Size, ...]
    seeds: tuple[Hashable, ...]
    losses: np.ndarray

    @property
    def strays(self) -> bool:
        """Whether the curve misses its means by more than the seeds explain."""
        return self.fit.strays is not None and self.fit.strays < STRAYS

    def logs(self, sizes: np.ndarray, drawn: power_law.Draws, straight: bool) -> np.ndarray:
        """The logarithms of the loss at sizes (1 + D, n), of all seeds first, then of each draw: the curves, or
        straight lines between the logarithms of the means."""
        if not straight:
            return np.log(self.fit(sizes))
        seeds = len(self.seeds)
        means = np.concatenate([np.ones((1, seeds)), drawn.counts]) @ np.log(self.losses).T / seeds
        return np.stack([np.interp(np.log(sizes), np.log(self.fit.sizes), each) for each in means])

    @property
    def estimates(self) -> list[intervals.Estimate]:
        """The loss at each size with its interval over the seeds."""
        return [intervals.estimate([float(loss) for loss in mine]) for mine in self.losses]


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where two curves cross: the size, and the sizes around it between which neither is told to be the lower one."""

    at: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two curves between the sizes that both were measured at, `low` to `high`.

    status: "crosses", each is the lower one somewhere, told by the interval of their difference; "apart", one is told
    to be the lower one everywhere; "partly", in a part of the sizes, from `told[0]` to `told[1]`, with an error of 5 %
    over all of them; "untold", nowhere; "untested", with one seed; "elsewhere", they share no sizes. lower: who is
    lower at the small end and at the large end, by the curves where nothing is told. meets: where the curves meet
    between these sizes, told or not; extrapolated: where they would beyond, None for nowhere near. straight: the means
    are compared, with straight lines between them, and not the curves, of which one strays from its means.
    """

    names: tuple[str, str]
    status: str
    low: float
    high: float
    lower: tuple[str, str] = ("", "")
    crossings: tuple[Crossing, ...] = ()
    told: tuple[float, float] | None = None
    meets: tuple[float, ...] = ()
    extrapolated: float | None = None
    straight: bool = False


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The fits of one task at one length. sized: what the x of a size is, in words; scored: what the losses are;
    left_out: what no curve is of, a sentence each; orders: the size keys, then the variants from the lowest loss at the
    smallest and at the largest size that all have."""

    task: str | None
    seq_len: int | None
    scale: Scale
    size_keys: tuple[str, ...]
    sized: str
    scored: str
    curves: tuple[Curve, ...]
    pairs: tuple[Pair, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    orders: tuple[tuple[str, ...], tuple[str, ...]] | None

    @property
    def title(self) -> str:
        """The task, and the length."""
        return (
            f"{human.plain(self.task or 'comparison')}{'' if self.seq_len is None else f' at {self.seq_len:,} tokens'}"
        )

    def said(self, size: Size) -> str:
        """A size in words: dim=64 layers=2."""
        return studies.size(dict(zip(self.size_keys, size, strict=True)))


def of(cells: Sequence[dict], varied: Sequence[str], scale: Scale) -> list[Scaling]:
    """The fits of each task and length of a comparison's variants, in order of appearance."""
    mine = [row for row in cells if rows.role(row) == "variant"]
    of_variant, of_size = studies.keys(mine, varied, scale, rows.value)
    split: dict[tuple, list[dict]] = {}
    for row in mine:
        split.setdefault((rows.value(row, "task"), rows.length(row)), []).append(row)
    return [_one(here, task, at, scale, of_variant, of_size) for (task, at), here in split.items()]


def names(scalings: Iterable[Scaling]) -> list[str]:
    """The variants of fits, each once."""
    return list(dict.fromkeys(curve.name for scaling in scalings for curve in scaling.curves))


def _one(
    cells: Sequence[dict],
    task: str | None,
    seq_len: int | None,
    scale: Scale,
    of_variant: Sequence[str],
    of_size: Sequence[str],
) -> Scaling:
    sized, of_x = _sized(cells, scale)
    scored, of_y = _scored(cells, scale)
    wanted: dict[str, dict[Size, dict[Hashable, Score | None]]] = {}
    lost: dict[tuple[str, Size, Hashable], str] = {}
    for row in cells:
        name = rows.series(row, of_variant)
        size, seed = tuple(rows.value(row, key) for key in of_size), rows.draw(row)
        score, why = _score(row, of_x, of_y, scale)
        if score is None:
            lost[name, size, seed] = why
        wanted.setdefault(name, {}).setdefault(size, {})[seed] = score
    said = lambda size: studies.size(dict(zip(of_size, size, strict=True)))
    left_out = []
    known = {
        name: {size: there for size, seeds in sizes.items() if (there := _there(seeds))}
        for name, sizes in wanted.items()
    }
    for name in [name for name in known if _different(known[name]) < power_law.LEAST]:
        why = human.listing(list(dict.fromkeys(why for (one, *_), why in lost.items() if one == name)), 2)
        left_out.append(
            f"{name}: {_different(known[name])} different sizes have a result, and a fit takes {power_law.LEAST}"
            + (f" ({why})" if why else "")
        )
        del known[name]
    every = list(dict.fromkeys(size for name in known for size in wanted[name]))
    seeds = list(dict.fromkeys(seed for name in known for seeds in wanted[name].values() for seed in seeds))
    kept = _whole(known, every, seeds)
    if kept is not None:
        left_out += _dropped(kept, every, seeds, known, lost, said)
        kept_by = dict.fromkeys(known, kept)
    else:
        if len(known) > 1:
            left_out.append(f"no crossings: the variants share fewer than {power_law.LEAST} sizes")
        kept_by = {name: _whole({name: known[name]}, every, seeds) for name in known}
    draws = {count: power_law.draws(count) for count in {len(mine[1]) for mine in kept_by.values() if mine}}
    curves = tuple(
        _curve(name, known[name], *mine, draws[len(mine[1])]) for name, mine in kept_by.items() if mine is not None
    )
    pairs = [_pair(one, other, draws[len(one.seeds)]) for one, other in itertools.combinations(curves, 2) if kept]
    return Scaling(
        task, seq_len, scale, tuple(of_size), sized, scored, curves, tuple(pairs), tuple(left_out),
        tuple(_notes(cells, curves, scale, of_size, len(kept[1]) if kept else 0)), _orders(curves) if kept else None,
    )  # fmt: skip


# ---- what is measured ----


def _sized(cells: Sequence[dict], scale: Scale) -> tuple[str, Any]:
    """What the x of a row is, in words, and the function that gives it, None where there is none."""
    number = lambda row, key: human.number(row.get(key))
    if scale.x == "params":
        told = [row for row in cells if rows.ok(row)]
        if told and all(number(row, "embedding_parameters") is not None for row in told):
            less = lambda row: (number(row, "parameters") or 0.0) - (number(row, "embedding_parameters") or 0.0)
            return "parameters without those of embeddings, positions and the head", less
        return "all parameters, those of embeddings and the head too", lambda row: number(row, "parameters")
    times = {"flops": "flops", "seconds": "seconds_median"}[scale.x]
    per = lambda row: None if (one := rows.measure(row, times)) is None else one * (rows.measure(row, "steps") or 0)
    words = {
        "flops": "FLOPs of the matrix products of all training steps",
        "seconds": "seconds of all training steps",
    }
    return words[scale.x], per


def _scored(cells: Sequence[dict], scale: Scale) -> tuple[str, Any]:
    """What the y of a row is, in words, and the function that gives it."""
    if scale.y == "loss":
        return "loss (cross-entropy in nats, on the test split)", lambda row: rows.measure(row, "loss")
    name = human.plain(next((row["metric_name"] for row in cells if row.get("metric_name")), "metric"))
    if any(row.get("higher_is_better") is False for row in cells):
        return name, lambda row: rows.measure(row, "metric")
    return f"1 - {name}", lambda row: None if (score := rows.measure(row, "metric")) is None else 1 - score


def _score(row: dict, of_x, of_y, scale: Scale) -> tuple[Score | None, str]:
    """What a row has; or None and why there is nothing."""
    if not rows.ok(row):
        return None, human.outcome(row)
    x, y = of_x(row), of_y(row)
    if x is None or x <= 0:
        return None, f"its {studies.AXES[scale.x]} are not known"
    if y is None:
        return None, f"its {scale.y} is not known"
    return (None, f"a {scale.y} of {human.significant(y)} has no logarithm") if y <= 0 else (Score(x, y), "")


def _there(seeds: Mapping[Hashable, Score | None]) -> dict[Hashable, Score]:
    return {seed: score for seed, score in seeds.items() if score is not None}


def _different(sizes: Mapping[Size, Mapping[Hashable, Score]]) -> int:
    return len({next(iter(scores.values())).x for scores in sizes.values()})


# ---- what is fitted ----


def _whole(
    known: Mapping[str, Mapping[Size, Mapping[Hashable, Score]]], sizes: Sequence[Size], seeds: Sequence[Hashable]
) -> tuple[list[Size], list[Hashable]] | None:
    """The sizes and the seeds of which every variant has every result, as many results as can be; None where these are
    fewer than LEAST sizes."""
    if not known:
        return None
    has = {
        size: {seed for seed in seeds if all(seed in mine.get(size, ()) for mine in known.values())} for size in sizes
    }
    best, most = None, 0
    rows_of = [seeds_of for seeds_of in dict.fromkeys(map(frozenset, has.values())) if seeds_of]
    candidates = {
        frozenset.intersection(*chosen) for count in (1, 2, 3) for chosen in itertools.combinations(rows_of, count)
    }
    for candidate in sorted(candidates, key=lambda one: (-len(one), sorted(map(str, one)))):
        fitting = [size for size in sizes if candidate and candidate <= has[size]]
        enough = all(_different({size: mine[size] for size in fitting}) >= power_law.LEAST for mine in known.values())
        if enough and len(fitting) * len(candidate) > most:
            best, most = (fitting, [seed for seed in seeds if seed in candidate]), len(fitting) * len(candidate)
    return best


def _dropped(kept, every, seeds, known, lost: Mapping, said) -> list[str]:
    """A sentence for each size and each seed that is in no curve, though others have it."""
    lines = []
    for size in (size for size in every if size not in kept[0]):
        names = [name for name in known if any(seed not in known[name].get(size, ()) for seed in kept[1])]
        why = [lost.get((name, size, seed), "not run") for name in names for seed in kept[1]
               if seed not in known[name].get(size, ())]  # fmt: skip
        lines.append(
            f"{said(size)}: {human.listing(names)} has no result ({human.listing(list(dict.fromkeys(why)), 2)})"
        )
    for seed in (seed for seed in seeds if seed not in kept[1]):
        where = [(name, size) for name in known for size in kept[0] if seed not in known[name].get(size, ())]
        why = human.listing(list(dict.fromkeys(lost.get((*place, seed), "not run") for place in where)), 2)
        lines.append(f"seed {seed}: {where[0][0]} at {said(where[0][1])} has no result ({why})")
    return lines


def _curve(
    name: str, known: Mapping[Size, Mapping[Hashable, Score]], sizes: Sequence[Size], seeds: Sequence[Hashable], drawn
) -> Curve:
    x = [statistics.fmean(known[size][seed].x for seed in seeds) for size in sizes]
    order = sorted(range(len(sizes)), key=x.__getitem__)
    losses = np.array([[known[sizes[at]][seed].y for seed in seeds] for at in order])
    fit = power_law.fit([x[at] for at in order], losses, drawn)
    exponent, floor = _intervals(fit, drawn, len(seeds))
    if floor is not None and floor[0] <= 0:  # one number less to tell makes the others certain
        fit = dataclasses.replace(power_law.fit(fit.sizes, losses, drawn, floor=False), why=UNTOLD)
        exponent, floor = _intervals(fit, drawn, len(seeds))
    return Curve(name, fit, exponent, floor, tuple(sizes[at] for at in order), tuple(seeds), losses)


def _intervals(fit: Fit, drawn, seeds: int) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """The 95 % intervals of exponent and floor: over the seeds, of one seed by what the curve misses."""
    at = np.log(fit.exponent) if fit.floor else fit.exponent  # with a floor it is above 0
    back = math.exp if fit.floor else float
    if seeds > 1:
        error, freedom = float(power_law.spread(at[1:], drawn, seeds)), seeds - 1
        half = intervals.quantile(seeds - 1) * float(power_law.spread(fit.offset[1:], drawn, seeds))
        floor = (max(0.0, float(fit.offset[0]) - half), float(fit.offset[0]) + half) if fit.floor else None
    else:
        error, freedom, floor = fit.residual_error(), len(fit.sizes) - fit.numbers, None
    if error is None:
        return None, None
    half = intervals.quantile(freedom) * error
    ends = [float(at[0]) - half, float(at[0]) + half]
    return (back(ends[0]), back(min(ends[1], 700.0))), floor


# ---- two curves ----


def _pair(one: Curve, other: Curve, drawn) -> Pair:
    names = (one.name, other.name)
    low = max(one.fit.sizes.min(), other.fit.sizes.min())
    high = min(one.fit.sizes.max(), other.fit.sizes.max())
    if not low < high:
        return Pair(names, "elsewhere", float(low), float(high))
    straight = one.strays or other.strays
    # Above 0 where the first is lower.
    difference = lambda x: other.logs(x, drawn, straight) - one.logs(x, drawn, straight)
    x = np.geomspace(low, high, GRID)
    apart = difference(x)
    told = firmly = np.zeros(GRID)
    if len(one.seeds) > 1:
        error = power_law.spread(apart[1:], drawn, len(one.seeds))
        over = lambda level: np.abs(apart[0]) > intervals.quantile(len(one.seeds) - 1, level) * error
        told = np.where(over(intervals.LEVEL), np.sign(apart[0]), 0.0)
        # Lower somewhere: looked at where it was measured, with Bonferroni's correction for so many places.
        places = np.searchsorted(x, np.clip(one.fit.sizes, low, high) * (1 - 1e-9))
        measured = np.isin(np.arange(GRID), places) & over(intervals.LEVEL / len(places))
        firmly = np.where(measured, np.sign(apart[0]), 0.0)
    who = lambda sign: names[0] if sign > 0 else names[1]
    lower: tuple[str, str] = (who(apart[0, 0]), who(apart[0, -1]))
    meets = tuple(_zeros(x, apart[0]))
    known = np.flatnonzero(told)
    changes = [(a, b) for a, b in itertools.pairwise(known) if told[a] != told[b]]
    crossings = tuple(
        Crossing(_zeros(x[a : b + 1], apart[0, a : b + 1])[0], float(x[a]), float(x[b])) for a, b in changes
    )
    part = np.flatnonzero(firmly)
    status = "crosses" if changes else "apart" if len(known) == GRID else "partly" if len(part) else "untold"
    status = "untested" if len(one.seeds) < 2 else status
    if status == "crosses":
        lower = who(told[known[0]]), who(told[known[-1]])
    elif status == "partly":
        lower = (who(firmly[part[0]]), who(firmly[part[0]]))
    between = (float(x[part[0]]), float(x[part[-1]])) if status == "partly" else None
    beyond = None
    if not meets and not straight:
        for start, end in ((high, high * BEYOND), (low, low / BEYOND)):
            x = np.geomspace(start, end, GRID)
            if found := _zeros(x, difference(x)[0]):
                beyond = found[0]
                break
    return Pair(names, status, float(low), float(high), lower, crossings, between, meets, beyond, straight)


def _zeros(x: np.ndarray, values: np.ndarray) -> list[float]:
    """Where a line through points crosses 0, in the logarithm of x."""
    found = []
    for at in np.flatnonzero(np.sign(values[:-1]) * np.sign(values[1:]) < 0):
        share = values[at] / (values[at] - values[at + 1])
        found.append(float(x[at] * (x[at + 1] / x[at]) ** share))
    return found + [float(x[at]) for at in np.flatnonzero(values == 0)[:1] if not found]


def _orders(curves: Sequence[Curve]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The variants by rising mean loss at the smallest and at the largest size."""
    if len(curves) < 2:
        return None
    small, large = curves[0].sizes[0], curves[0].sizes[-1]
    mean = lambda curve, size: curve.losses[curve.sizes.index(size)].mean()
    first, last = (tuple(one.name for one in sorted(curves, key=lambda one: mean(one, at))) for at in (small, large))
    return first, last


# ---- what is to be known ----


def _notes(
    cells: Sequence[dict], curves: Sequence[Curve], scale: Scale, of_size: Sequence[str], seeds: int
) -> Iterable[str]:
    ok = [row for row in cells if rows.ok(row)]
    every = lambda key: list(dict.fromkeys(rows.shown(row, key) for row in ok))
    if seeds == 1:
        yield "One seed: intervals of exponents are by what the curves miss, and no crossing is tested."
    tuned = any(isinstance(row.get("tuning"), Mapping) for row in ok)
    if len(every("lr")) == 1 and not tuned and every("parametrisation") != ["mup"]:
        yield (
            f"lr={every('lr')[0]} is the same at every size, though larger models want smaller rates, and variants "
            "different ones: tune=lr chooses one for each, parametrisation=mup base_dim=N head=H carries one over "
            "widths."
        )
    if len(every("steps")) == len(every("batch")) == 1 and scale.x != "seconds":
        yield (
            f"Every size took {every('steps')[0]} steps of {every('batch')[0]} sequences: the curves are of size at "
            "that much data, not of the best use of compute (Hoffmann et al., 2022)."
        )
    if scale.x == "seconds":
        yield "Seconds are of this machine, and of no other."
