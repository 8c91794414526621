"""One offline HTML file: findings, charts, every cell, and how it was measured.

Nothing is fetched and nothing can be: the page's Content-Security-Policy forbids every source but the style and the
script in the file, named by their hashes. Charts are SVG in the page, so that it says all it has to say without its
script, which makes a chosen series stand out. Text from rows reaches the page only escaped, by Jinja or by `plot`.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

from xformers_lab import files
from xformers_lab.record import Figure, Record, columns, figures
from xformers_lab.report import (
    aggregate,
    charts,
    findings,
    human,
    maps,
    notes,
    offline,
    patterns,
    plot,
    rows,
    scaling,
    scaling_words,
    summary,
)

HERE = pathlib.Path(__file__).parent
# Wrong examples of a series, and letters of each of their texts.
MOST_WRONG, MOST_LETTERS = 10, 400


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the table: its text, what it sorts by, and whether it is the best of its length."""

    text: str
    sort: str = ""
    number: bool = False
    best: bool = False


def write_report(
    cells: Sequence[dict],
    varied_keys: Sequence[str],
    path: pathlib.Path | str,
    *,
    title: str,
    command: str,
    said: Sequence[str] = (),
    schema: type[Record] = Record,
    scalings: Sequence[scaling.Scaling] = (),
) -> None:
    """Write the rows as one HTML file, replaced as a whole. said: what else is to be known of the whole comparison, a
    sentence each; scalings: the fits over sizes, where the rows are of a scaling study, which has no other verdict.

    Raises UsageError where jinja2 is missing, and OSError where the file cannot be written.
    """
    page_template = offline.template(HERE)
    looks = charts.looks(cells, varied_keys, scaling.names(scalings))
    left = maps.BUDGET
    groups, grouped = [], rows.groups(cells, varied_keys)
    for group in grouped:
        section = _section(group, looks, varied_keys, schema, left, len(groups), scalings)
        left -= section["map_letters"]
        groups.append(section)
    style, script = _text("page.css"), _text("page.js")
    shared, unshared = _configs(cells, varied_keys)
    page = page_template.render(
        title=human.plain(title),
        tally=_tally(cells),
        overall=[] if scalings else aggregate.sentences(grouped),
        notes=[human.plain(note) for note in (*said, *notes.of(cells))],
        groups=groups,
        drawn_map=maps.svg,
        legend=[{"name": look.name, "swatch": plot.swatch(look)} for look in looks],
        patterns=patterns.figures(cells),
        undrawn=human.listing(patterns.left_out(cells)),
        table=_table(cells, varied_keys, columns(schema), [look.name for look in looks]),
        best=_what_is_bold(cells),
        failures=_failures(cells, varied_keys),
        command=command,
        machines=_machines(cells),
        shared=shared,
        cells=unshared,
        measures=_measures(cells, columns(schema)),
        style=style,
        script=script,
        policy=offline.policy(style, [script]),
    )
    files.replace_text(pathlib.Path(path), page)


def _section(
    group: rows.Group,
    looks: Sequence[plot.Look],
    varied: Sequence[str],
    schema: type[Record],
    left: int,
    number: int,
    scalings: Sequence[scaling.Scaling],
) -> dict:
    """What the page shows of a group. left: how many letters its maps may have; number: its place on the page."""
    names = [look.name for look in looks]
    fits = [each for each in scalings if each.task == group.task]
    found = charts.of_group(group, names, varied, figures(schema), fits)
    shown = [_chart(chart, looks, f"c{number}-{at}") for at, chart in enumerate(found)]
    sentences = scaling_words.of_several(fits) if fits else findings.sentences(group)
    said = [*(note for each in fits for note in each.notes), *notes.of_group(group, sizes=bool(fits))]
    missing = [f"{rows.label(row, varied)} ({human.outcome(row)})" for row in group.rows if not rows.ok(row)]
    weights = maps.of_group(group, names, varied, left)
    tables = summary.of_group(group, looks, columns(schema))
    return {
        "title": group.title,
        "findings": [human.plain(sentence) for sentence in sentences],
        "notes": [human.plain(note) for note in dict.fromkeys(said)],
        "charts": shown,
        "tables": tables,
        "table_pick": charts.Pick("at", [table.length for table in tables], len(tables) - 1),
        "table_id": f"t{number}",
        "missing": missing[:8],
        "more": max(0, len(missing) - 8),
        "maps": weights,
        "map_letters": sum(len(each.drawn) for one in weights.shown for each in one.pictures) if weights else 0,
        "wrong": _wrong(group, varied, names),
    }


