"""Rows as tables of a paper: LaTeX with booktabs, one table for each task, seeds averaged.

Plain LaTeX with `\\usepackage{booktabs}` sets it. Text of other people's making is escaped, so that none of it is a
command, and what the standard fonts have no sign for is written as its code point.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence

from xformers_lab import files
from xformers_lab.record import Figure, figures
from xformers_lab.report import human, intervals, rows

PLUS_MINUS = " $\\pm$ "
UNMATCHED = "$^{\\dagger}$"
_ESCAPED = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "{''}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    # Behind the end of a line these are its options.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    # Two of these are another sign.
    "-": "-{}",
    ",": ",{}",
    human.NONE: "--",
    "\N{MIDDLE DOT}": r"\textperiodcentered{}",
    "\N{MICRO SIGN}": r"$\mu$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
}


def write(cells: Sequence[dict], varied: Sequence[str], path: pathlib.Path | str, command: str) -> None:
    """Write the tables; `command` made the rows. Raises OSError where the file cannot be written."""
    groups = rows.groups(cells, varied)
    head = [f"% {comment(command)}", r"% \usepackage{booktabs}"]
    labels: dict[str, int] = {}
    tables = [_table(group, varied, _label(group, labels)) for group in groups]
    files.replace_text(pathlib.Path(path), "\n".join([*head, *tables]) + "\n")


def escaped(text: object) -> str:
    """Text as LaTeX sets it, on one line."""
    return "".join(map(_sign, human.plain(text)))


def comment(text: str) -> str:
    """Text behind a %, of which none can end the line."""
    return re.sub(r"[^\x20-\x7e]", lambda match: f"[U+{ord(match[0]):04X}]", human.plain(text))


def _sign(sign: str) -> str:
    if sign in _ESCAPED:
        return _ESCAPED[sign]
    # The accented letters that the first fonts of LaTeX have, which read the file as UTF-8.
    if " " <= sign <= "~" or ("\u00c0" <= sign <= "\u00ff" and sign not in "\u00d0\u00d7\u00de\u00f0\u00f7\u00fe"):
        return sign
    return f"{{[}}U+{ord(sign):04X}{{]}}"


def _table(group: rows.Group, varied: Sequence[str], label: str) -> str:
    names = [key for key in rows.named_by(varied) if key not in rows.PLACES] or ["attention"]
    lengths, several = group.lengths, rows.seeds(group.rows) > 1
    measured = _measured(group)
    scored = any(point.estimate("metric") for point in group.points)
    heads = [escaped(name) for name in names]
    heads += ["length"] if len(lengths) > 1 else []
    tuned = any(isinstance(row.get("shared"), Mapping) for row in group.rows)
    if scored:
        metric = escaped(group.first("metric_name") or "metric")
        heads += [f"{metric} (shared recipe)", f"{metric} (tuned)"] if tuned else [metric]
    heads += [escaped(figure.heading or figure.name) for figure in measured]
    marked = {id(point) for at in {point.seq_len for point in group.points} for point in _told_apart(group, at)}
    lines, before = [], None
    for point in sorted(group.points, key=lambda point: point.seq_len or 0):
        if before is not None and point.seq_len != before:
            lines.append(r"\midrule")
        before = point.seq_len
        first = (point.rows or point.failed)[0]
        about = [escaped(rows.shown(first, name)) for name in names]
        if isinstance(first.get("name"), str):  # a baseline, say, which its keys do not tell
            about = [escaped(first["name"]), *["--"] * (len(names) - 1)]
        if any(_unmatched(row) for row in (*point.rows, *point.failed)):
            about[0] += UNMATCHED
        about += [f"{point.seq_len:,}".replace(",", "{,}") if point.seq_len else "--"] if len(lengths) > 1 else []
        numbers = []
        if scored:
            numbers += [_shared(point)] if tuned else []
            numbers.append(_metric(point, bold=id(point) in marked))
        numbers += [_number(point, figure) for figure in measured]
        if not point.rows:
            said = rf"\emph{{{escaped(human.status(first))}}}"
            numbers = [said, *[""] * (len(numbers) - 1)] if numbers else []
        lines.append(" & ".join([*about, *numbers]) + r" \\")
    form = "l" * len(names) + "r" * (len(heads) - len(names))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_caption(group, several, bool(marked))}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{{form}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _measured(group: rows.Group) -> list[Figure]:
    """The figures of a paper's table: what the page charts, and the parameters, where a row has them."""
    wanted = [figure for figure in figures() if figure.heading and (figure.chart or figure.key == "parameters")]
    if group.bench:
        wanted = [figure for figure in wanted if figure.key != "tokens_per_second"]
    else:
        wanted = [figure for figure in wanted if figure.key != "seconds_median"]
    return [figure for figure in wanted if any(point.estimate(figure.name) for point in group.points)]


