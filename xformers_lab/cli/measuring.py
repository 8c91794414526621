"""Commands that measure many configs side by side: bench, compare, report."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from xformers_lab import config as configs
from xformers_lab import engines
from xformers_lab.api import studies
from xformers_lab.api.table import Table
from xformers_lab.cli.command import JSON, TRACK, TRUST, WORDS, Command, answer, argument, spelled
from xformers_lab.cli.exports import EXPORTS, export
from xformers_lab.cli.runs import RUN, RUNS, selected
from xformers_lab.errors import UsageError
from xformers_lab.terminal import message, visible
from xformers_lab.train import trackers

if TYPE_CHECKING:
    from xformers_lab.compare.dry import Plan
    from xformers_lab.compare.study import Cell


def _bench(chosen: argparse.Namespace) -> int:
    if chosen.rounds < 1:
        raise UsageError(f"--rounds {chosen.rounds}: at least 1")
    how = {"rounds": chosen.rounds, "passes": chosen.passes, "check": not chosen.no_check, "trust": chosen.trust}
    timed = studies.timed(chosen.words, spelled(chosen), **how, lines=not chosen.json)
    from rich.console import Console

    code = answer(chosen, timed.rows, lambda: timed.draw(Console()))
    for note in timed.notes if chosen.json else ():  # which the rows do not hold
        print(visible(f"note: {note}"), file=sys.stderr)
    if chosen.report:
        print(visible(f"report: {timed.report(chosen.report)}"), file=sys.stderr)
    export(chosen, timed.rows, timed.varied, timed.command)
    if timed.interrupted:
        print("interrupted: the rows say what was measured before", file=sys.stderr)
        return 128 + timed.interrupted
    return code if timed.ok else 5


def _compare(chosen: argparse.Namespace) -> int:
    if not chosen.words:
        raise UsageError("compare what? For example: xlab compare task=copy attention=full,linear seq_len=64,128")
    grid, varied, asked = configs.study(chosen.words, trust=chosen.trust)
    from xformers_lab.compare import study

    return conducted(chosen, study.cells(grid), varied, asked)


def conducted(
    chosen: argparse.Namespace,
    cells: list["Cell"],
    varied: list[str],
    asked: configs.Study,
    axes: Mapping[str, Sequence[str]] | None = None,
    become: Callable[[Table], Table] = lambda table: table,
) -> int:
    """Train the cells of a study, print its table and write its page -> the exit code. axes: of an ablation, see
    `api.Table`; become: what its table is made of, of a scaling study."""
    trackers.require(chosen.track)
    from rich.console import Console

    from xformers_lab.compare import probe
    from xformers_lab.compare.conduct import Options

    options = Options(
        baselines=not chosen.no_baselines,
        ranges=chosen.range_control,
        budget=None if chosen.budget is None else probe.seconds(chosen.budget),
        skip_impossible=chosen.skip_impossible,
        kit=not chosen.no_check,
        track=tuple(chosen.track or ()),
        engine=engines.chosen(chosen.engine, chosen.address, chosen.jobs),
    )
    if chosen.dry_run:
        return _dry(chosen, studies.planned(cells, varied, asked, options))
    how = {"lines": not chosen.json, "axes": axes}
    done = become(studies.conducted(cells, varied, asked, options, spelled(chosen), **how))
    code = answer(chosen, done.plain(), lambda: done.draw(Console()))
    saved = done.save(cells[0].origin.runs)
    report = done.report(chosen.report or saved.parent / "report.html")
    print(visible(f"report: {report}"), file=sys.stderr)
    export(chosen, done.rows, varied, done.command, done.fits())
    if done.interrupted:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 128 + done.interrupted
    return code if done.ok else 5


def _dry(chosen: argparse.Namespace, plan: "Plan") -> int:
    from xformers_lab.report import listing

    def draw() -> None:
        listing.print_listing(plan.rows)
        print(*map(visible, plan.lines), sep="\n")

    return answer(chosen, dataclasses.asdict(plan), draw)


def _report(chosen: argparse.Namespace) -> int:
    from xformers_lab.report import human, saved, stored

    runs = pathlib.Path(chosen.runs)
    if chosen.words:
        picked = selected(chosen)
        varied = stored.differing(picked)
        rows, command, said = stored.rows(picked, varied), spelled(chosen), []
    else:
        rows, varied, command, said = saved.read(runs / "compare.json")
        if other := stored.contradicted(rows, runs):
            line = f"not what their runs say by now: {human.listing(other)}; the same xlab compare reads them again"
            print(message(line), file=sys.stderr)
            said = [*said, line]
    out = Table(rows, varied, command, said).report(chosen.out or runs / "report.html")
    export(chosen, rows, varied, command)
    return answer(chosen, {"report": str(out), "rows": len(rows)}, lambda: print(visible(f"report: {out}")))


BENCH = [
    argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)"),
    argument(
        "--pass",
        dest="passes",
        choices=tuple(studies.PASSES),
        default="both",
        help="which passes to time; decode: reading a context of seq_len into a cache, and one token behind it",
    ),
    argument("--no-check", action="store_true", help="time mechanisms of your own without their check, and say so"),
    argument("--report", path="file", metavar="FILE", help="write the figures as one offline HTML file"),
]
WHERE = "where the HTML goes (default: RUNS/report.html)"
COMPARE = [
    argument("--report", path="file", metavar="FILE", help=WHERE),
    argument("--skip-impossible", action="store_true", help="keep impossible combinations as refused rows"),
    argument("--no-check", action="store_true", help="train mechanisms of your own without their conformance check"),
    argument(
        "--no-baselines",
        action="store_true",
        help="leave out what stands beside the variants: bag of tokens, LSTM, full attention with rotary positions",
    ),
    argument(
        "--range-control",
        action="store_true",
        help="add the first variant with windows of several sizes: whether the task needs long range at all",
    ),
    argument("--budget", metavar="TIME", help="30s, 10m, 2h: fewer steps for every run alike, where all takes longer"),
    argument(
        "--engine",
        default=engines.DEFAULT,
        metavar="NAME",
        help=f"where cells train: {', '.join(engines.names())}, or the path of a .py file of your own; options as in "
        "slurm:partition=gpu (default: local)",
    ),
    argument("--address", metavar="HOST:PORT", help="of the Ray cluster that --engine ray takes"),
    argument(
        "-j",
        type=int,
        dest="jobs",
        metavar="N",
        help="train N cells side by side, without times (default: one on each host, timed)",
    ),
    argument("--dry-run", action="store_true", help="list the cells, which are there, and the time; start nothing"),
]
REPORT = [
    argument("--out", path="file", metavar="FILE", help=WHERE),
]
COMMANDS = [
    Command(
        "bench",
        _bench,
        "time attention mechanisms over lengths: speed, FLOPs, memory",
        [WORDS, *BENCH, TRUST, *EXPORTS, JSON],
        keys=True,
    ),
    Command(
        "compare",
        _compare,
        "train a grid of configs and report accuracy, speed and memory",
        [WORDS, *COMPARE, TRACK, TRUST, *EXPORTS, JSON],
        keys=True,
        study=True,
    ),
    Command(
        "report",
        _report,
        "draw stored runs, or without words the last comparison again, as one offline HTML file",
        [RUN, RUNS, *REPORT, *EXPORTS, JSON],
    ),
]
OF_COMPARE = next(command.arguments for command in COMMANDS if command.name == "compare")