def _chart(chart: charts.Chart, looks: Sequence[plot.Look], name: str) -> dict:
    """A chart as the template has it: each pane with the classes by which it is chosen."""
    panes = []
    for pane in chart.panes:
        words = ", ".join([chart.title, *chart.options(pane)])
        drawn = [
            plot.svg(one, looks, f"{words}{': ' if chart.wide else ''}{one.x.title * chart.wide}") for one in pane.plots
        ]
        panes.append({"at": " ".join(f"p{place}-{at}" for place, at in enumerate(pane.at)), "plots": drawn})
    return {
        "name": name,
        "title": chart.title,
        "note": chart.note,
        "picks": chart.picks,
        "panes": panes,
        "wide": chart.wide,
        "heads": chart.heads,
        "lines": chart.lines,
    }


def _wrong(group: rows.Group, varied: Sequence[str], names: Sequence[str]) -> list[dict]:
    """What each series got wrong at one length, of the first seed that tells: input, right answer, what it said."""
    shown: dict[str, dict] = {}
    for row in group.rows:
        examples = row.get("wrong")
        name = rows.series(row, varied)
        if isinstance(examples, Sequence) and not isinstance(examples, str) and examples and name not in shown:
            lines = [
                [_text_of(example.get(key)) for key in ("input", "answer", "said")]
                for example in examples[:MOST_WRONG]
                if isinstance(example, Mapping)
            ]
            if lines:
                shown[name] = {"name": rows.label(row, varied), "series": names.index(name), "lines": lines}
    return sorted(shown.values(), key=lambda one: one["series"])


def _text_of(value: object) -> str:
    text = human.plain(human.NONE if value is None else value)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"


def _failures(cells: Sequence[dict], varied: Sequence[str]) -> list[dict]:
    """How each cell that failed ended; cells that ended alike are one line."""
    ended: dict[str, list[str]] = {}
    for row in cells:
        if not rows.ok(row):
            task = human.plain(rows.value(row, "task") or "")
            ended.setdefault(human.outcome(row), []).append(" · ".join(filter(None, [task, rows.label(row, varied)])))
    return [{"outcome": outcome, "cells": human.listing(names, 12)} for outcome, names in ended.items()]


def _tally(cells: Sequence[dict]) -> str:
    """30 cells: 27 ok, 1 failed, 2 out of memory."""
    counted = collections.Counter(human.status(row) for row in cells)
    parts = [f"{n} {words}" for words, n in counted.items()]
    return f"{len(cells)} cell{'' if len(cells) == 1 else 's'}" + (f": {', '.join(parts)}" if parts else "")


def _table(
    results: Sequence[dict], varied: Sequence[str], measured: Sequence[Figure], names: Sequence[str] = ()
) -> dict:
    """Every row, with a column for each varied key and each figure that some row has; rows with names of their own have
    a column for that. names: the series in the order of the legend."""
    groups = rows.groups(results, varied)
    called = any(row.get("name") for row in results)
    keys = ["task"] if any(group.task is not None for group in groups) else []
    keys += [key for key in ("pass", "seq_len") if any(rows.value(row, key) is not None for row in results)]
    keys += [key for key in rows.named_by(varied) if key not in keys]
    measured = [figure for figure in measured if any(rows.measure(row, figure.name) is not None for row in results)]
    scored = any(rows.measure(row, "metric") is not None for row in results)
    about = [name for name, words in ABOUT.items() if scored and any(words(row) for row in results)]
    guesses = list(dict.fromkeys(name for group in groups for name in group.guesses)) if scored else []
    scores = ["metric", *about, *guesses] if scored else []
    heads = [*(["row"] if called else []), *keys, *scores, *(figure.heading for figure in measured), "outcome"]
    lines = []
    for group in groups:
        best = _best(group)
        for row in group.rows:
            mine = (rows.series(row, varied), rows.length(row)) if rows.ok(row) else None
            series = rows.series(row, varied)
            cells = [Cell(series, series)] if called else []
            cells += [_key(row, key) for key in keys]
            placed = len(cells)
            if scored:
                name = human.plain(group.first("metric_name", ""))
                metric = rows.measure(row, "metric")
                cells.append(
                    _number(
                        metric,
                        f"{human.score(metric)}{_interval(row)} {name}" if metric is not None else human.NONE,
                        mine in best["metric"],
                    )
                )
                cells += [Cell(text, text) for text in (ABOUT[head](row) or human.NONE for head in about)]
                known = [group.guesses.get(name) for name in guesses]
                cells += [_number(score, human.score(score)) for score in known]
            for figure in measured:
                value = rows.measure(row, figure.name)
                cells.append(_number(value, human.in_column(figure, value), mine in best.get(figure.name, ())))
            if not rows.ok(row) and len(cells) > placed:
                # The reason is in the last column, which a narrow screen does not show at once.
                cells[placed] = _number(None, human.status(row))
            outcome = human.outcome(row)
            cells.append(Cell(outcome, outcome))
            at = names.index(series) if series in names else None
            lines.append({"cells": cells, "ok": rows.ok(row), "series": at})
    numbers = {i for i in range(len(heads)) if lines and all(line["cells"][i].number for line in lines)}
    return {"heads": [human.plain(head) for head in heads], "numbers": numbers, "lines": lines}


