"""What the commands that look around print: catalogues, one choice, the kit's verdicts, one run."""

import json
import math
import statistics

from rich.console import Console
from rich.text import Text

from xformers_lab import spec
from xformers_lab.check import SAME
from xformers_lab.record import Record, figures, keys, summary
from xformers_lab.report import human, rows
from xformers_lab.report.listing import print_listing
from xformers_lab.terminal import markup, visible

# Into how many parts of a sequence its figures are gathered.
PARTS = 8


def print_page(page: dict, console: Console | None = None) -> None:
    """One choice: its docstring, options, cost and drawing."""
    console = console or Console()
    console.print(f"[bold]{markup(page['name'])}[/bold]  ({markup(page['shelf'])})\n", highlight=False, emoji=False)
    for paragraph in page["about"].partition("Options:")[0].strip().split("\n\n"):
        for words in _lines(paragraph):
            console.print(Text(visible(words)), soft_wrap=not console.is_terminal)
        console.print()
    if page["options"]:
        print_listing([{"option": o["name"], "value": o["value"], "": o["help"]} for o in page["options"]], console)
        console.print()
    if "cost" in page:
        cost, can = page["cost"], [word for word, yes in page["can"].items() if yes]
        console.print(
            f"one head, {page['length']} positions: {cost['flops']:,.0f} matmul FLOPs forward, "
            f"largest array {cost['memory']:,.0f} numbers, decoding keeps {cost['state']:,.0f} numbers"
        )
        for platform, what in page.get("kernels", {}).items():
            console.print(Text(f"on {platform}: {what}"), soft_wrap=not console.is_terminal)
        cannot = [word for word, yes in page["can"].items() if not yes]
        console.print(f"can: {', '.join(can) or '-'}; cannot: {', '.join(cannot) or '-'}")
    if "pattern" in page:
        console.print(f"\nrows are queries, columns the keys they see ({page['drawn']}):")
        if console.is_terminal and len(page["pattern"][0]) > console.width:
            console.print(f"(cut: it is {len(page['pattern'][0])} columns wide)")
        for line in page["pattern"]:
            console.print(Text(line), no_wrap=True, overflow="crop", soft_wrap=not console.is_terminal)


def print_task(page: dict, console: Console | None = None) -> None:
    """One task: its sizes, splits, metric and data, and an example with its answer."""
    console = console or Console()
    say = lambda words: console.print(Text(visible(words)), soft_wrap=not console.is_terminal)
    better = "higher" if page["higher_is_better"] else "lower"
    per = "one answer for each position" if page["target"] == "token" else "one answer for each sequence"
    sizes = {name: "drawn without end" if size is None else f"{size:,}" for name, size in page["splits"].items()}
    rows = {
        "title": page["title"],
        "seq_len": str(page["seq_len"]),
        "tokens": f"{page['vocab']:,} different" if page["vocab"] else "none: inputs are numbers",
        "answers": f"{page['outputs']:,} {'classes' if page['vocab'] else 'numbers'}, {per}",
        "metric": f"{page['metric']}, {better} is better; guessing scores {page['chance']:.4g}",
        "models": ", ".join(page["models"]),
        "examples": "; ".join(f"{name}: {size}" for name, size in sizes.items()),
    } | {key: value if isinstance(value, str) else json.dumps(value) for key, value in page["data"].items()}
    console.print(Text(visible(page["task"]), "bold"), soft_wrap=not console.is_terminal)
    console.print()
    print_listing([{"": key, "what it is": visible(value)} for key, value in rows.items()], console)
    for line in page["reading"]:
        say(line)
    example = page["example"]
    console.print()
    say(f"example {example['number']} of {example['split']}")
    for name, text in example["shown"].items():
        lines = text.split("\n")
        say(f"{name}:" if len(lines) > 1 else f"{name}: {text}")
        for line in lines if len(lines) > 1 else ():
            say(line)


def _lines(paragraph: str) -> list[str]:
    """A paragraph of a docstring on one line, to be wrapped anew; an indented line, as of a formula, and one of a list
    of sentences is a line of its own."""
    lines = paragraph.splitlines()
    if all(line.endswith(".") for line in lines):
        return lines
    joined: list[str] = []
    for line in lines:
        if joined and not line.startswith(" ") and not joined[-1].startswith(" "):
            joined[-1] += " " + line
        else:
            joined.append(line)
    return joined


