"""One offline HTML file: findings, charts, every cell, and how it was measured.

Nothing is fetched and nothing can be: the page's Content-Security-Policy forbids every source but the styles and the
two scripts in the file, named by their hashes. Vega runs on its expression interpreter, so "unsafe-eval" is not needed.
Text from rows reaches the page only through Jinja's escaping, or as JSON without "<" that no browser takes for code.
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

from xformers_lab.errors import UsageError
from xformers_lab.report import charts, findings, human, notes, patterns, rows

HERE = pathlib.Path(__file__).parent

# Heading, name in the row, how it is written, what it says.
COLUMNS = (
    ("tokens/s", "tokens_per_second", human.count),
    ("time", "seconds_median", human.duration),
    ("least time", "seconds_min", human.duration),
    ("compile", "compile_seconds", human.duration),
    ("memory", "memory", human.size),
    ("state", "state_bytes", human.size),
    ("layers/token", "computation", human.significant),
    ("FLOPs", "flops", human.count),
    ("parameters", "parameters", human.count),
    ("loss", "loss", human.score),
    ("steps", "steps", human.count),
    ("time ~", "exponent", human.power),
    ("FLOPs ~", "exponent_flops", human.power),
    ("memory ~", "exponent_bytes", human.power),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the table: its text, what it sorts by, and whether it is the best of its length."""

    text: str
    sort: str = ""
    number: bool = False
    best: bool = False


