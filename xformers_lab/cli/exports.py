"""Files that commands with rows write beside what they print: CSV, Parquet, LaTeX, and the charts as SVG and PDF."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xformers_lab.cli.command import argument
from xformers_lab.report import exports
from xformers_lab.terminal import visible

if TYPE_CHECKING:
    from xformers_lab.report.scaling import Scaling

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


def export(
    chosen: argparse.Namespace,
    rows: Sequence[dict],
    varied: Sequence[str],
    command: str,
    fits: "Sequence[Scaling]" = (),
) -> None:
    """Write the rows into each file that the command names for them; `command` made them; fits: of a scaling study.
    Raises UsageError where one cannot be written."""
    for flag in EXPORTS:
        if (path := getattr(chosen, flag.attribute)) is not None:
            paths = exports.EXPORTS[flag.attribute](rows, varied, pathlib.Path(path), command, fits)
            if flag.path == "folder":
                print(visible(f"{flag.attribute}: {len(paths)} files in {path}"), file=sys.stderr)
