"""The pictures of an experiment: of each of its studies what the report draws first, as SVG beside the results."""

import pathlib
from collections.abc import Iterator, Mapping

from xformers_lab import files
from xformers_lab.api.table import Table
from xformers_lab.errors import RunFailed
from xformers_lab.record import figures
from xformers_lab.report import charts, plot, rows
from xformers_lab.report.figures import slug

# Charts of a comparison that are drawn where there are some, by how their titles begin or end.
BEGIN, END = ("Tuning of",), ("beyond the trained length",)


def write(tables: Mapping[str, Table], name: str, folder: pathlib.Path) -> list[str]:
    """Write the pictures into a folder, in place of those of the same name from before; -> their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}_*.svg"):
        old.unlink()
    written = []
    for words, text in of_tables(tables):
        path = folder / f"{slug([name, words])}.svg"
        try:
            files.replace_text(path, text)
        except OSError as error:
            raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
        written.append(path.name)
    return written


def of_tables(tables: Mapping[str, Table], *, every: bool = False) -> Iterator[tuple[str, str]]:
    """(what it shows of which study, in the letters of a file's name; the picture as SVG), every one that the report of
    a study has or those that results keep."""
    for study, table in tables.items():
        if any(row.get("kind") in ("compare", "bench") for row in table.rows):
            for words, text in _pictures(table, every):
                yield slug([study, *words]), text


def _pictures(table: Table, every: bool) -> Iterator[tuple[list[str], str]]:
    looks = charts.looks(table.rows, table.varied)
    names = [look.name for look in looks]
    for group in rows.groups(table.rows, table.varied):
        drawn = charts.of_group(group, names, table.varied, figures())
        for chart in drawn if every else _chosen(drawn, group.bench):
            pane = chart.panes[-1]
            for one in pane.plots:
                title = " · ".join(filter(None, [chart.title, group.title, *chart.options(pane)]))
                yield [chart.title, group.title, *([one.x.title] if chart.wide else [])], plot.file(one, looks, title)


def _chosen(drawn: list[charts.Chart], bench: bool) -> list[charts.Chart]:
    """Of a bench time and memory; of a comparison the metric by length, and what was asked for besides."""
    if bench:
        return drawn[:2]
    asked = [chart for chart in drawn if chart.title.startswith(BEGIN) or chart.title.endswith(END)]
    return [*drawn[1:2], *asked]
