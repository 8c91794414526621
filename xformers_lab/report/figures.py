"""Every chart of a comparison as files for papers: SVG and PDF, one for each choice a reader of the page has."""

import pathlib
import re
from collections.abc import Sequence

from xformers_lab import files
from xformers_lab.errors import UsageError
from xformers_lab.record import Record, figures
from xformers_lab.report import charts, plot, rows

# Letters of a file's name without its ending.
MOST = 100


def write_figures(
    cells: Sequence[dict], varied_keys: Sequence[str], folder: pathlib.Path | str, schema: type[Record] = Record
) -> list[pathlib.Path]:
    """Write each plot as SVG and as PDF, named by what it shows, the task and what was chosen; -> the paths, in order.

    Raises UsageError where vl-convert, which makes the PDFs, is missing, and OSError where a file cannot be written.
    """
    try:
        import vl_convert
    except ImportError:
        raise UsageError("figures as PDF need vl_convert: pip install vl-convert-python") from None
    folder, looks = pathlib.Path(folder), charts.looks(cells, varied_keys)
    names = [look.name for look in looks]
    folder.mkdir(parents=True, exist_ok=True)
    written: list[pathlib.Path] = []
    for group in rows.groups(cells, varied_keys):
        for chart in charts.of_group(group, names, varied_keys, figures(schema)):
            for pane in chart.panes:
                for drawn in pane.plots:
                    at = chart.options(pane)
                    words = [chart.title, group.title, *at, *([drawn.x.title] if chart.wide else [])]
                    title = " · ".join(filter(None, [chart.title, group.title, *at]))
                    path = free(folder, slug(words), written)
                    text = plot.file(drawn, looks, title)
                    files.replace_text(path, text)
                    path.with_suffix(".pdf").write_bytes(vl_convert.svg_to_pdf(text))
                    written += [path, path.with_suffix(".pdf")]
    return written


def slug(words: Sequence[str]) -> str:
    """Words as the name of a file: "Learning curves", "copy", "64 tokens", "steps" is learning_curves_copy_64."""
    plain = [re.sub(r"^([\d,]+) tokens$", r"\1", word).replace(",", "") for word in words if word != "steps"]
    return re.sub(r"[^a-z0-9]+", "_", " ".join(plain).lower())[:MOST].strip("_") or "figure"


def free(folder: pathlib.Path, name: str, written: Sequence[pathlib.Path]) -> pathlib.Path:
    """A path that none of the figures has: two tasks' names may be alike but for their signs."""
    path, more = folder / f"{name}.svg", 2
    while path in written:
        path, more = folder / f"{name}_{more}.svg", more + 1
    return path
