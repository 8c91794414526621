"""Commands that look at what there is: doctor, list, show."""

import argparse
import pathlib

from xformers_lab import config as configs
from xformers_lab import progress
from xformers_lab.cli.command import JSON, TRUST, Command, answer, argument
from xformers_lab.errors import UsageError

# Words that say which task is shown; any other makes them a config.
OF_TASK = {"task", "seq_len"}
# Columns of `list attention` that JSON alone has: a terminal has no room, and `show NAME` has all of one choice.
HIDDEN = ("memory", "bias", "options")
EVERY = "all"  # what --deep without names means
# How a finding of the doctor is, in a word: None is no fault of the installation.
OK = {True: "yes", None: "note", False: "NO"}


def _doctor(chosen: argparse.Namespace) -> int:
    from xformers_lab import doctor
    from xformers_lab.doctor import deep
    from xformers_lab.report import listing

    if chosen.deep is None and chosen.times is not None:
        raise UsageError("--times: how often is for --deep, which disturbs runs; write xlab doctor --deep --times N")
    trials = [] if chosen.deep in (None, EVERY) else chosen.deep.split(",")
    deep.refuse_unknown(trials, chosen.times)
    findings = [] if trials else doctor.examine()
    if chosen.deep is not None:
        findings += deep.examine(trials, chosen.times, progress.say)
    shown = [{"what": each["what"], "ok": OK[each["ok"]], "found": each["found"]} for each in findings]
    code = answer(chosen, findings, lambda: listing.print_listing(shown))
    return 3 if any(finding["ok"] is False for finding in findings) else code


def _list(chosen: argparse.Namespace) -> int:
    from xformers_lab import shelves
    from xformers_lab.report import listing

    rows = shelves.shelf(chosen.shelf) if chosen.shelf else shelves.shelves()
    hidden = HIDDEN if chosen.shelf == "attention" else ()
    shown = [{key: row[key] for key in row if key not in hidden} for row in rows]
    return answer(chosen, rows, lambda: listing.print_listing(shown))


def _show(chosen: argparse.Namespace) -> int:
    from xformers_lab import shelves
    from xformers_lab.report import pages

    if not chosen.words:
        raise UsageError(
            "show what? A name (xlab show local), a task (xlab show task=copy), or a config (xlab show task=copy "
            "attention=local)"
        )
    name, *rest = chosen.words
    keys = {key if equals else "" for key, equals, _ in (word.partition("=") for word in chosen.words)}
    if "task" in keys and keys <= OF_TASK:
        if chosen.svg:
            raise UsageError("--svg draws a mechanism of attention, and this is a task")
        config = configs.single(chosen.words, trust=chosen.trust)
        task = shelves.task(config, chosen.split or "test", chosen.number or 0)
        return answer(chosen, task, lambda: pages.print_task(task))
    if chosen.split is not None or chosen.number is not None:
        flag = "--split" if chosen.split is not None else "--number"
        raise UsageError(f"{flag} is for an example of a task: xlab show task=NAME, with no word beside but seq_len=")
    if "=" in name.partition(":")[0] or name.startswith("@"):
        if chosen.svg:
            raise UsageError("--svg draws one mechanism: name it (xlab show bigbird seq_len=1024 --svg bigbird.svg)")
        return _sizes(chosen)
    page = shelves.page(name, rest)
    if chosen.svg:
        if "svg" not in page:
            raise UsageError(f"--svg: no fixed pattern says what {name} looks at, so there is nothing to draw")
        try:
            pathlib.Path(chosen.svg).write_text(page["svg"])
        except OSError as error:
            raise UsageError(f"--svg {chosen.svg}: cannot write there ({error.strerror})") from None
    return answer(chosen, page, lambda: pages.print_page(page))


def _sizes(chosen: argparse.Namespace) -> int:
    """A config in full with its sizes, or the sizes of several side by side."""
    cells, varied = configs.sweep(chosen.words, trust=chosen.trust)
    from xformers_lab import progress, shelves
    from xformers_lab.report import listing, sizes
    from xformers_lab.supervise.process import ENDS, Ended, Worker

    measured = []
    with Worker(notice=ENDS) as worker, progress.words(quiet=chosen.json) as tell:
        for cell in cells:
            tell(f"compiling {cell.task} \N{MIDDLE DOT} {cell.model.attention} \N{MIDDLE DOT} {cell.seq_len}")
            try:
                measured.append(worker.ask("train.sizes.measure", stall=cell.stall, config=configs.to_dict(cell)))
            except Ended as ended:
                if len(cells) == 1 or ended.status == "interrupted":
                    raise
                measured.append({"reason": ended.reason})
            except UsageError as error:
                if len(cells) == 1:
                    raise
                measured.append({"reason": str(error)})
    if len(cells) > 1:
        keys = [{key: configs.spec.show(configs.get(cell, key)) for key in varied or ["attention"]} for cell in cells]
        rows = sizes.lines(list(zip(keys, measured, strict=True)))
        value = [{**named, **each} for named, each in zip(keys, measured, strict=True)]
        code = answer(chosen, value, lambda: listing.print_listing(rows))
        return code if all("reason" not in each for each in measured) else 5
    rows = shelves.resolved(cells[0])
    resolved = {row["key"]: row["value"] for row in rows}

    def page() -> None:
        listing.print_listing(rows)
        print()
        sizes.print_sizes(measured[0])

    return answer(chosen, resolved | {"sizes": measured[0]}, page)


DEEP = argument(
    "--deep",
    nargs="?",
    const=EVERY,
    metavar="TRIAL,TRIAL",
    help="disturb a small run as well, by kills, signals, damage, and see that nothing is lost: minutes; with names, "
    "these trials alone",
)
TIMES = argument(
    "--times", type=int, metavar="N", help="with --deep: how often each trial disturbs a run (a few times)"
)
SHELF = argument(
    "shelf", nargs="?", help="attention, position, norm, normaliser, ffn, depth, memory, model, task, optimizer"
)
CHOICE = argument("words", nargs="*", metavar="NAME or key=value")
SVG = argument("--svg", path="file", metavar="FILE", help="write the drawing of a pattern of attention there")
SPLIT = argument("--split", choices=("train", "validation", "test"), help="of a task: the split of the example (test)")
NUMBER = argument("--number", type=int, metavar="N", help="of a task: which example, from 0 (0)")
COMMANDS = [
    Command(
        "doctor",
        _doctor,
        "what there is to compute on and what to install for the rest, how fast it is, and a self-test: some seconds",
        [DEEP, TIMES, JSON],
    ),
    Command("list", _list, "the choices on a shelf, or the shelves", [SHELF, JSON]),
    Command(
        "show",
        _show,
        "what a choice is, with its options and drawing; a task with an example (task=copy); or how large configs are, "
        "and how a layout shares their parameters out",
        [CHOICE, SPLIT, NUMBER, SVG, TRUST, JSON],
    ),
]