def _interval(row: dict) -> str:
    """The interval that scoring a sample leaves around the metric, where it is known: " [0.861, 0.931]"."""
    if not rows.sampling(row):
        return ""
    low, high = row["metric_interval"]
    return f" [{human.score(low)}, {human.score(high)}]"


def _step(row: dict) -> str:
    at = rows.scored_at(row)
    return "" if at is None else f"{at:,}"


def _shared(row: dict) -> str:
    """The metric of a tuned row under the recipe that all share, or how that run ended; empty for any other row."""
    run, value = rows.shared(row), summary.shared(row)
    if not run:
        return ""
    return human.status(run) if value is None else human.score(value)


def _validated(row: dict) -> str:
    """The last validation: "0.912 (loss 0.310) at step 200"; empty where there was none."""
    points = rows.validation(row)
    if not points:
        return ""
    step, loss, metric = points[-1]
    return f"{human.score(metric)} (loss {human.score(loss)}) at step {step:,}"


# What else the table says of a metric, by its heading.
ABOUT: Mapping[str, Callable[[dict], str]] = {
    "shared recipe": _shared,
    "tuned knobs": summary.tuned,
    "matched": summary.matched,
    "scored": rows.scored,
    "after step": _step,
    "validation": _validated,
}


def _best(group: rows.Group) -> dict[str, set]:
    """For the metric and the speed: the series and length of each point that is the best of its length."""
    lengths = {point.seq_len for point in group.points}
    measured = ("metric", group.speed)
    return {name: {(point.series, at) for at in lengths for point in group.leading(at, name)} for name in measured}


def _what_is_bold(results: Sequence[dict]) -> str:
    where = "at its pass and length" if any(row.get("kind") == "bench" for row in results) else "at its task and length"
    means = ", by the mean over the seeds" if rows.seeds(results) > 1 else ""
    tested = max((rows.tested(group) for group in rows.groups(results, ())), key=len, default="")
    return f"best {where}{means}{tested}"


def _machines(results: Sequence[dict]) -> list[dict]:
    """What measured the cells, each with a heading."""
    known = notes.machines(results)
    return [
        {
            "title": "Machine" if len(known) == 1 else f"Machine of {count} cells",
            "facts": {human.plain(key): human.plain(value) for key, value in machine.items()},
        }
        for machine, count in known
    ]


def _key(row: dict, key: str) -> Cell:
    number = human.number(rows.value(row, key))
    text = rows.shown(row, key)
    return Cell(text, text) if number is None else _number(number, text)


def _number(value: float | None, text: str, best: bool = False) -> Cell:
    return Cell(text, "" if value is None else repr(value), number=True, best=best)


def _configs(results: Sequence[dict], varied: Sequence[str]) -> tuple[str, list[dict]]:
    """The settings all cells share, as JSON, and for each cell the others."""
    leaves = [_leaves(row.get("config") or {}) for row in results]
    first = leaves[0] if leaves else {}
    shared = {k: v for k, v in first.items() if all(k in each and each[k] == v for each in leaves)}
    cells = []
    for row, settings in zip(results, leaves, strict=True):
        task, outcome = human.plain(row.get("task") or ""), human.outcome(row)
        record = {"id": row.get("id"), "run_dir": row.get("run_dir"), "outcome": outcome}
        record |= {".".join(key): value for key, value in settings.items() if key not in shared}
        record |= {} if settings else {key: rows.value(row, key) for key in varied}
        name = " · ".join(filter(None, [task, rows.label(row, varied)]))
        command = row.get("command")
        cells.append(
            {
                "name": name,
                "ok": rows.ok(row),
                "command": str(command) if command else "",
                "json": json.dumps(_clean(record), indent=1, ensure_ascii=False),
            }
        )
    return (_pretty(shared) if shared else ""), cells


