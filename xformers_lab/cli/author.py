"""Commands for choices of one's own: new, check."""

import argparse
import math
import time

from xformers_lab.cli.command import JSON, Command, answer, argument
from xformers_lab.errors import UsageError
from xformers_lab.supervise.process import ENDS, Ended, Worker
from xformers_lab.terminal import visible

# Seconds that the kit has for one choice, of which the slowest needs a tenth.
LIMIT, DEEP_LIMIT = 600.0, 7200.0


def _new(chosen: argparse.Namespace) -> int:
    from xformers_lab.check import new, run

    path = new.new(chosen.shelf, chosen.name, chosen.folder)
    shown = visible(path)
    print(f"wrote {shown}")
    if chosen.shelf == "attention":
        print(f"next: xlab check {shown}, then xlab compare task=copy attention=full,{shown}")
    elif chosen.shelf in run.kits():
        print(f"next: xlab check {chosen.shelf}/{shown}")
    return 0


def _check(chosen: argparse.Namespace) -> int:
    limit = chosen.limit if chosen.limit is not None else DEEP_LIMIT if chosen.deep else LIMIT
    if not 0 <= limit < math.inf:
        raise UsageError(f"--limit {limit:g}: a number of seconds, 0 for no limit")
    from xformers_lab import progress
    from xformers_lab.report import pages

    reports = []
    with Worker(notice=ENDS) as worker:
        choices = []  # with their shelves, or the report on a word that could not be looked up
        for word in chosen.words or ["attention"]:
            looked_up = _answer(worker, "check.work.find", limit, word, word=word)
            choices += [looked_up] if isinstance(looked_up, dict) else looked_up
        with progress.items("check", len(choices), quiet=chosen.json) as tell:
            for each in choices:
                if not isinstance(each, dict):
                    shelf, name = each
                    tell(name)
                    each = _answer(worker, "check.work.kit", limit, name, shelf=shelf, choice=name, deep=chosen.deep)
                reports.append(each)
    answer(chosen, reports, lambda: pages.print_checks(reports))
    return 0 if all(report["passed"] for report in reports) else 1


def _answer(worker: Worker, what: str, limit: float, name: str, **arguments):
    """The worker's answer, or the report on a choice that ended the worker's process."""
    began = time.monotonic()
    try:
        return worker.ask(what, limit=limit, **arguments)
    except Ended as ended:
        if ended.status == "interrupted":
            raise
        if ended.status == "stalled":
            failure = {"property": "did not end", "message": f"limit {limit:g} s (--limit): {ended.clock.place}"}
        else:
            failure = {"property": "crashed", "message": ended.reason}
        seconds = time.monotonic() - began
        return {"name": name, "passed": False, "failed": [failure], "skipped": [], "seconds": seconds, "error": None}


NEW = [
    argument("shelf", help="attention, position, ffn, ..."),
    argument("name", help="its name: the file will be NAME.py"),
    argument("--folder", path="folder", default=".", help="where to write it (default: here)"),
]
CHECK = [
    argument("words", nargs="*", metavar="NAME"),
    argument("--deep", action="store_true", help="many more shapes"),
    argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help=f"a choice that takes longer fails (default: {LIMIT:g}, with --deep {DEEP_LIMIT:g}; 0: no limit)",
    ),
]
COMMANDS = [
    Command("new", _new, "write a commented skeleton of your own mechanism", NEW),
    Command(
        "check",
        _check,
        "run the kit of its shelf on choices, NAME or SHELF/NAME (none: all attention)",
        [*CHECK, JSON],
    ),
]
