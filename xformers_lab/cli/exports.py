"""Files that commands with rows write beside what they print: CSV, Parquet, LaTeX, and the charts as SVG and PDF."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator, Sequence

from xformers_lab.cli.command import argument
from xformers_lab.errors import UsageError
from xformers_lab.terminal import visible

EXPORTS = [
    argument("--csv", path="file", metavar="FILE", help="write the rows as CSV"),
    argument("--parquet", path="file", metavar="FILE", help="write the rows as Parquet, with the type of each column"),
    argument("--latex", path="file", metavar="FILE", help="write the table for a paper, which wants booktabs"),
    argument(
        "--figures",
        path="folder",
        metavar="DIR",
        help="write every picture of the report into a folder, as SVG and as PDF",
    ),
]


def export(chosen: argparse.Namespace, rows: list[dict], varied: Sequence[str], command: str) -> None:
    """Write the rows into each file that the command names for them; `command` made them. Raises UsageError where one
    cannot be written."""
    if chosen.csv is not None:
        from xformers_lab.report import sheet

        with writing(chosen.csv, "CSV"):
            sheet.write_csv(rows, varied, chosen.csv)
    if chosen.parquet is not None:
        from xformers_lab.report import sheet

        with writing(chosen.parquet, "Parquet"):
            sheet.write_parquet(rows, varied, chosen.parquet)
    if chosen.latex is not None:
        from xformers_lab.report import latex

        with writing(chosen.latex, "LaTeX"):
            latex.write(rows, varied, chosen.latex, command)
    if chosen.figures is not None:
        from xformers_lab.report import figures

        with writing(chosen.figures, "figures"):
            paths = figures.write_figures(rows, varied, chosen.figures)
        print(visible(f"figures: {len(paths)} files in {chosen.figures}"), file=sys.stderr)


@contextlib.contextmanager
def writing(path: pathlib.Path | str, what: str) -> Iterator[None]:
    """Turn a file that cannot be written into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: cannot write the {what} there ({error.strerror})") from None