def write_report(
    found: Sequence[dict],
    varied_keys: Sequence[str],
    path: pathlib.Path | str,
    *,
    title: str,
    command: str,
) -> None:
    """Write the rows as one HTML file, replaced as a whole.

    Raises UsageError where vl-convert or jinja2 is missing, and OSError where the file cannot be written.
    """
    try:
        import jinja2

        library = _library()
    except ImportError as error:
        raise UsageError(f"the HTML report needs {error.name}: pip install jinja2 vl-convert-python") from None
    path = pathlib.Path(path)
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = rows.order(found, varied_keys)
    drawn = []
    groups = [_section(group, names, varied_keys, drawn) for group in rows.groups(found, varied_keys)]
    style, script, library = (
        _text("page.css"),
        _text("page.js"),
        _library(),
    )
    shared, cells = _configs(found, varied_keys)
    page = pages.get_template("page.html.jinja").render(
        title=human.plain(title),
        tally=_tally(found),
        notes=[human.plain(note) for note in notes.of(found)],
        groups=groups,
        legend=charts.look(names),
        patterns=patterns.figures(found),
        table=_table(found, varied_keys),
        best=_what_is_bold(found),
        command=command,
        machines=_machines(found),
        shared=shared,
        cells=cells,
        measures=_measures(found),
        style=style,
        script=script,
        library=library,
        policy=_policy(style, [library, script]),
        specs=_json(drawn),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _section(group: rows.Group, names: Sequence[str], varied: Sequence[str], drawn: list[dict]) -> dict:
    """What the page shows of a group; its specs are appended to `drawn` and named by their place there."""
    shown = []
    for chart in charts.of_group(group, names, varied):
        shown.append({"title": chart.title, "note": chart.note, "lengths": chart.lengths, "number": len(drawn)})
        drawn.append(chart.spec)
    missing = [f"{rows.label(row, varied)} ({human.outcome(row)})" for row in group.rows if not rows.ok(row)]
    return {
        "title": group.title,
        "findings": findings.sentences(group),
        "charts": shown,
        "missing": missing[:8],
        "more": max(0, len(missing) - 8),
    }


def _tally(found: Sequence[dict]) -> str:
    """30 cells: 27 ok, 1 failed, 2 out of memory."""
    counted = collections.Counter(human.status(row) for row in found)
    parts = [f"{n} {words}" for words, n in counted.items()]
    return f"{len(found)} cell{'' if len(found) == 1 else 's'}" + (f": {', '.join(parts)}" if parts else "")


def _table(found: Sequence[dict], varied: Sequence[str]) -> dict:
    """Every row, with a column for each varied key and each measure that some row has."""
    groups = rows.groups(found, varied)
    keys = ["task"] if any(group.task is not None for group in groups) else []
    keys += [key for key in ("pass", "seq_len") if any(rows.value(row, key) is not None for row in found)]
    keys += [key for key in rows.named_by(varied) if key not in keys]
    measured = [column for column in COLUMNS if any(rows.measure(row, column[1]) is not None for row in found)]
    scored = any(rows.measure(row, "metric") is not None for row in found)
    heads = [*keys, *(["metric", "chance"] if scored else []), *(column[0] for column in measured), "outcome"]
    lines = []
    for group in groups:
        best = _best(group)
        for row in group.rows:
            mine = (rows.series(row, varied), rows.length(row)) if rows.ok(row) else None
            cells = [_key(row, key) for key in keys]
            if scored:
                name = human.plain(group.first("metric_name", ""))
                metric = rows.measure(row, "metric")
                cells.append(
                    _number(
                        metric,
                        f"{human.score(metric)} {name}" if metric is not None else human.NONE,
                        mine in best["metric"],
                    )
                )
                chance = human.number(group.first("chance"))
                cells.append(_number(chance, human.score(chance)))
            for _, measure, form in measured:
                value = rows.measure(row, measure)
                cells.append(_number(value, form(value), mine in best.get(measure, ())))
            if not rows.ok(row) and len(cells) > len(keys):
                # The reason is in the last column, which a narrow screen does not show at once.
                cells[len(keys)] = _number(None, human.status(row))
            outcome = human.outcome(row)
            cells.append(Cell(outcome, outcome))
            lines.append({"cells": cells, "ok": rows.ok(row)})
    numbers = {i for i in range(len(heads)) if lines and all(line["cells"][i].number for line in lines)}
    return {"heads": [human.plain(head) for head in heads], "numbers": numbers, "lines": lines}


def _best(group: rows.Group) -> dict[str, set]:
    """For the metric and the speed: the series and length of each point that is the best of its length."""
    lengths = {point.seq_len for point in group.points}
    measured = ("metric", group.speed)
    return {name: {(point.series, at) for at in lengths for point in group.leading(at, name)} for name in measured}


def _what_is_bold(found: Sequence[dict]) -> str:
    where = "at its pass and length" if any(row.get("kind") == "bench" for row in found) else "at its task and length"
    tested = ", by the mean over the seeds; of the metric also what the paired 95 % interval does not tell from it"
    return f"best {where}" + (tested if rows.seeds(found) > 1 else "")


def _machines(found: Sequence[dict]) -> list[dict]:
    """What measured the cells, each with a heading."""
    known = notes.machines(found)
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


def _configs(found: Sequence[dict], varied: Sequence[str]) -> tuple[str, list[dict]]:
    """The settings all cells share, as JSON, and for each cell what is its own."""
    leaves = [_leaves(row.get("config") or {}) for row in found]
    shared = {k: v for k, v in (leaves[0] if leaves else {}).items() if all(k in own and own[k] == v for own in leaves)}
    cells = []
    for row, own in zip(found, leaves, strict=True):
        task, told = human.plain(row.get("task") or ""), human.outcome(row)
        record = {"id": row.get("id"), "run_dir": row.get("run_dir"), "outcome": told}
        record |= {".".join(key): value for key, value in own.items() if key not in shared}
        record |= {} if own else {key: rows.value(row, key) for key in varied}
        name = " · ".join(filter(None, [task, rows.label(row, varied)]))
        cells.append(
            {"name": name, "ok": rows.ok(row), "json": json.dumps(_clean(record), indent=1, ensure_ascii=False)}
        )
    return (_pretty(shared) if shared else ""), cells


def _leaves(tree: Mapping, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    found: dict[tuple[str, ...], object] = {}
    for key, value in tree.items():
        here = (*path, str(key))
        found |= _leaves(value, here) if isinstance(value, Mapping) else {here: value}
    return found


def _pretty(leaves: Mapping[tuple[str, ...], object]) -> str:
    tree: dict = {}
    for path, value in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = value
    return json.dumps(_clean(tree), indent=2, ensure_ascii=False)


def _measures(found: Sequence[dict]) -> dict[str, str]:
    """How each number on the page was taken; only of what is there."""
    bench = any(row.get("kind") == "bench" for row in found)

    def has(name: str) -> bool:
        return any(rows.measure(row, name) is not None for row in found)

    said = {}
    if has("metric"):
        metrics = sorted({human.plain(row["metric_name"]) for row in found if row.get("metric_name")})
        said[human.listing(metrics) or "metric"] = "Measured after training, on examples that training never saw."
    if any(human.number(row.get("chance")) is not None for row in found):
        said["chance"] = "What guessing scores on the task."
    what = "pass" if bench else "training step"
    if bench:
        said["what is timed"] = (
            "A mechanism alone, on projected queries, keys and values: no projections, no position. One that is not "
            "per head is timed as a whole layer, and a note says so. Prefill: a context of seq_len read into an empty "
            "cache; decode: one more token behind it."
        )
    if has("tokens_per_second"):
        decoded = ", in decode one of each sequence" if any(row.get("pass") == "decode" for row in found) else ""
        said["tokens/s"] = f"Tokens of one batch{decoded} over the median time of a {what}; compiling is left out."
    if has("seconds_median"):
        said["time"] = f"Median over the timed runs of one {what}, after compiling; the least is beside it."
    if has("compile_seconds"):
        said["compile"] = "Time to trace, lower and compile, once for each cell; a hit of JAX's cache counts as it is."
    if any(rows.ok(row) and row.get("peak_bytes") is not None for row in found):
        said["memory (device)"] = (
            "What XLA plans for the compiled pass: inputs, outputs and temporaries."
            if bench
            else "Peak that the accelerator's allocator reports: parameters, states and temporaries."
        )
    if any(rows.ok(row) and row.get("peak_bytes") is None and row.get("temp_bytes") is not None for row in found):
        said["memory (CPU)"] = (
            f"Temporary buffers XLA plans for the compiled {what}; inputs and parameters are not counted, nor what its "
            "YNNPACK kernels take for themselves, so that 0 B may be far from the truth."
        )
    if has("state_bytes"):
        said["state"] = "What decoding keeps of a context of seq_len tokens, for the whole batch."
    if has("computation"):
        said["layers/token"] = "Layers that a token passed through, on average."
    if has("flops"):
        said["FLOPs"] = (
            f"Of the matrix products of one {what}, a multiply and an add as two; counted in the program, not read "
            "from the hardware."
        )
    if has("parameters"):
        said["parameters"] = "Of the whole layer with its projections." if bench else "Of the whole model."
    if has("exponent"):
        said["~"] = "How a cost grows with the length N: slope of a line through its logarithm (of time: the least)."
    if rows.seeds(found) > 1:
        said["± and bars"] = (
            "Student-t 95 % interval of the mean over seeds. “Not distinguishable”: the paired interval of the "
            "difference holds zero; it is not widened for the number of comparisons."
        )
    return said


def _policy(style: str, scripts: Sequence[str]) -> str:
    hashes = " ".join(f"'{_hash(script)}'" for script in scripts)
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src {hashes}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: object) -> str:
    """JSON for a data block: without "<" it cannot end the block, and without U+2028/9 it is a line of any script."""
    text = json.dumps(_clean(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _clean(value: object) -> object:
    """Values that JSON has: infinities and NaN, and what is neither text, number nor container, as text."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script: it takes a second or two to make."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
