"""Tables in the terminal, one for each task: seeds averaged, the best marked, failed cells with their reason."""

import dataclasses
import io
from collections.abc import Callable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xformers_lab.record import Figure, Record, columns
from xformers_lab.report import findings, human, notes, rows
from xformers_lab.terminal import visible

BEST = " *"


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table: the seeds of one point that ended ok, or one cell that did not."""

    cells: list[dict]
    best: frozenset[str] = frozenset()

    @property
    def ok(self) -> bool:
        return rows.ok(self.cells[0])


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading and a text for each line; the greater `narrow`, the sooner a narrow terminal loses the column."""

    title: str
    texts: list[str]
    narrow: int = 0
    name: bool = False

    @property
    def constant(self) -> bool:
        """Whether several lines say something, and all of them the same; the blank of a failed cell says nothing."""
        return len(self.said) > 1 and len(set(self.said)) == 1

    @property
    def said(self) -> list[str]:
        """The texts that are not blank."""
        return [text for text in self.texts if text.strip()]

    @property
    def width(self) -> int:
        widest = max(map(cell_len, [self.title, *self.texts]))
        return min(widest, 20) if self.name else widest


def print_rows(
    cells: Sequence[dict], varied_keys: Sequence[str], console: Console | None = None, schema: type[Record] = Record
) -> None:
    """Print the rows as one table for each task (for a bench: each pass), in rising length.

    What is the same on all lines of a table is printed once, above it. A terminal that is too narrow loses the least
    important columns, and says which. A file or a pipe gets plain text with every column, and no line is cut.
    """
    console = console or Console()
    if not cells:
        _say(console, "There are no rows to show.")
    for number, group in enumerate(rows.groups(cells, varied_keys)):
        if number:
            _say(console, "")
        _print_group(group, varied_keys, console, columns(schema))
    for note in notes.of(cells):
        _say(console, f"note: {human.plain(note)}", "dim")


def _print_group(group: rows.Group, varied: Sequence[str], console: Console, measured: Sequence[Figure]) -> None:
    lines = _lines(group)
    every = _columns(group, lines, varied, measured)
    shown = [column for column in every if not column.constant]
    guesses = findings.guesses(group)
    above = [guesses] if guesses else []
    above += [f"{column.title} {column.said[0].strip()}" for column in every if column.constant]
    _say(console, group.title, "bold")
    if above:
        _say(console, " · ".join(above), "dim")
    left_out = _fit(shown, console.width) if console.is_terminal else []
    _print_table([column for column in shown if column not in left_out], lines, console)
    if any(line.best for line in lines):
        _say(console, f"* best at its length{rows.tested(group)}", "dim")
    if left_out:
        _say(console, f"too narrow for: {', '.join(column.title for column in left_out)}", "dim")
    for note in notes.of_group(group):
        _say(console, f"note: {human.plain(note)}", "dim")
    for line in lines:
        if not line.ok:
            _say(console, f"{rows.label(line.cells[0], varied)}: {human.outcome(line.cells[0])}", "red")


def _lines(group: rows.Group) -> list[Line]:
    lines, names = [], ("metric", group.speed)
    lengths = {point.seq_len for point in group.points}
    lead = {name: {id(point) for at in lengths for point in group.leading(at, name)} for name in names}
    for point in sorted(group.points, key=lambda point: point.seq_len or 0):
        if point.rows:
            lines.append(Line(point.rows, frozenset(name for name in names if id(point) in lead[name])))
        lines += [Line([row]) for row in point.failed]
    return lines


