"""Commands for choices of one's own: new, check."""

from xformers_lab import config as configs
from xformers_lab.cli.command import JSON, Command, answer, argument


def _new(chosen) -> int:
    from xformers_lab.check import new, run

    path = new.new(chosen.shelf, chosen.name, chosen.folder)
    print(f"wrote {path}")
    if chosen.shelf == "attention":
        print(f"next: xlab check {path}, then xlab compare task=copy attention=full,{path}")
    elif chosen.shelf in run.kits():
        print(f"next: xlab check {chosen.shelf}/{path}")
    return 0


def _check(chosen) -> int:
    spec, found = configs.spec, []
    for word in chosen.words or ["attention"]:
        found += [(word, name) for name in spec.names(word)] if word in spec.SHELVES else [spec.home(word)]
    for shelf, name in found:
        spec.resolve(shelf, name)  # a misspelt name is found before the kit runs
    from xformers_lab import progress
    from xformers_lab.check import remembered, run
    from xformers_lab.report import pages

    reports = []
    with progress.items("check", len(found), quiet=chosen.json) as tell:
        for shelf, name in found:
            tell(name)
            report = run.check(name, shelf, deep=chosen.deep).to_dict()
            reports.append(remembered.keep(name, report) if shelf == "attention" else report)
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
