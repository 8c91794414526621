"""The table in the terminal: a line for each cell (seeds that ended ok are averaged), the best marked, failures kept."""

import dataclasses
from collections.abc import Callable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xformers_lab.report import findings, human, rows

BEST = "*"


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading, how a line's text is made, and what gives way first on a narrow terminal (0: never)."""

    title: str
    text: Callable[["Line"], str]
    gives_way: int = 0
    name: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """What one line shows: the averaged cells of one point, or one cell that failed."""

    group: rows.Group
    cells: list[dict]
    best: frozenset[str] = frozenset()

    @property
    def ok(self) -> bool:
        return rows.ok(self.cells[0])

    def measured(self, name: str, form: Callable[[object], str], spread: bool = False) -> str:
        found = rows.Point("", None, self.cells).estimate(name) if self.ok else None
        if found is None:
            return human.NONE
        text = findings.with_interval(found, form) if spread else form(found.mean)
        return f"{text} {BEST}" if name in self.best else text


def print_rows(found: Sequence[dict], varied_keys: Sequence[str], console: Console) -> None:
    """Print the rows as a table, by task and length; what is the same in all of them is printed once, above.

    On a terminal that is too narrow the least important columns are left out, and named. Where the output is no
    terminal (a file, a pipe) it is plain text with every column and no line is cut.
    """
    if not found:
        console.print("no rows", markup=False, highlight=False)
        return
    lines = _lines(found, varied_keys)
    columns = _columns(lines, varied_keys)
    texts = [[human.plain(column.text(line)) for column in columns] for line in lines]
    constant, kept = _same(columns, texts)
    if constant:
        above = " · ".join(f"{columns[i].title} {texts[0][i]}" for i in constant)
        console.print(Text(above, style="dim" if console.is_terminal else ""), soft_wrap=not console.is_terminal)
    left_out: list[int] = []
    if console.is_terminal:
        kept, left_out = _fit(columns, texts, kept, console.width)
    table = _table(lines, [columns[i] for i in kept], [[row[i] for i in kept] for row in texts], console)
    if console.is_terminal:
        console.print(table)
    else:
        # Rich pads every line to the width of the table; a file needs no trailing blanks.
        with console.capture() as capture:
            console.print(table, width=100_000, crop=False, no_wrap=True)
        console.out("\n".join(line.rstrip() for line in capture.get().splitlines()), highlight=False)
    notes = []
    if any(line.best for line in lines):
        notes.append(f"{BEST} best of its task and length")
    if left_out:
        notes.append(f"not shown on this width: {', '.join(columns[i].title for i in left_out)}")
    if notes:
        console.print(Text("; ".join(notes), style="dim" if console.is_terminal else ""), soft_wrap=not console.is_terminal)


def _lines(found: Sequence[dict], varied: Sequence[str]) -> list[Line]:
    lines = []
    for group in rows.groups(found, varied):
        for length in sorted({point.seq_len or 0 for point in group.points}):
            for point in (point for point in group.points if (point.seq_len or 0) == length):
                best = frozenset(name for name in ("metric", group.speed) if point in group.best(point.seq_len, name))
                if point.rows:
                    lines.append(Line(group, point.rows, best))
                lines += [Line(group, [row]) for row in group.failed(point, varied)]
    return lines


def _columns(lines: list[Line], varied: Sequence[str]) -> list[Column]:
    columns = [Column(key, _of(key), name=True) for key in varied if key != "seed"]
    if any(line.group.task is not None for line in lines) and "task" not in varied:
        columns.insert(0, Column("task", lambda line: str(line.group.task or human.NONE)))
    if any(line.group.direction for line in lines):
        columns.append(Column("pass", lambda line: line.group.direction or human.NONE))
    if any(len(line.cells) > 1 for line in lines) or "seed" in varied:
        columns.append(Column("seeds", _seeds, 3))
    names = {str(line.group.first("metric_name")) for line in lines if line.group.first("metric_name")}
    title = names.pop() if len(names) == 1 else "metric"
    several = bool(names)
    columns += [
        Column(title, lambda line: _metric(line, several)),
        Column("chance", lambda line: human.score(line.group.first("chance")), 4),
        Column("speed", lambda line: line.measured("tokens_per_second", human.rate)),
        Column("time/step", lambda line: line.measured("seconds_median", human.duration), 2),
        Column("memory", lambda line: line.measured("memory", human.size)),
        Column("FLOPs/step", lambda line: line.measured("flops", human.count), 5),
        Column("parameters", lambda line: line.measured("parameters", human.count), 6),
        Column("compile", lambda line: line.measured("compile_seconds", human.duration), 7),
        Column("exponent", lambda line: line.measured("exponent", lambda power: f"{power:.2f}"), 1),
        Column("outcome", lambda line: human.outcome(line.cells[0]), name=True),
    ]
    return [column for column in columns if column.name or any(column.text(line) != human.NONE for line in lines)]


def _of(key: str) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        found = rows.value(line.cells[0], key)
        return "none" if found is None else str(found)

    return text


def _seeds(line: Line) -> str:
    return str(len(line.cells)) if line.ok else f"seed {rows.value(line.cells[0], 'seed')}"


def _metric(line: Line, several: bool) -> str:
    text = line.measured("metric", human.score, spread=True)
    return f"{text} {line.group.first('metric_name')}" if several and text != human.NONE else text


def _same(columns: list[Column], texts: list[list[str]]) -> tuple[list[int], list[int]]:
    """The columns that say the same on every line, and the rest; with one line there is nothing to compare."""
    if len(texts) < 2:
        return [], list(range(len(columns)))
    constant = [i for i in range(len(columns)) if len({row[i] for row in texts}) == 1]
    return constant, [i for i in range(len(columns)) if i not in constant]


def _fit(columns: list[Column], texts: list[list[str]], kept: list[int], width: int) -> tuple[list[int], list[int]]:
    """Leave columns out, the least important first, until the rest fits; long names may still wrap."""
    left_out: list[int] = []

    def needed() -> int:
        return sum(_room(columns[i], [row[i] for row in texts]) + 2 for i in kept)

    for i in sorted((i for i in kept if columns[i].gives_way), key=lambda i: -columns[i].gives_way):
        if needed() <= width:
            break
        kept = [j for j in kept if j != i]
        left_out.append(i)
    return kept, sorted(left_out)


def _room(column: Column, cells: list[str]) -> int:
    widest = max(map(cell_len, [column.title, *cells]))
    return min(widest, 20) if column.name else widest


def _table(lines: list[Line], columns: list[Column], texts: list[list[str]], console: Console) -> Table:
    terminal = console.is_terminal
    style = box.SIMPLE_HEAD if terminal else None
    table = Table(box=style, pad_edge=False, padding=(0, 1) if terminal else (0, 2, 0, 0), show_edge=False, header_style="bold")
    for column in columns:
        if column.name and terminal:
            table.add_column(Text(human.plain(column.title)), overflow="fold", min_width=8)
        else:
            table.add_column(Text(human.plain(column.title)), justify="left" if column.name else "right", no_wrap=True)
    for number, (line, row) in enumerate(zip(lines, texts, strict=True)):
        last = number + 1 == len(lines) or lines[number + 1].group is not line.group
        table.add_row(*(_cell(line, text, terminal) for text in row), end_section=last and terminal)
    return table


def _cell(line: Line, text: str, terminal: bool) -> Text:
    """A Text is never read as markup."""
    if not terminal:
        return Text(text)
    if not line.ok:
        return Text(text, style="red")
    return Text(text, style="bold green" if text.endswith(f" {BEST}") else "")
