"""What an experiment came to, and the file that keeps it: NAME.json, with a result for each scale."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xformers_lab import files
from xformers_lab.errors import IntegrityError, RunFailed
from xformers_lab.experiment.findings import Finding, Verdict, outcomes
from xformers_lab.experiment.variants import Variant
from xformers_lab.record import BUSY
from xformers_lab.report import rows
from xformers_lab.report.intervals import Estimate


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A finding as it is kept: its mean, half the width of its 95 % interval, the number of trials, its rule, whether
    that holds (None: left open, or there is no rule), and what did not end."""

    what: str
    mean: float | None
    half: float | None
    n: int
    rule: str
    holds: bool | None
    missing: Sequence[str] = ()

    @property
    def estimate(self) -> Estimate | None:
        return None if self.mean is None else Estimate(self.mean, self.half, self.n)


@dataclasses.dataclass(frozen=True)
class Result:
    """One scale of an experiment. says: the claim as it was; digest: of the experiment's file; commands: what ran, by
    the name of the study; minutes: of all studies, those of interrupted calls too;
    git: the commit that the file is of; figures: the names of its pictures beside the result; variants: every variant
    with its metric and costs; times: how quiet the machine was, None where nothing was timed (see `quiet`)."""

    says: str
    verdict: Verdict
    scale: int
    seeds: Sequence[int]
    measurements: Sequence[Measurement]
    commands: Mapping[str, str]
    notes: Sequence[str]
    minutes: float
    ended: str
    version: str
    machine: Mapping[str, str]
    digest: str
    git: Mapping[str, Any] | None = None
    figures: Sequence[str] = ()
    variants: Sequence[Variant] = ()
    times: Mapping[str, float] | None = None


def quiet(cells: Iterable[dict]) -> dict[str, float] | None:
    """How many rows were timed, how many of them beside something else that was busy, and the highest median over
    least time of equal work; None where none was timed."""
    ratios = [ratio for row in cells if rows.ok(row) and (ratio := rows.ratio(row)) is not None]
    if not ratios:
        return None
    return {"timed": len(ratios), "busy": sum(ratio > BUSY for ratio in ratios), "spread": max(ratios)}


def measurements(findings: Sequence[Finding]) -> list[Measurement]:
    """The findings as they are kept."""
    kept = []
    for finding, holds in zip(findings, outcomes(findings), strict=True):
        known = finding.estimate
        mean, half, n = known or (None, None, 0)
        kept.append(Measurement(finding.what, mean, half, n, finding.rule, holds, finding.sample.missing))
    return kept


def path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where the results of an experiment are kept."""
    return folder / f"{name}.json"


def read(folder: pathlib.Path, name: str) -> dict[int, Result]:
    """Scale -> result; {} where nothing was run. Raises IntegrityError where the file is no such thing."""
    where = path(folder, name)
    if not where.exists():
        return {}
    try:
        kept = json.loads(where.read_text())
        results = [Result(**each) for each in kept["results"]]
        read = [
            dataclasses.replace(
                result,
                measurements=[Measurement(**each) for each in result.measurements],  # type: ignore[arg-type]
                variants=[Variant(**each) for each in result.variants],  # type: ignore[arg-type]
            )
            for result in results
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{where}: holds no results of an experiment ({error}); delete it and run again") from None
    return {result.scale: result for result in read}


def write(folder: pathlib.Path, name: str, result: Result) -> pathlib.Path:
    """Keep a result beside those of other scales; -> the file. Raises RunFailed where it cannot be written."""
    results = read(folder, name) | {result.scale: result}
    where = path(folder, name)
    kept = {"experiment": name, "results": [dataclasses.asdict(results[scale]) for scale in sorted(results)]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.replace_text(where, json.dumps(kept, indent=1) + "\n")
    except OSError as error:
        raise RunFailed(f"{where}: cannot be written ({error.strerror})") from None
    return where
