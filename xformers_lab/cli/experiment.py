"""The command that judges claims of the literature: experiment."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING

from xformers_lab.cli.command import JSON, Argument, Command, answer, argument
from xformers_lab.errors import UsageError, nearest
from xformers_lab.terminal import LINES, message, visible

if TYPE_CHECKING:
    from xformers_lab.experiment.library import Experiment
    from xformers_lab.experiment.result import Result

RUNS, OUT = "runs/experiments", "experiments/results"
DEMO = ("reach", "nearby")  # the experiments of `xlab demo`


def _experiment(chosen: argparse.Namespace) -> int:
    verb, *names = chosen.words or ["list"]
    if verb not in VERBS:
        raise UsageError(f'experiment "{verb}": {nearest(verb, VERBS, "verbs")}')
    return VERBS[verb](chosen, names)


def _list(chosen: argparse.Namespace, names: list[str]) -> int:
    from xformers_lab.experiment import library, pages, words
    from xformers_lab.report import listing

    listed = pages.entries(names or library.names(), pathlib.Path(chosen.out))
    rows = [
        {
            "name": entry.experiment.name,
            "minutes": f"{entry.experiment.claim.minutes:g}",
            "verdict": words.verdicts(entry.results),
            "claim": entry.experiment.claim.says,
        }
        for entry in listed
    ]
    return answer(chosen, rows, lambda: listing.print_listing(rows))


def _show(chosen: argparse.Namespace, names: list[str]) -> int:
    from xformers_lab.experiment import pages

    if not names:
        raise UsageError("show which experiment? xlab experiment list names them")
    for entry in pages.entries(names, pathlib.Path(chosen.out)):
        experiment, claim = entry.experiment, entry.experiment.claim
        print(visible(f"{experiment.name}: {experiment.question}"))
        for what, text in dataclasses.asdict(claim).items():
            text = "; ".join(f"{name}: {held}" for name, held in text.items()) if what == "data" else text
            if text:
                print(visible(f"  {what:<11}{text}"))
        print(visible(f"  {'file':<11}{experiment.path}"))
        for name, study in experiment.studies.items():
            print(visible(f"  {name:<11}{study.line}"))
        print(f"\n{visible(experiment.rule.rstrip(), LINES)}")
        for scale, known in entry.results.items():
            print()
            _print(f"scale {scale}", known, experiment)
    return 0


def _run(chosen: argparse.Namespace, names: list[str]) -> int:
    from xformers_lab import progress
    from xformers_lab.experiment import conduct, library, pages

    if not names:
        raise UsageError("run which experiments? xlab experiment list names them; xlab experiment all runs all")
    for flag, value in (("--seeds", chosen.seeds), ("--scale", chosen.scale)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value}: at least 1")
    experiments = [library.load(name) for name in names]  # all of them, before the first runs
    for experiment in experiments:
        if lack := library.lacking(experiment, chosen.data):
            raise UsageError(f"{experiment.name} {lack}")
    out, results, written, ran = pathlib.Path(chosen.out), {}, [], []
    say = (lambda text: None) if chosen.quiet else progress.say
    for at, experiment in enumerate(experiments, 1):
        minutes = experiment.claim.minutes
        say(f"experiment {at} of {len(experiments)}: {experiment.name}, about {minutes:g} min on two cores")
        how = {"runs": pathlib.Path(chosen.runs), "seeds": chosen.seeds, "scale": chosen.scale, "pilot": chosen.pilot}
        how["data"] = chosen.data
        outcome = conduct.run(experiment, **how, quiet=chosen.quiet, announce=say)
        if outcome.result is None:
            print("interrupted: the same command goes on where it stopped", file=sys.stderr)
            return 128 + outcome.interrupted
        results[experiment.name] = outcome.result
        ran.append((experiment, outcome.result, outcome.tables))
        if not chosen.json:
            print(visible(f"{experiment.name} claims: {outcome.result.says}"))
            _print(experiment.name, outcome.result, experiment)
        if not chosen.pilot:
            conduct.keep(outcome, experiment, out)
            written = pages.write(pages.entries(_known(names), out), out)
    if chosen.json:
        print(json.dumps({name: dataclasses.asdict(result) for name, result in results.items()}, indent=2))
    if chosen.report:
        print(visible(f"report: {pages.report(ran, pathlib.Path(chosen.report))}"), file=sys.stderr)
    if chosen.pilot:
        print(message("a pilot: nothing was written to the results"), file=sys.stderr)
        return 0
    print(visible(f"results: {' and '.join(map(str, written))}"), file=sys.stderr)
    return 0


def _all(chosen: argparse.Namespace, names: list[str]) -> int:
    from xformers_lab.experiment import library

    if names:
        raise UsageError(f"all and {names[0]}: say run {names[0]}, or all alone")
    lacks = {name: library.lacking(library.load(name), chosen.data) for name in library.names()}
    for name, lack in lacks.items():
        if lack:
            print(message(f"left out: {name} {lack}"), file=sys.stderr)
    return _run(chosen, [name for name, lack in lacks.items() if not lack])


def _demo(chosen: argparse.Namespace) -> int:
    """`experiment run` of the experiments that it is made of."""
    plain = {"scale": 1, "pilot": False, "data": None}
    return _run(argparse.Namespace(**{**vars(chosen), **plain}), [*DEMO])


def _known(names: list[str]) -> list[str]:
    """What the pages list: the laboratory's own experiments, and those that were named by their files."""
    from xformers_lab.experiment import library

    return [*library.names(), *(name for name in names if name.endswith(".py"))]