def _leaves(tree: Mapping, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    leaves: dict[tuple[str, ...], object] = {}
    for key, value in tree.items():
        here = (*path, str(key))
        leaves |= _leaves(value, here) if isinstance(value, Mapping) else {here: value}
    return leaves


def _pretty(leaves: Mapping[tuple[str, ...], object]) -> str:
    tree: dict = {}
    for path, value in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = value
    return json.dumps(_clean(tree), indent=2, ensure_ascii=False)


def _measures(cells: Sequence[dict], measured: Sequence[Figure] = columns()) -> dict[str, str]:
    """How each number on the page was taken; only of what is there."""
    bench = any(row.get("kind") == "bench" for row in cells)

    def has(name: str) -> bool:
        return any(rows.measure(row, name) is not None for row in cells)

    how = {}
    if has("metric"):
        metrics = sorted({human.plain(row["metric_name"]) for row in cells if row.get("metric_name")})
        how[human.listing(metrics) or "metric"] = (
            "Measured after the step that the table names, on examples that training never saw."
        )
    if any(map(summary.tuned, cells)):
        how["tuned, shared recipe"] = (
            "Knobs are tuned on validation data, by the same grid for every variant; the test split was scored once, "
            "with the best, and once under the recipe that all share."
        )
    if any(map(summary.matched, cells)):
        how["matched"] = "What was changed so that a variant has the budget of the reference within 2 %."
    if any(rows.partly(row) for row in cells):
        how["scored"] = "Of how many examples of the test split the metric is, where a part of it was scored."
    if any(map(rows.sampling, cells)):
        how["[low, high]"] = "95 % interval of the metric over which examples were scored; part of ± and of the bars."
    if any(human.number(row.get("chance")) is not None for row in cells):
        how["chance"] = "What guessing scores on the task."
    if any(human.number(row.get("majority")) is not None for row in cells):
        how["majority"] = "The share of the most frequent class: what always saying it scores."
    if any(isinstance(data := row.get("data"), Mapping) and "unigram" in data for row in cells):
        how["unigram"] = "What guessing by how often each token comes in the training data scores."
    if any(map(rows.validation, cells)):
        how["validation"] = "The metric on the validation split at the last step at which it was taken, and its loss."
    decoded = ", in decode one of each sequence" if any(row.get("pass") == "decode" for row in cells) else ""
    words = {"step": "pass" if bench else "training step", "decoded": decoded}
    words["whole"] = "layer with its projections" if bench else "model"
    if bench:
        how["what is timed"] = (
            "A mechanism alone, on projected queries, keys and values: no projections, no position. One that is not "
            "per head is timed as a whole layer, and a note says so. Prefill: a context of seq_len read into an empty "
            "cache; decode: one more token behind it."
        )
    for figure in measured:
        if figure.name == "memory":
            how |= _memory(cells, bench)
        elif has(figure.name):
            how[figure.heading] = figure.help.format_map(words)
    if rows.seeds(cells) > 1:
        how["± and bars"] = (
            "Student-t 95 % interval of the mean over seeds. “Better”, “worse” and “not distinguishable” are of tests "
            "of differences paired by seed, with Holm's correction: an error of 5 % over each family of tests."
        )
    return how


def _memory(cells: Sequence[dict], bench: bool) -> dict[str, str]:
    """What the figures of memory count, which depends on the device."""
    timed = [row for row in cells if rows.ok(row)]
    how = {}
    if any(row.get("peak_bytes") is not None for row in timed):
        how["memory (device)"] = (
            "What XLA plans for the compiled pass: inputs, outputs and temporaries."
            if bench
            else "Peak that the accelerator's allocator reports: parameters, states and temporaries."
        )
    if any(row.get("peak_bytes") is None and row.get("temp_bytes") is not None for row in timed):
        how["memory (CPU)"] = (
            f"Temporary buffers XLA plans for the compiled {'pass' if bench else 'training step'}; inputs and "
            "parameters are not counted, nor what its YNNPACK kernels take for themselves, so that 0 B may be far "
            "from the truth."
        )
    return how


def _clean(value: object) -> object:
    """Values that JSON has: infinities and NaN, and what is neither text, number nor container, as text."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
