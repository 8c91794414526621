"""Tables in the terminal, one for each task: seeds averaged, the best marked, failed cells with their reason, and the
verdict in words below."""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xformers_lab.record import Figure, Record, columns
from xformers_lab.report import aggregate, findings, human, notes, phrases, rows, study
from xformers_lab.terminal import visible

BEST = " *"
# What stands behind a tuned value at the end of its grid.
EDGE = " (edge)"


# The order of lines at one length.
ROLES = ("variant", "baseline", "range")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table: the seeds of one point that ended ok, or one cell that did not."""

    cells: list[dict]
    best: frozenset[str] = frozenset()

    @property
    def ok(self) -> bool:
        return rows.ok(self.cells[0])

    @property
    def role(self) -> str:
        return rows.role(self.cells[0])

    @property
    def point(self) -> rows.Point:
        """Its rows as a point, whose estimates are over the seeds."""
        return rows.Point("", rows.length(self.cells[0]), self.cells, [])

    def said(self, words: Callable[[dict], str]) -> str:
        """What each row of a line that ended ok says; seeds may differ, and then each is said."""
        return human.listing(list(dict.fromkeys(filter(None, map(words, self.cells))))) if self.ok else ""


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
    cells: Sequence[dict],
    varied_keys: Sequence[str],
    console: Console | None = None,
    schema: type[Record] = Record,
    *,
    judged: bool = True,
) -> None:
    """Print the rows as one table for each task (for a bench: each pass), in rising length. judged: with marks and the
    verdict of who won, which is nothing for rows that differ in size.

    What is the same on all lines of a table is printed once, above it. A terminal that is too narrow loses the least
    important columns, and says which. A file or a pipe gets plain text with every column, and no line is cut.
    """
    console = console or Console()
    if not cells:
        _say(console, "There are no rows to show.")
    groups = rows.groups(cells, varied_keys)
    for number, group in enumerate(groups):
        if number:
            _say(console, "")
        _print_group(group, varied_keys, console, columns(schema), judged)
    if judged:
        _print_overall(groups, console)
    for note in notes.of(cells):
        _say(console, f"note: {human.plain(note)}", "dim")


def _print_group(
    group: rows.Group, varied: Sequence[str], console: Console, measured: Sequence[Figure], judged: bool
) -> None:
    lines = _lines(group) if judged else [Line(line.cells) for line in _lines(group)]
    every = _columns(group, lines, varied, measured)
    shown = [column for column in every if not column.constant]
    guesses = findings.guesses(group)
    above = [guesses] if guesses else []
    above += [f"{column.title} {column.said[0].strip()}" for column in every if column.constant]
    beside = [role for role in ("baseline", "range") if any(line.role == role for line in lines)]
    _say(console, group.title, "bold")
    if above:
        _say(console, " · ".join(above), "dim")
    left_out = _fit(shown, console.width) if console.is_terminal else []
    fitting = [column for column in shown if column not in left_out]
    _print_table(fitting, lines, console)
    if any(line.best for line in lines):
        _say(console, f"* best at its length{rows.tested(group)}", "dim")
    if beside:
        _say(console, f"{human.listing([f'({role})' for role in beside])}: not among the variants, not ranked", "dim")
    if any(text.endswith(EDGE) for column in fitting for text in column.texts):
        _say(console, f"{EDGE.strip()}: the best value is at the end of its grid", "dim")
    if left_out:
        _say(console, f"too narrow for: {', '.join(column.title for column in left_out)}", "dim")
    for sentence in findings.sentences(group) if judged else ():
        _say(console, human.plain(sentence))
    for note in notes.of_group(group, sizes=not judged):
        _say(console, f"note: {human.plain(note)}", "dim")
    for line in lines:
        if not line.ok:
            _say(console, f"{rows.label(line.cells[0], varied)}: {human.outcome(line.cells[0])}", "red")


def _print_overall(groups: Sequence[rows.Group], console: Console) -> None:
    """The aggregates over all tasks, where there are several."""
    overall = aggregate.over_tasks(groups)
    if overall is None:
        return
    _say(console, "")
    _say(console, "over all tasks", "bold")
    _say(console, human.listing(overall.settings), "dim")
    table = _frame(console)
    table.add_column(Text("variant"), overflow="fold", no_wrap=not console.is_terminal)
    for title in ("interquartile mean", "95 % interval", "seeds"):
        table.add_column(Text(title), justify="right", no_wrap=True)
    for score in (*overall.of_role("variant"), *overall.of_role("baseline")):
        name = score.series if score.role == "variant" else f"{score.series} ({score.role})"
        interval = human.NONE if score.low is None else f"{human.score(score.low)} to {human.score(score.high)}"
        texts = (name, human.score(score.mean), interval, str(score.seeds))
        table.add_row(*(Text(visible(text)) for text in texts))
    put(table, console)
    for sentence in aggregate.sentences(groups):
        _say(console, human.plain(sentence))


def _lines(group: rows.Group) -> list[Line]:
    lines, names = [], ("metric", group.speed)
    lengths = {point.seq_len for point in group.points}
    lead = {name: {id(point) for at in lengths for point in group.leading(at, name)} for name in names}
    for point in sorted(group.points, key=lambda point: (point.seq_len or 0, ROLES.index(point.role))):
        if point.rows:
            lines.append(Line(point.rows, frozenset(name for name in names if id(point) in lead[name])))
        lines += [Line([row]) for row in point.failed]
    return lines


def _columns(group: rows.Group, lines: list[Line], varied: Sequence[str], measured: Sequence[Figure]) -> list[Column]:
    named = []
    if any(rows.length(line.cells[0]) is not None for line in lines):
        named.append(Column("seq_len", [str(rows.length(line.cells[0]) or human.NONE) for line in lines]))
    for number, key in enumerate(key for key in rows.named_by(varied) if key not in rows.PLACES):
        named.append(Column(key, [_named(line, key, first=not number) for line in lines], name=True))
    if rows.seeds(group.rows) > 1:
        seeds = [str(len(line.cells)) if line.ok else rows.drawn(line.cells[0], varied) for line in lines]
        named.append(Column("seeds", seeds, 2))
    said = lambda words: [line.said(words) for line in lines]
    sampled = any(rows.partly(row) for row in group.rows)
    step = lambda row: "" if (at := rows.scored_at(row)) is None else f"{at:,}"
    about = [Column("scored", said(rows.scored), 2)] if sampled else []
    about += [Column("after step", said(step), 7)] if "steps" not in varied else []
    measures = [
        *_metrics(phrases.metric(group), lines),
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
        estimate = line.point.estimate(name)
        if name == "metric":
            text = phrases.with_interval(estimate, form)
        else:
            text = form(estimate.mean) if estimate else human.NONE
        texts.append(text + (BEST if name in line.best else " " * len(BEST)) if marked else text)
    return texts


def _named(line: Line, key: str, *, first: bool) -> str:
    """The value of a varied key; a row with a name of its own has that in the first of them, with its role."""
    name = line.cells[0].get("name")
    if not isinstance(name, str) or not name.strip():
        return rows.shown(line.cells[0], key)
    role = "" if line.role == "variant" else f" ({line.role})"
    return f"{human.plain(name)}{role}" if first else ""


def _metrics(name: str, lines: list[Line]) -> list[Column]:
    """The metric: where knobs were tuned, with them and under the recipe that all share; the knobs; what was matched;
    and the metric at other lengths."""
    scores = _measured(lines, "metric", human.score)
    if any(rows.shared(row) for line in lines for row in line.cells):
        shared = [phrases.with_interval(line.point.shared.estimate("metric")) if line.ok else "" for line in lines]
        columns = [Column(f"{name}, tuned", scores), Column("shared recipe", shared, 1)]
    else:
        columns = [Column(name, scores)]
    for knob in dict.fromkeys(knob for line in lines for row in line.cells for knob in study.best(row)):
        columns.append(
            Column(f"tuned {human.plain(knob)}", [line.said(lambda row, k=knob: _knob(row, k)) for line in lines], 2)
        )
    for budget in dict.fromkeys(
        study.budget(matched) for line in lines for row in line.cells if (matched := study.of(row))
    ):
        columns.append(
            Column(f"matched in {budget}", [line.said(lambda row, b=budget: _match(row, b)) for line in lines], 3)
        )
    lengths = {length for line in lines for row in line.cells for length in rows.by_length(row)}
    for length in sorted(lengths):
        points = [line.point.beyond(length).estimate("metric") if line.ok else None for line in lines]
        columns.append(Column(f"{name} @{length:,}", [phrases.with_interval(point) for point in points], 2))
    return columns


def _knob(row: dict, knob: str) -> str:
    """The tuned value of a knob: "0.01 (edge)"."""
    return f"{study.knob(row, knob)}{EDGE if study.at_edge(row) else ''}" if knob in study.best(row) else ""


def _match(row: dict, budget: str) -> str:
    """What matching changed: "ffn=mlp:ratio=3.62", and how far off a row is that could not be matched."""
    matched = study.of(row)
    if not matched or study.budget(matched) != budget:
        return ""
    changed = matched.get("changed")
    changed = changed if isinstance(changed, Mapping) else {}
    words = [f"{key}={pair[-1]}" for key, pair in changed.items() if isinstance(pair, Sequence) and pair]
    words += [f"unmatched ({study.off(matched)})"] if matched.get("ok") is False else []
    return human.plain(", ".join(words)) or "as it is"


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
    table = _frame(console)
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


def _frame(console: Console) -> Table:
    """An empty table; plain in a file or a pipe."""
    shape = box.SIMPLE_HEAD if console.is_terminal else None
    return Table(box=shape, pad_edge=False, show_edge=False, header_style="bold")


def put(table: Table, console: Console) -> None:
    """Print a table; a file or a pipe, which has no width, gets it uncut."""
    if console.is_terminal:
        console.print(table)
        return
    page = io.StringIO()
    Console(file=page, width=100_000, color_system=None, force_jupyter=False).print(table)
    for text in page.getvalue().splitlines():
        _say(console, text.rstrip())


def _style(line: Line, text: str) -> str:
    if not line.ok:
        return "red"
    return "bold green" if text.endswith(BEST) else ""


def _say(console: Console, text: str, style: str = "") -> None:
    terminal = console.is_terminal
    console.print(Text(visible(text), style=style if terminal else ""), soft_wrap=not terminal)
