"""Progress on stderr while long work runs: bars on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xformers_lab.config import Config, get

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


@contextlib.contextmanager
def steps(title: str) -> Iterator[Callable[[int, int, dict], None]]:
    """A callable (step, total, metrics) that shows one training run."""
    console, last = Console(stderr=True), time.monotonic()
    if not console.is_terminal:

        def line(step: int, total: int, metrics: dict) -> None:
            nonlocal last
            if time.monotonic() - last > PLAIN_EVERY:
                last = time.monotonic()
                print(f"{title}: step {step}/{total} loss {_number(metrics.get('loss'))}", file=sys.stderr, flush=True)

        yield line
        return
    with _bar(console) as bar:
        task = bar.add_task(escape(title))

        def update(step: int, total: int, metrics: dict) -> None:
            nonlocal last
            if time.monotonic() - last < BAR_EVERY:
                return
            last = time.monotonic()
            bar.update(
                task, completed=step, total=total, description=f"{escape(title)} · loss {_number(metrics.get('loss'))}"
            )

        yield update


class Cells:
    """Progress of a grid: one bar for the cells, one for the steps of the cell that trains."""

    def __init__(self, total: int, bar: Progress | None, quiet: bool, varied: Sequence[str]):
        self.total, self.bar, self.quiet, self.at, self.drawn = total, bar, quiet, "", 0.0
        self.varied = [key for key in varied if key not in ("task", "attention", "seq_len")]
        if bar is not None:
            self.grid, self.cell = bar.add_task("cells", total=total), bar.add_task("", visible=False)

    def started(self, index: int, cell: Config) -> None:
        """A cell begins to train."""
        words = [f"{key}={get(cell, key)}" for key in self.varied]
        self.at = " · ".join([cell.task, cell.model.attention, str(cell.seq_len), *words])
        if self.bar is not None:
            self.bar.update(self.cell, description=escape(self.at), completed=0, total=cell.train.steps, visible=True)

    def stepped(self, step: int, total: int, loss: float | None) -> None:
        """It has taken a step."""
        if self.bar is not None and time.monotonic() - self.drawn > BAR_EVERY:
            self.drawn = time.monotonic()
            self.bar.update(
                self.cell, completed=step, total=total, description=f"{escape(self.at)} · loss {_number(loss)}"
            )

    def finished(self, index: int, row: dict) -> None:
        """A cell has its row."""
        if self.bar is not None:
            self.bar.update(self.grid, completed=index + 1)
        elif not self.quiet and self.at:
            score = (
                f"{row['metric_name']} {_number(row['metric'])}"
                if row.get("metric") is not None
                else row.get("reason", "")
            )
            print(f"{index + 1}/{self.total} {self.at}: {row['status']} {score}", file=sys.stderr, flush=True)
        self.at = ""


@contextlib.contextmanager
def cells(total: int, varied: Sequence[str] = (), *, quiet: bool = False) -> Iterator[Cells]:
    """varied: keys that tell the cells apart; quiet: no plain lines where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Cells(total, None, quiet, varied)
        return
    with _bar(console) as bar:
        yield Cells(total, bar, quiet, varied)


@contextlib.contextmanager
def words(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A callable (text) that says what is being done now; quiet: no lines where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
        return
    with console.status("") as status:
        yield lambda text: status.update(escape(text))


def growing(start: str, decode: Callable[[list[int]], str]) -> Callable[[int, int], None]:
    """A callable (_, token) that prints a text as it grows, `start` before the first token: what is refused prints
    nothing. A letter of several tokens is printed when it is whole."""
    tokens, shown = [], ""

    def add(_: int, token: int) -> None:
        nonlocal shown
        if not tokens:
            print(start, end="", flush=True)
        tokens.append(token)
        text = decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    return add


@contextlib.contextmanager
def items(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A callable (name) that says which of `total` things is being done."""
    console, done = Console(stderr=True), 0
    if not console.is_terminal:

        def line(name: str) -> None:
            nonlocal done
            done += 1
            if not quiet and total > 1:
                print(f"{title} {done}/{total}: {name}", file=sys.stderr, flush=True)

        yield line
        return
    with _bar(console) as bar:
        task = bar.add_task(title, total=total)

        def update(name: str) -> None:
            nonlocal done
            bar.update(task, completed=done, description=f"{title} · {escape(name)}")
            done += 1

        yield update


def _number(value) -> str:
    return "-" if value is None else f"{value:.3f}"