def _print(title: str, result: "Result", experiment: "Experiment") -> None:
    from xformers_lab.experiment import words
    from xformers_lab.report import listing

    print(visible(f"{title}: {result.verdict}"))
    measured = [
        {"measured": each.what, "value": words.number(each), "rule": words.rule(each)} for each in result.measurements
    ]
    listing.print_listing(measured)
    print(visible(words.about(result, experiment.digest)))
    for line in [*(f"did not end: {reason}" for reason in words.missing(result)), *result.notes]:
        print(visible(f"note: {line}"))


VERBS = {"list": _list, "show": _show, "run": _run, "all": _all}
SEEDS = argument("--seeds", type=int, metavar="N", help="seeds of every study (default: the claim's)")
QUIET = argument("--quiet", action="store_true", help="no progress")


def _places(runs: str, out: str, report: str | None) -> list[Argument]:
    """Where what a run leaves goes, unless the command says otherwise."""
    page = "one offline HTML file of what runs here: verdicts, every chart and every variant"
    page += f" (default: {report})" if report else ""
    return [
        argument("--runs", path="folder", default=runs, help=f"folder of the runs (default: {runs})"),
        argument("--out", path="folder", default=out, help=f"folder of the results (default: {out})"),
        argument("--report", path="file", metavar="FILE", default=report, help=page),
    ]


COMMANDS = [
    Command(
        "demo",
        _demo,
        f"run two small claims of the literature and judge them, in minutes: {' and '.join(DEMO)}",
        [SEEDS, QUIET, *_places("runs/demo", "runs/demo/results", "report.html"), JSON],
    ),
    Command(
        "experiment",
        _experiment,
        "run claims of the literature and judge them: list, show, run, all",
        [
            argument(
                "words",
                nargs="*",
                metavar="VERB [NAME ...]",
                help="list; show NAME; run NAME..., a name or the path of a .py file of your own; all",
            ),
            SEEDS,
            argument("--scale", type=int, default=1, metavar="N", help="times the width and the steps (default: 1)"),
            argument("--pilot", action="store_true", help="with seeds of pilot runs; results are printed and not kept"),
            argument("--data", path="folder", metavar="FOLDER", help="what claims that need data read; show names it"),
            QUIET,
            *_places(RUNS, OUT, None),
            JSON,
        ],
    ),
]
