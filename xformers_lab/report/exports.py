"""Rows as files for other programs and for papers: what commands write at --csv and so on, and a `Table` too."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from xformers_lab.errors import UsageError

if TYPE_CHECKING:
    from xformers_lab.report.scaling import Scaling


def _csv(rows: Sequence[dict], varied: Sequence[str], path: pathlib.Path, command: str, fits) -> list[pathlib.Path]:
    from xformers_lab.report import sheet

    with writing(path, "CSV"):
        sheet.write_csv(rows, varied, path)
    return [path]


def _parquet(rows: Sequence[dict], varied: Sequence[str], path: pathlib.Path, command: str, fits) -> list[pathlib.Path]:
    from xformers_lab.report import sheet

    with writing(path, "Parquet"):
        sheet.write_parquet(rows, varied, path)
    return [path]


def _latex(rows: Sequence[dict], varied: Sequence[str], path: pathlib.Path, command: str, fits) -> list[pathlib.Path]:
    from xformers_lab.report import latex

    with writing(path, "LaTeX"):
        latex.write(rows, varied, path, command)
    return [path]


def _figures(rows: Sequence[dict], varied: Sequence[str], path: pathlib.Path, command: str, fits) -> list[pathlib.Path]:
    from xformers_lab.report import figures

    with writing(path, "figures"):
        return figures.write_figures(rows, varied, path, scalings=fits)


Export = Callable[[Sequence[dict], Sequence[str], pathlib.Path, str, Sequence["Scaling"]], list[pathlib.Path]]
# Each writes rows, which `command` made, into a file, or `figures` into a folder, with the fits of a scaling study; ->
# the paths written. Raises UsageError where one cannot be written.
EXPORTS: dict[str, Export] = {
    "csv": _csv,
    "parquet": _parquet,
    "latex": _latex,
    "figures": _figures,
}


@contextlib.contextmanager
def writing(path: pathlib.Path | str, what: str) -> Iterator[None]:
    """Turn a file that cannot be written into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: cannot write the {what} there ({error.strerror})") from None
