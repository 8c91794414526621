"""What the commands that look around print: catalogues, one choice, the kit's verdicts, one run."""

import math
import statistics

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xformers_lab.record import Record, figures, summary
from xformers_lab.report import human, rows
from xformers_lab.report.table import put

# Into how many parts of a sequence its figures are gathered.
PARTS = 8
# Between two columns, and what a column of sentences needs at least to be read.
GAP, LEAST_ROOM = 2, 32


def print_table(rows: list[dict], console: Console | None = None) -> None:
    """Any rows with the same keys, as a table.

    Where a terminal is too narrow, the longest column alone is wrapped; where that leaves it too little room, it and as
    many others as it takes stand below their row, so that no word is cut.
    """
    console = console or Console()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    texts = [{key: human.plain(_word(row.get(key, ""))) for key in keys} for row in rows]
    widths = {key: max(map(cell_len, [key, *(row[key] for row in texts)])) for key in keys}
    beside, below, wrapped = keys, [], None
    if console.is_terminal and keys:
        beside, below, wrapped = _arranged(widths, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in beside:
        table.add_column(Text(key), no_wrap=key != wrapped, overflow="fold")
    if not below:
        for row in texts:
            table.add_row(*(Text(row[key]) for key in beside))
        put(table, console)
        return
    for key in beside:
        table.columns[beside.index(key)].min_width = widths[key]
    put(table, console)
    for row in texts:
        line = Table(box=None, pad_edge=False, show_header=False)
        for key in beside:
            line.add_column(min_width=widths[key], no_wrap=True)
        line.add_row(*(Text(row[key]) for key in beside))
        put(line, console)
        said = [f"{key} {row[key]}".strip() for key in below[1:] if row[key]]
        for words in (" · ".join(said), row[below[0]]):
            if words:
                console.print(Padding(Text(words, style="dim"), (0, 0, 0, 4)))


def _arranged(widths: dict[str, int], room: int) -> tuple[list[str], list[str], str | None]:
    """The columns beside each other, those below them, the longest first, and the one that is wrapped."""
    beside, below = list(widths), []
    total = lambda: sum(widths[key] + GAP for key in beside) - GAP
    longest = max(widths, key=widths.__getitem__)
    if total() <= room:
        return beside, below, None
    if total() - widths[longest] + LEAST_ROOM <= room:
        return beside, below, longest
    while len(beside) > 1 and total() > room:
        below.append(max(beside[1:], key=widths.__getitem__))  # the first column names the row
        beside.remove(below[-1])
    return beside, below, beside[0]


def print_page(page: dict, console: Console | None = None) -> None:
    """One choice: its docstring, options, cost and drawing."""
    console = console or Console()
    console.print(f"[bold]{escape(page['name'])}[/bold]  ({escape(page['shelf'])})\n")
    for paragraph in page["about"].partition("Options:")[0].strip().split("\n\n"):
        console.print(escape(" ".join(paragraph.split())) + "\n", highlight=False)
    if page["options"]:
        print_table([{"option": o["name"], "value": o["value"], "": o["help"]} for o in page["options"]], console)
        console.print()
    if "cost" in page:
        cost, can = page["cost"], [word for word, yes in page["can"].items() if yes]
        console.print(
            f"one head, {page['length']} positions: {cost['flops']:,.0f} matmul FLOPs forward, "
            f"largest array {cost['memory']:,.0f} numbers, decoding keeps {cost['state']:,.0f} numbers"
        )
        cannot = [word for word, yes in page["can"].items() if not yes]
        console.print(f"can: {', '.join(can) or '-'}; cannot: {', '.join(cannot) or '-'}")
    if "pattern" in page:
        console.print(f"\nrows are queries, columns the keys they see ({page['drawn']}):")
        for line in page["pattern"]:
            console.print(line, no_wrap=True, overflow="crop", markup=False, highlight=False)


def print_checks(reports: list[dict], console: Console | None = None) -> None:
    """The kit's verdict on each mechanism, and every property that failed, with what to look for."""
    console = console or Console()
    for report in reports:
        verdict = "[green]passes[/green]" if report["passed"] else "[red]fails[/red]"
        skipped = f", {len(report['skipped'])} not applicable" if report.get("skipped") else ""
        console.print(f"{escape(report['name'])} {verdict}{skipped}, {report['seconds']:.0f} s")
        for failure in report["failed"]:
            console.print(f"  [red]{escape(failure['property'])}[/red]: {escape(failure['message'])}")


def print_record(record: dict, console: Console | None = None, schema: type[Record] = Record) -> None:
    """The record of one run or evaluation: what its summary tells."""
    shown = {figure.key: figure for figure in figures(schema) if not figure.exact}
    lines = []
    scored = rows.scored(record)
    for key in summary(schema):
        value = record.get(key)
        if key == "examples" and scored:
            lines.append({"": key, "value": scored})
        elif value is not None:
            lines.append({"": key, "value": human.alone(shown[key], value) if key in shown else value})
        if key == "metric" and rows.sampling(record):
            low, high = record["metric_interval"]
            lines.append({"": "95 % interval", "value": f"{human.score(low)} to {human.score(high)}"})
    for step, loss, metric in rows.validation(record)[-1:]:
        lines.append({"": "validation", "value": f"{human.score(metric)}, loss {human.score(loss)}, at step {step:,}"})
    print_table(lines, console)
    if by_position := record.get("by_position"):
        (console or Console()).print("\nmean over tokens, along the sequence:")
        print_table(along(by_position), console)


def along(by_position: dict[str, list]) -> list[dict]:
    """Figures of every position, as rows for at most PARTS parts of a sequence; positions that are all padding do not
    count."""
    length = max(map(len, by_position.values()))
    width = math.ceil(length / PARTS)
    parts = []
    for start in range(0, length, width):
        row: dict = {"positions": f"{start}-{min(start + width, length) - 1}" if width > 1 else str(start)}
        for name, values in by_position.items():
            known = [value for value in values[start : start + width] if value is not None]
            row[name] = statistics.fmean(known) if known else None
        parts.append(row)
    return parts


def _word(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