def _columns(group: rows.Group, lines: list[Line], varied: Sequence[str], measured: Sequence[Figure]) -> list[Column]:
    named = []
    if any(rows.length(line.cells[0]) is not None for line in lines):
        named.append(Column("seq_len", [str(rows.length(line.cells[0]) or human.NONE) for line in lines]))
    for key in rows.named_by(varied):
        if key not in rows.PLACES:
            named.append(Column(key, [rows.shown(line.cells[0], key) for line in lines], name=True))
    if rows.seeds(group.rows) > 1:
        seeds = [str(len(line.cells)) if line.ok else f"seed {rows.shown(line.cells[0], 'seed')}" for line in lines]
        named.append(Column("seeds", seeds, 2))
    # Seeds may differ in how many examples were scored, and after which step: each is said.
    said = lambda words: [
        human.listing(list(dict.fromkeys(filter(None, map(words, line.cells))))) if line.ok else "" for line in lines
    ]
    sampled = any(rows.partly(row) for row in group.rows)
    step = lambda row: "" if (at := rows.scored_at(row)) is None else f"{at:,}"
    about = [Column("scored", said(rows.scored), 1)] if sampled else []
    about += [Column("after step", said(step), 7)] if "steps" not in varied else []
    measures = [
        Column(human.plain(group.first("metric_name", "metric")), _measured(lines, "metric", human.score)),
        *about,
        *(
            Column(
                figure.short,
                _measured(lines, figure.name, human.FORMS[figure.form]),
                0 if figure.name == group.speed else figure.narrow,
            )
            for figure in measured
            if figure.narrow is not None
        ),
    ]
    measures = [column for column in measures if any(text.strip() not in ("", human.NONE) for text in column.texts)]
    if not measures:
        measures = [Column("outcome", [human.NONE] * len(lines))]
    # A cell that failed has no numbers: the first of them gives the room to say why.
    first = measures[0]
    texts = [text if line.ok else human.status(line.cells[0]) for text, line in zip(first.texts, lines, strict=True)]
    return [*named, dataclasses.replace(first, texts=texts, narrow=0), *measures[1:]]


def _measured(lines: list[Line], name: str, form: Callable) -> list[str]:
    """A measure of every line; a mark for the best, and blanks in its place on the others, so that numbers align."""
    marked = any(name in line.best for line in lines)
    texts = []
    for line in lines:
        if not line.ok:
            texts.append("")
            continue
        estimate = rows.Point("", None, line.cells, []).estimate(name)
        if name == "metric":
            text = findings.with_interval(estimate, form)
        else:
            text = form(estimate.mean) if estimate else human.NONE
        texts.append(text + (BEST if name in line.best else " " * len(BEST)) if marked else text)
    return texts


def _fit(columns: list[Column], width: int) -> list[Column]:
    """The columns to leave out, the least important first, until the others fit; long names wrap."""
    fitting, left_out = list(columns), []
    for column in sorted((c for c in columns if c.narrow), key=lambda c: -c.narrow):
        if sum(c.width + 3 for c in fitting) <= width:
            break
        fitting.remove(column)
        left_out.append(column)
    return left_out


def _print_table(columns: list[Column], lines: list[Line], console: Console) -> None:
    terminal = console.is_terminal
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        if column.name:
            table.add_column(Text(human.plain(column.title)), overflow="fold", no_wrap=not terminal)
        else:
            table.add_column(Text(column.title), justify="right", no_wrap=True)
    for number, line in enumerate(lines):
        # A Text is never read as markup, so that a name in brackets stays a name.
        cells = [Text(visible(column.texts[number]), style=_style(line, column.texts[number])) for column in columns]
        last = number + 1 == len(lines)
        table.add_row(
            *cells, end_section=not last and rows.length(line.cells[0]) != rows.length(lines[number + 1].cells[0])
        )
    put(table, console)


def put(table: Table, console: Console) -> None:
    """Print a table; a file or a pipe, which has no width, gets it uncut."""
    if console.is_terminal:
        console.print(table)
        return
    page = io.StringIO()
    Console(file=page, width=100_000, color_system=None).print(table)
    for text in page.getvalue().splitlines():
        _say(console, text.rstrip())


def _style(line: Line, text: str) -> str:
    if not line.ok:
        return "red"
    return "bold green" if text.endswith(BEST) else ""


def _say(console: Console, text: str, style: str = "") -> None:
    terminal = console.is_terminal
    console.print(Text(visible(text), style=style if terminal else ""), soft_wrap=not terminal)
