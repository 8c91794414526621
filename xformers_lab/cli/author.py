"""Commands for choices of one's own: new, check."""

import argparse

from xformers_lab.api import checking
from xformers_lab.api.checking import DEEP_LIMIT, LIMIT
from xformers_lab.cli.command import JSON, Command, answer, argument
from xformers_lab.terminal import visible


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
    from xformers_lab.report import pages

    words, how = chosen.words or ["attention"], {"deep": chosen.deep, "limit": chosen.limit, "quiet": chosen.json}
    reports = checking.checked(words, **how, called=lambda name: f"--{name}")
    answer(chosen, reports, lambda: pages.print_checks(reports))
    return 0 if all(report["passed"] for report in reports) else 1


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