def _told_apart(group: rows.Group, seq_len: int | None) -> list[rows.Point]:
    """The points to set in bold: those that lead by the metric, where an interval says so. With one seed and a whole
    test split there is none."""
    ranked = group.at(seq_len, "metric")
    tested = all((estimate := point.estimate("metric")) is not None and estimate.half is not None for point in ranked)
    return group.leading(seq_len, "metric") if tested else []


def _metric(point: rows.Point, *, bold: bool) -> str:
    estimate = point.estimate("metric")
    if estimate is None:
        return "--"
    text = _with_interval(estimate)
    return rf"\textbf{{{text}}}" if bold else text


def _with_interval(estimate: intervals.Estimate) -> str:
    half = "" if estimate.half is None else PLUS_MINUS + escaped(human.score(estimate.half))
    return _signed(human.score(estimate.mean)) + half


def _shared(point: rows.Point) -> str:
    """The metric of the same seeds under the recipe that all variants share."""
    estimate = point.shared.estimate("metric")
    return _with_interval(estimate) if estimate else "--"


def _unmatched(row: dict) -> bool:
    """Whether a row could not be given the budget that the others have."""
    matched = row.get("matched")
    return isinstance(matched, Mapping) and matched.get("ok") is False


def _number(point: rows.Point, figure: Figure) -> str:
    estimate = point.estimate(figure.name)
    return "--" if estimate is None else _signed(human.in_column(figure, estimate.mean))


def _signed(text: str) -> str:
    """A number with a minus, not a hyphen."""
    return f"$-${escaped(text[1:])}" if text.startswith("-") else escaped(text)


def _caption(group: rows.Group, several: bool, bold: bool) -> str:
    """What the table shows, of which task, over how many seeds, and what is marked."""
    measured = escaped(group.first("metric_name") or "Cost")
    words = [f"{measured} on {escaped(group.title)}" if not group.bench else f"Cost: {escaped(group.title)}"]
    if len(group.lengths) == 1:
        words[0] += f" at {group.lengths[0]} tokens"
    counts = sorted({len(point.rows) for point in group.points if point.rows})
    if several and counts:
        span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        words.append(rf"Mean over {span} seeds $\pm$ half the 95\,\% interval (Student's t)")
    elif any(map(rows.sampling, group.rows)):
        words.append(r"One seed; $\pm$ is half the 95\,\% interval of the sample of test examples")
    elif not group.bench:
        words.append("One seed, so no interval")
    chance = human.number(group.first("chance"))
    if chance is not None and not group.bench:
        words.append(f"Chance: {escaped(human.score(chance))}")
    if any(map(_unmatched, group.rows)):
        words.append(f"{UNMATCHED}: does not meet the budget of the others")
    if bold:
        words.append(f"Bold: best at its length{escaped(rows.tested(group))}")
    return ". ".join(words) + "."


def _label(group: rows.Group, taken: dict[str, int]) -> str:
    name = "tab:" + (re.sub(r"[^a-z0-9]+", "-", group.title.lower()).strip("-")[:40] or "table")
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}-{taken[name]}"
