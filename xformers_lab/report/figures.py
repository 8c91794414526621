"""Every picture of a comparison as files for papers, SVG and PDF: charts, one for each choice a reader of the page has,
attention maps and patterns."""

import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from xformers_lab import files
from xformers_lab.errors import UsageError
from xformers_lab.record import Record, figures
from xformers_lab.report import charts, maps, patterns, plot, rows, scaling

# Letters of a file's name without its ending.
MOST = 100


def write_figures(
    cells: Sequence[dict],
    varied_keys: Sequence[str],
    folder: pathlib.Path | str,
    schema: type[Record] = Record,
    scalings: Sequence[scaling.Scaling] = (),
) -> list[pathlib.Path]:
    """Write each picture as SVG and as PDF, named by what it shows, the task and what was chosen; -> the paths, in
    order. scalings: the fits of a scaling study.

    Raises UsageError where vl-convert, which makes the PDFs, is missing, and OSError where a file cannot be written.
    """
    return write_pictures(_pictures(cells, varied_keys, schema, scalings), folder)


def write_pictures(pictures: Iterable[tuple[Sequence[str], str]], folder: pathlib.Path | str) -> list[pathlib.Path]:
    """Write pictures, (words, SVG) each, as SVG and as PDF, named by their words; -> the paths, in order. Raises as
    `write_figures` does."""
    try:
        import vl_convert
    except ImportError:
        raise UsageError("figures as PDF need vl_convert: pip install vl-convert-python") from None
    folder, written = pathlib.Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for words, text in pictures:
        path = _free(folder, slug(words), written)
        files.replace_text(path, text)
        path.with_suffix(".pdf").write_bytes(vl_convert.svg_to_pdf(text))
        written += [path, path.with_suffix(".pdf")]
    return written


def _pictures(
    cells: Sequence[dict], varied_keys: Sequence[str], schema: type[Record], scalings: Sequence[scaling.Scaling]
) -> Iterator[tuple[Sequence[str], str]]:
    looks = charts.looks(cells, varied_keys, scaling.names(scalings))
    names = [look.name for look in looks]
    for group in rows.groups(cells, varied_keys):
        fits = [each for each in scalings if each.task == group.task]
        for chart in charts.of_group(group, names, varied_keys, figures(schema), fits):
            for pane in chart.panes:
                for drawn in pane.plots:
                    at = chart.options(pane)
                    words = [chart.title, group.title, *at, *([drawn.x.title] if chart.wide else [])]
                    title = " · ".join(filter(None, [chart.title, group.title, *at]))
                    yield words, plot.file(drawn, looks, title)
        weights = maps.of_group(group, names, varied_keys, budget=sys.maxsize)
        for shown in weights.shown if weights else ():
            words = ["Attention maps", group.title, shown.name]
            yield words, maps.file(shown, " · ".join(filter(None, words)))
    for figure in patterns.figures(cells):
        yield ["Pattern", figure.name], patterns.file(figure)


def slug(words: Sequence[str]) -> str:
    """Words as the name of a file: "Learning curves", "copy", "64 tokens", "steps" is learning_curves_copy_64."""
    plain = [re.sub(r"^([\d,]+) tokens$", r"\1", word).replace(",", "") for word in words if word != "steps"]
    return re.sub(r"[^a-z0-9]+", "_", " ".join(plain).lower())[:MOST].strip("_") or "figure"


def _free(folder: pathlib.Path, name: str, written: Sequence[pathlib.Path]) -> pathlib.Path:
    """A path that none of the figures has: two tasks' names may be alike but for their signs."""
    path, more = folder / f"{name}.svg", 2
    while path in written:
        path, more = folder / f"{name}_{more}.svg", more + 1
    return path
