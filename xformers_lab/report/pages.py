"""What the commands that look around print: catalogues, one choice, the kit's verdicts, one run."""

import math
import statistics

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xformers_lab.record import Record, figures, summary
from xformers_lab.report import human, rows
from xformers_lab.report.table import put

# Into how many parts of a sequence its figures are gathered.
PARTS = 8


def print_table(rows: list[dict], console: Console | None = None) -> None:
    """Any rows with the same keys, as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in keys:
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*(escape(_word(row.get(key, ""))) for key in keys))
    put(table, console or Console())


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
    for key in summary(schema):
        value = record.get(key)
        if value is not None:
            lines.append({"": key, "value": human.alone(shown[key], value) if key in shown else value})
        if key == "metric":
            lines += [{"": name, "value": words} for name, words in _of_metric(record).items() if words]
    print_table(lines, console)
    if by_position := record.get("by_position"):
        (console or Console()).print("\nmean over tokens, along the sequence:")
        print_table(along(by_position), console)


def _of_metric(record: dict) -> dict[str, str]:
    """What else a summary tells of a metric, by name; empty words for what the record does not say."""
    step, majority, validated = (
        rows.scored_at(record),
        human.number(record.get("majority")),
        rows.validation(record)[-1:],
    )
    low, high = record["metric_interval"] if rows.sampling(record) else (None, None)
    return {
        "95 % interval": "" if low is None else f"{human.score(low)} to {human.score(high)}",
        "examples": rows.scored(record),
        "after step": "" if step is None else f"{step:,}",
        "majority": "" if majority is None else human.score(majority),
        "validation": "".join(
            f"{human.score(metric)}, loss {human.score(loss)}, at step {at:,}" for at, loss, metric in validated
        ),
    }


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