def print_checks(reports: list[dict], console: Console | None = None) -> None:
    """The kit's verdict on each mechanism, every property that failed, with what to look for, and those that say
    nothing about it; why, where there is one report alone."""
    console = console or Console()
    for report in reports:
        verdict = "[green]passes[/green]" if report["passed"] else "[red]fails[/red]"
        skipped = report.get("skipped") or []
        names = ", ".join(skip["property"] for skip in skipped)
        without = f"; not applicable: {markup(names)}" if skipped and len(reports) > 1 else ""
        console.print(
            f"{markup(report['name'])} {verdict}, {report['seconds']:.0f} s{without}", highlight=False, emoji=False
        )
        repeats: dict[str, list[str]] = {}
        for failure in report["failed"]:
            if failure["message"].startswith(SAME):
                repeats.setdefault(failure["message"].removeprefix(SAME), []).append(failure["property"])
        for failure in report["failed"]:
            if failure["message"].startswith(SAME):
                continue
            also = repeats.get(failure["property"], [])
            words = failure["message"] + (f"; the same in {human.listing(also, 3)}" if also else "")
            console.print(f"  [red]{markup(failure['property'])}[/red]: {markup(words)}", highlight=False, emoji=False)
        for skip in skipped if len(reports) == 1 else ():
            console.print(
                f"  not applicable: {markup(skip['property'])} ({markup(skip['reason'])})", highlight=False, emoji=False
            )


def print_record(record: dict, console: Console | None = None, schema: type[Record] = Record) -> None:
    """The record of one run or evaluation: what its summary tells."""
    shown = {figure.key: figure for figure in figures(schema) if not figure.exact}
    lines = [{"": "seq_len", "value": f"{record['seq_len']:,}"}] if "seq_len" in record else []
    for name, (was, now) in (record.get("changed") or {}).items():
        lines.append({"": name, "value": f"{spec.show(now)}, trained with {spec.show(was)}"})
    for key in summary(schema):
        value = record.get(key)
        if value is not None:
            lines.append({"": key, "value": human.alone(shown[key], value) if key in shown else value})
        if key == "metric":
            lines += [{"": name, "value": words} for name, words in _of_metric(record).items() if words]
    lines += [{"": f"generated: {name}", "value": value} for name, value in (record.get("generated") or {}).items()]
    print_listing(lines, console)
    if by_position := record.get("by_position"):
        (console or Console()).print("\nmean over tokens, along the sequence:")
        print_listing(along(by_position), console)
    if by_length := record.get("by_length"):
        (console or Console()).print("\nat other lengths:")
        print_scores([{"metric_name": record.get("metric_name"), **row} for row in by_length], console)


def print_scores(records: list[dict], console: Console | None = None) -> None:
    """Scores of one run at several lengths or with several values of options, a line each."""
    known, told = keys(), summary()
    has = lambda key: any(record.get(key) is not None for record in records)
    beside = [figure for figure in figures() if figure.key in told and has(figure.key)]
    told_of = lambda figure, value: "-" if value is None else human.in_column(figure, value)
    lines = []
    for record in records:
        interval = record.get("metric_interval")
        asked = {key: value for key, value in record.items() if key not in known}
        line = {key: value if key == "seq_len" else spec.show(value) for key, value in asked.items()}
        line |= {
            record.get("metric_name") or "metric": _scored(record.get("metric")),
            "95 % interval": "-" if interval is None else f"{_scored(interval[0])} to {_scored(interval[1])}",
            **{figure.heading: told_of(figure, record.get(figure.key)) for figure in beside},
            "examples": rows.scored(record) or "-",
        }
        if perplexity := _perplexity(record):
            line["perplexity"] = perplexity
        lines.append(line | ({"reason": record["reason"]} if record.get("reason") else {}))
    print_listing(lines, console)


def _scored(value: float | None) -> str:
    return "-" if value is None else human.score(value)


def _perplexity(record: dict) -> str:
    perplexity = human.number((record.get("aux") or {}).get("perplexity"))
    return "" if perplexity is None else human.score(perplexity)


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
        "perplexity": _perplexity(record),
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
