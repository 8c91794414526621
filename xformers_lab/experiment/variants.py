"""What studies measured of each variant, quality beside costs, as a result keeps it and pages show it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from xformers_lab import record
from xformers_lab.api.table import Table
from xformers_lab.report import human, phrases, rows
from xformers_lab.report.intervals import Estimate

# The costs that are kept: how fast, how large in training and in decoding, how many parameters.
COSTS = {
    "compare": ("tokens_per_second", "memory", "state_bytes", "parameters"),
    "bench": ("seconds_median", "memory", "state_bytes"),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant at one length: the study and its group (a task with what a guess scores, or a pass of a bench); the
    choices that tell it from the others, by key; the metric's name, mean, half of its 95 % interval and number of
    seeds, None and 0 where there is none; the mean of each cost; reason: what did not end, and why."""

    study: str
    group: str
    name: str
    seq_len: int | None
    choices: Mapping[str, str]
    metric: str
    mean: float | None
    half: float | None
    n: int
    costs: Mapping[str, float]
    reason: str = ""


class Listing(NamedTuple):
    """A table as text."""

    title: str
    heads: list[str]
    lines: list[list[str]]


def of_tables(tables: Mapping[str, Table]) -> list[Variant]:
    """The variants of comparisons and benches; at each length of a comparison the best first."""
    return [
        _variant(study, group, point, table.varied)
        for study, table in tables.items()
        if all(row.get("kind") in COSTS for row in table.rows)
        for group in rows.groups(table.rows, table.varied)
        for point in _ordered(group)
    ]


def listings(variants: Sequence[Variant]) -> Iterator[Listing]:
    """A table for each group of each study, without columns that nothing has a value in."""
    groups: dict[tuple[str, str], list[Variant]] = {}
    for variant in variants:
        groups.setdefault((variant.study, variant.group), []).append(variant)
    for (study, group), mine in groups.items():
        metric = next((variant.metric for variant in mine if variant.metric), "")
        columns = {"variant": [variant.name for variant in mine], "tokens": [_count(each.seq_len) for each in mine]}
        columns[metric or "outcome"] = [_outcome(variant) for variant in mine]
        columns["seeds"] = [str(variant.n) if variant.metric and variant.n else "" for variant in mine]
        for figure in record.figures():
            texts = [human.in_column(figure, cost) if (cost := each.costs.get(figure.name)) else "" for each in mine]
            columns[figure.heading or figure.name] = texts
        columns = {head: texts for head, texts in columns.items() if any(texts)}
        yield Listing(f"{study}: {group}", list(columns), [list(line) for line in zip(*columns.values(), strict=True)])


def _ordered(group: rows.Group) -> list[rows.Point]:
    """Points with a metric from the best to the worst, then those without one."""
    ranked = [
        point for at in group.lengths for role in ("variant", "baseline") for point in group.at(at, "metric", role)
    ]
    return [*ranked, *(point for point in group.points if all(point is not other for other in ranked))]


def _variant(study: str, group: rows.Group, point: rows.Point, varied: Sequence[str]) -> Variant:
    row, guesses = (point.rows or point.failed)[0], phrases.guesses(group)
    mean, half, n = point.estimate("metric") or Estimate(None, None, 0)  # type: ignore[arg-type]
    costs = {name: known.mean for name in COSTS[row["kind"]] if (known := point.estimate(name))}
    return Variant(
        study=study,
        group=group.title + (f" ({guesses})" if guesses else ""),
        name=point.series if point.role == "variant" else f"{point.series} ({point.role})",
        seq_len=point.seq_len,
        choices={key: rows.shown(row, key) for key in rows.named_by(varied) if key not in record.PLACES},
        metric="" if group.bench else phrases.metric(group),
        mean=mean,
        half=half,
        n=n,
        costs=costs,
        reason=human.listing(list(dict.fromkeys(map(human.outcome, point.failed)))),
    )


def _outcome(variant: Variant) -> str:
    if variant.mean is None:
        return variant.reason
    said = phrases.with_interval(Estimate(variant.mean, variant.half, variant.n))
    return f"{said}; {variant.reason}" if variant.reason else said


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
