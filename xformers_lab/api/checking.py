"""`xl.check`: the conformance kit of its shelf on a choice, in a worker; what `xlab check` prints."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xformers_lab.api import own, supervised
from xformers_lab.api.shown import Shown
from xformers_lab.errors import UsageError
from xformers_lab.supervise.process import ENDS, Ended, Worker

if TYPE_CHECKING:
    from rich.console import Console

# Seconds that the kit has for one choice, of which the slowest needs a tenth.
LIMIT, DEEP_LIMIT = 600.0, 7200.0


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Shown):
    """The kit's verdict on a choice; true where it passed, and shown as `xlab check` prints it.

    failed, skipped: {"property": ..., "message": ...} and {"property": ..., "reason": ...}. error: the largest
    difference between the fast form and the reference, relative to the largest output; None where none was compared.
    """

    name: str
    passed: bool
    failed: list[Mapping[str, str]]
    skipped: list[Mapping[str, str]]
    seconds: float
    error: float | None = None

    def __bool__(self) -> bool:
        return self.passed

    def draw(self, console: "Console") -> None:
        from xformers_lab.report import pages

        pages.print_checks([dataclasses.asdict(self)], console)


def check(
    choice: Any,
    *,
    deep: bool = False,
    limit: float | None = None,
    runs: pathlib.Path | str = "runs",
    quiet: bool = False,
) -> Report:
    """Run the conformance kit of its shelf on a choice, as `xlab check` does: whether a mechanism equals its reference,
    sees no future, ignores padding, has gradients, costs what it says, and more.

        report = xl.check("local:window=64")
        report = xl.check(MyAttention)
        assert report.passed, report

    Args:
        choice: A name with options, SHELF/NAME, a dotted module, the path of a file; or a class of your own, as
            `xl.train` takes it.
        deep: Many more shapes.
        limit: Seconds after which it has failed (default: 600, with deep 7200; 0: no limit).
        runs: The folder of runs, where the source of a class that stands in no file of its own is kept.
        quiet: No progress on stderr.

    Raises:
        xformers_lab.errors.UsageError: There is no such choice, or its shelf has no kit.
        KeyboardInterrupt: Ctrl-C.
    """
    word = choice if isinstance(choice, str) else own.choice(choice, pathlib.Path(runs))
    with supervised.interruptible():
        (report,) = checked([word], deep=deep, limit=limit, quiet=quiet)
    known = {field.name for field in dataclasses.fields(Report)}
    return Report(**{key: value for key, value in report.items() if key in known})


def checked(
    words: Sequence[str],
    *,
    deep: bool,
    limit: float | None,
    quiet: bool = False,
    lines: bool = True,
    called: Callable[[str], str] = str,
) -> list[dict[str, Any]]:
    """The kit's reports on what words name, a shelf all that is on it. quiet: no progress on stderr; lines: a line for
    each choice where that is no terminal; called(name): what messages call an argument."""
    limit = limit if limit is not None else DEEP_LIMIT if deep else LIMIT
    if not 0 <= limit < math.inf:
        raise UsageError(f"{called('limit')} {limit:g}: a number of seconds, 0 for no limit")
    from xformers_lab import progress

    reports = []
    with Worker(notice=ENDS) as worker:
        ask = lambda what, name, **more: _answer(worker, what, limit, name, called("limit"), **more)
        choices = []  # with their shelves, or the report on a word that could not be looked up
        for word in words:
            looked_up = ask("check.work.find", word, word=word)
            choices += [looked_up] if isinstance(looked_up, dict) else looked_up
        nothing = contextlib.nullcontext(lambda name: None)
        with nothing if quiet else progress.items("check", len(choices), quiet=not lines) as tell:
            for each in choices:
                if not isinstance(each, dict):
                    shelf, name = each
                    tell(name)
                    each = ask("check.work.kit", name, shelf=shelf, choice=name, deep=deep)
                reports.append(each)
    return reports


def _answer(worker: Worker, what: str, limit: float, name: str, called: str, **arguments: Any) -> Any:
    """The worker's answer, or the report on a choice that ended the worker's process."""
    began = time.monotonic()
    try:
        return worker.ask(what, limit=limit, **arguments)
    except Ended as ended:
        if ended.status == "interrupted":
            raise
        if ended.status == "stalled":
            failure = {"property": "did not end", "message": f"limit {limit:g} s ({called}): {ended.clock.place}"}
        else:
            failure = {"property": "crashed", "message": ended.reason}
        seconds = time.monotonic() - began
        return {"name": name, "passed": False, "failed": [failure], "skipped": [], "seconds": seconds, "error": None}
