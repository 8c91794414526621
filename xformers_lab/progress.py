"""Progress on stderr while long work runs: bars on a terminal, plain lines elsewhere."""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from xformers_lab.config import Config, get
from xformers_lab.terminal import LINES, markup, message, visible

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
BAR_EVERY = 0.1  # seconds between changes of a bar: steps may be much shorter, and drawing would slow them down


def _bar(console: Console) -> Progress:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=console, transient=True)


def live(console: Console) -> bool:
    """Whether what is shown can change: on a terminal, and in a notebook with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


class Steps:
    """Progress of one training run: a bar on a terminal, else a line now and then."""

    def __init__(self, title: str, bar: Progress | None, quiet: bool = False):
        self.title, self.bar, self.quiet, self.last, self.words = title, bar, quiet, time.monotonic(), ""
        self.task = None if bar is None else bar.add_task(markup(title), total=None)

    def doing(self, words: str) -> None:
        """What it does in place of a step: a bar that stands still says that it compiles."""
        if self.bar is not None and self.task is not None and words not in (self.words, "training"):
            self.bar.update(self.task, description=markup(f"{self.title} · {words}"))
        self.words = words

    def __call__(self, step: int, total: int, metrics: dict) -> None:
        """It has taken a step."""
        if time.monotonic() - self.last < (PLAIN_EVERY if self.bar is None else BAR_EVERY):
            return
        self.last, loss = time.monotonic(), _number(metrics.get("loss"))
        if self.bar is not None and self.task is not None:
            words = markup(f"{self.title} · loss {loss}")
            self.bar.update(self.task, completed=step, total=total, description=words)
        elif not self.quiet:
            say(f"{self.title}: step {step}/{total} loss {loss}")


@contextlib.contextmanager
def steps(title: str, *, quiet: bool = False) -> Iterator[Steps]:
    """What shows one training run: called as (step, total, metrics) at each step, told what is done in between; quiet:
    nothing."""
    console = Console(stderr=True)
    if quiet or not live(console):
        yield Steps(title, None, quiet)
        return
    with _bar(console) as bar:
        yield Steps(title, bar)


class Cells:
    """Progress of a grid: one bar for the cells, one for the steps of each cell that trains; by lines, with about how
    long the rest takes. what: what is counted, in words, where it is not the cells themselves."""

    def __init__(self, total: int, bar: Progress | None, quiet: bool, varied: Sequence[str], what: str = "cells"):
        self.words = "" if what == "cells" else f"{what} "
        self.total, self.bar, self.quiet, self.drawn = total, bar, quiet, 0.0
        self.varied = [key for key in varied if key not in ("task", "attention", "seq_len")]
        self.at: dict[int, str] = {}  # what is under way, by its number
        self.bars: dict[int, TaskID] = {}
        self.began, self.done = 0.0, 0  # when the first one did, and how many came to their end since
        if bar is not None:
            self.grid = bar.add_task(markup(what), total=total)

    def grow(self, more: int) -> None:
        """There are more than it seemed."""
        self.total += more
        if self.bar is not None:
            self.bar.update(self.grid, total=self.total)

    def started(self, index: int, cell: Config, name: str = "") -> None:
        """A cell begins to train; name: what it is called where its keys do not say it."""
        words = [*filter(None, [name]), *(f"{key}={get(cell, key)}" for key in self.varied)]
        at = self.at[index] = " · ".join([cell.task, cell.model.attention, str(cell.seq_len), *words])
        self.began = self.began or time.monotonic()
        if self.bar is not None and index not in self.bars:
            self.bars[index] = self.bar.add_task(markup(f"{at} · compiling"), total=cell.train.steps)

    def stepped(self, index: int, step: int, total: int, loss: float | None) -> None:
        """It has taken a step."""
        if self.bar is not None and index in self.bars and time.monotonic() - self.drawn > BAR_EVERY / len(self.bars):
            self.drawn = time.monotonic()
            words = f"{markup(self.at[index])} · loss {_number(loss)}"
            self.bar.update(self.bars[index], completed=step, total=total, description=words)

    def finished(self, index: int, count: int, row: dict) -> None:
        """A cell has its row; count others had theirs before."""
        at = self.at.pop(index, "")
        self.done += bool(at)
        if self.bar is not None:
            self.bar.update(self.grid, completed=count + 1)
            if index in self.bars:
                self.bar.remove_task(self.bars.pop(index))
        elif not self.quiet and at:
            score = (
                f"{row['metric_name']} {_number(row['metric'])}"
                if row.get("metric") is not None
                else row.get("reason", "")
            )
            line = f"{self.words}{count + 1}/{self.total} {at}: {row['status']} {score}".rstrip()
            say(f"{line}{self._left(self.total - count - 1)}")

    def _left(self, cells: int) -> str:
        """About how long so many more take, in words, where those so far tell."""
        about = (time.monotonic() - self.began) / self.done * cells
        return f"; {cells} left, about {spoken(about)}" if cells else ""


@contextlib.contextmanager
def cells(total: int, varied: Sequence[str] = (), *, quiet: bool = False, what: str = "cells") -> Iterator[Cells]:
    """varied: keys that tell the cells apart; quiet: no plain lines where stderr is no terminal; what: see `Cells`."""
    console = Console(stderr=True)
    if not live(console):
        yield Cells(total, None, quiet, varied, what)
        return
    with _bar(console) as bar:
        yield Cells(total, bar, quiet, varied, what)


@contextlib.contextmanager
def words(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A callable (text) that says what is being done now; quiet: no lines where stderr is no terminal."""
    console = Console(stderr=True)
    if not live(console):
        yield (lambda text: None) if quiet else say
        return
    with console.status("") as status:
        yield lambda text: status.update(markup(text))


def growing(start: str, decode: Callable[[list[int]], str]) -> Callable[[int, int], None]:
    """A callable (_, token) that prints a text as it grows, `start` before the first token: what is refused prints
    nothing. A letter of several tokens is printed when it is whole."""
    tokens, shown = [], ""

    def add(_: int, token: int) -> None:
        nonlocal shown
        if not tokens:
            print(visible(start, LINES), end="", flush=True)
        tokens.append(token)
        text = decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(visible(text[len(shown) :], LINES), end="", flush=True)
            shown = text

    return add


@contextlib.contextmanager
def items(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A callable (name) that says which of `total` things is being done."""
    console, done = Console(stderr=True), 0
    if not live(console):

        def line(name: str) -> None:
            nonlocal done
            done += 1
            if not quiet and total > 1:
                say(f"{title} {done}/{total}: {name}")

        yield line
        return
    with _bar(console) as bar:
        task = bar.add_task(title, total=total)

        def update(name: str) -> None:
            nonlocal done
            bar.update(task, completed=done, description=f"{title} · {markup(name)}")
            done += 1

        yield update


def spoken(time: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "2.5 h"."""
    if time < 100:
        return f"{max(time, 1):.0f} s"
    return f"{time / 60:.0f} min" if time < 100 * 60 else f"{time / 3600:.1f} h"


def say(text: str) -> None:
    """One line on stderr, safe for a terminal."""
    print(message(text), file=sys.stderr, flush=True)


def _number(value) -> str:
    return "-" if value is None else f"{value:.3f}"
