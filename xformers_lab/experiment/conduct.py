"""Run an experiment: its studies one after the other, each an ordinary command, then its rule.

What has run is read, not run again: an interrupted experiment goes on where it stopped.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xformers_lab import __version__, files
from xformers_lab import config as configs
from xformers_lab.api import studies as commands
from xformers_lab.api import untrained
from xformers_lab.api.table import Table
from xformers_lab.errors import UsageError
from xformers_lab.experiment import result, variants
from xformers_lab.experiment.claim import Study
from xformers_lab.experiment.findings import verdict
from xformers_lab.experiment.library import Experiment, judged, lacking
from xformers_lab.experiment.measured import Measured
from xformers_lab.experiment.result import Result
from xformers_lab.report import notes, saved
from xformers_lab.train import provenance

# Pilot runs, which thresholds are chosen by, have other seeds than the runs that are judged by them.
PILOTS = 1000
UNTRAINED = {"signals": untrained.signals, "error": untrained.error}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result, None where a signal ended it before, the tables so far, and that signal, 0 for none."""

    result: Result | None
    tables: Mapping[str, Table]
    interrupted: int = 0


def run(
    experiment: Experiment,
    *,
    runs: pathlib.Path,
    seeds: int | None = None,
    scale: int = 1,
    pilot: bool = False,
    data: str | None = None,
    quiet: bool = False,
    announce: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run the studies of an experiment and judge them.

    Args:
        runs: Folder of the runs; each study has one of its own in it.
        seeds: How many seeds, None for as many as the claim says.
        scale: What dim and steps are multiplied by.
        pilot: With the seeds of pilot runs.
        data: The folder that {data} stands for.
        quiet: No progress on stderr.
        announce: Gets a line for each study that begins.

    Raises UsageError where a study or the rule cannot be.
    """
    if lack := lacking(experiment, data):
        raise UsageError(f"{experiment.name} {lack}")
    first, count = PILOTS if pilot else 0, seeds or experiment.claim.seeds
    drawn = list(range(first, first + count))
    folder = runs / experiment.name
    tables: dict[str, Table] = {}
    lines: dict[str, str] = {}
    firsts: dict[str, str] = {}
    clock = _Clock(folder / "seconds.json")
    _refuse_unreadable(experiment, scale, data or "")
    for at, (name, study) in enumerate(experiment.studies.items(), 1):
        asked = study.of(seeds=drawn, scale=scale, runs=firsts, data=data or "")
        lines[name] = _anywhere(asked.line, data)
        announce(f"{experiment.name}: {name}, study {at} of {len(experiment.studies)}: {asked.line}")
        try:
            with clock.timing(lines[name]):
                table = _table(asked, folder / name, quiet)
            tables[name] = dataclasses.replace(
                table, rows=_anywhere(table.rows, data), notes=_anywhere(table.notes, data)
            )
        except UsageError as error:
            raise UsageError(f"{experiment.path}: {name}: {error}") from error
        firsts[name] = next((row["run_dir"] for row in tables[name].rows if row.get("run_dir")), "none")
        if tables[name].interrupted:
            return Outcome(None, tables, tables[name].interrupted)
    findings = judged(experiment, {name: Measured(table) for name, table in tables.items()})
    rows = [row for table in tables.values() for row in table.rows]
    said = dict.fromkeys(note for table in tables.values() for note in (*table.notes, *notes.of(table.rows)))
    final = Result(
        says=experiment.claim.says,
        verdict=verdict(findings),
        scale=scale,
        seeds=drawn,
        measurements=result.measurements(findings),
        commands=lines,
        notes=list(said),
        minutes=sum(map(clock.seconds, lines.values())) / 60,
        ended=provenance.now(),
        version=__version__,
        machine=next((row["machine"] for row in rows if row.get("machine")), None) or _machine(),
        digest=experiment.digest,
        git=provenance.of_file(experiment.path),
        variants=variants.of_tables(tables),
        times=result.quiet(rows),
    )
    return Outcome(final, tables)


def _refuse_unreadable(experiment: Experiment, scale: int, data: str) -> None:
    """Raises UsageError where the data of any comparison cannot be read: the last one would say so after hours."""
    from xformers_lab.model import build_task

    before = dict.fromkeys(experiment.studies, "none")
    seen = set()
    for name, study in experiment.studies.items():
        if study.command != "compare":
            continue
        asked = study.of(seeds=[0], scale=scale, runs=before, data=data)
        try:
            for config in configs.study(asked.words)[0]:
                if (read := (config.task, config.seq_len)) not in seen:
                    seen.add(read)
                    build_task(config)
        except UsageError as error:
            raise UsageError(f"{experiment.path}: {name}: {error}") from error


def _machine() -> dict[str, str]:
    """What measured in this process, where rows do not say it."""
    from xformers_lab.measure import speed

    return speed.machine()


def _anywhere(value: Any, data: str | None) -> Any:
    """What is to be kept, with {data} again for the folder of data, whose place is of this machine alone."""
    if isinstance(value, Mapping):
        return {key: _anywhere(inner, data) for key, inner in value.items()}
    if isinstance(value, list):
        return [_anywhere(inner, data) for inner in value]
    if not isinstance(value, str) or not data:
        return value
    return re.sub(rf"(?<=[(=]){re.escape(data)}(?=/)", "{data}", value)


def keep(outcome: Outcome, experiment: Experiment, folder: pathlib.Path) -> pathlib.Path:
    """Write the result and its pictures into the folder of results; -> the file of the result."""
    from xformers_lab.experiment import pictures  # which draws, and so takes long to import

    assert outcome.result is not None
    drawn = pictures.write(outcome.tables, f"{experiment.name}_{outcome.result.scale}", folder)
    return result.write(folder, experiment.name, dataclasses.replace(outcome.result, figures=drawn))


def _table(study: Study, folder: pathlib.Path, quiet: bool) -> Table:
    """The table of a study; a bench that has ended is read, as the cells of a comparison are."""
    if study.command == "compare":
        return commands.compare(*study.words, f"runs={folder}", quiet=quiet, **study.flags)
    if study.command in UNTRAINED:
        rows = UNTRAINED[study.command](*study.words, **study.flags)
        return Table(rows, [key for key in rows[0] if key in configs.LEAVES], study.line)
    kept = folder / "compare.json"
    if kept.exists():
        known = saved.read(kept)
        if known.command == study.line:
            return Table(known.rows, known.varied, study.line)
    table = commands.bench(*study.words, quiet=quiet, **study.flags)
    if not table.interrupted:
        dataclasses.replace(table, command=study.line).save(folder)
    return table


class _Clock:
    """Seconds that each command has taken, all calls together, in a file."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            self._taken = dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            self._taken = {}

    def seconds(self, command: str) -> float:
        """Of one command."""
        return self._taken.get(command, 0.0)

    @contextlib.contextmanager
    def timing(self, command: str) -> Iterator[None]:
        """Adds the seconds of what it is around, however that ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._taken[command] = self.seconds(command) + time.monotonic() - began
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_text(self._path, json.dumps(self._taken, indent=1) + "\n")
