"""Columns of tables to strings: which column it is, and what stands in its cells."""

from collections.abc import Iterable

from xformers_lab.errors import UsageError, nearest
from xformers_lab.tasks._reading.layout import shown
from xformers_lab.tasks._reading.tables import Table


def pick(task: str, option: str, wanted: str | None, usual: Iterable[str], table: Table) -> str:
    """The column to use: the wanted one, else the one with a usual name; raises UsageError with the nearest."""
    known = list(table.columns)
    header = "; where the first line is no header, give header=false" if table.headed else ""
    if wanted is not None:
        if wanted not in table.columns:
            near = nearest(wanted, list(map(shown, known)), "columns")
            raise UsageError(f"{task}: {option}={wanted}: no such column: {near} (in {table.name}{header})")
        return wanted
    if (column := usual_column(usual, table)) is not None:
        return column
    hint = ""
    if table.headed and len(known) == 1 and (mark := next((mark for mark in ";\t|" if mark in known[0]), None)):
        hint = f"; are fields apart by {mark!r}? they must be by commas in .csv, by tabs in .tsv"
    raise UsageError(
        f"{task}: which column is it? give {option}=... (columns: {', '.join(map(shown, known[:8]))}) for {table.name}"
        f"{header}{hint}"
    )


def usual_column(usual: Iterable[str], table: Table) -> str | None:
    """The column with a usual name, the first of these names that there is."""
    return next((column for name in usual for column in table.columns if column.lower() == name), None)


def texts(
    task: str, option: str, wanted: str | None, usual: Iterable[str], table: Table, blank: bool = False
) -> tuple[str, list[bytes]]:
    """The name of a column of text and its cells as UTF-8; "title+body" joins columns, with a line feed between.

    Raises UsageError at the first row without text; `blank` allows empty cells.
    """
    if wanted is None or wanted in table.columns or "+" not in wanted:
        name = pick(task, option, wanted, usual, table)
        return name, _texts(task, name, table, blank)
    columns = [
        _texts(task, pick(task, option, part, (), table), table, blank=True)
        for part in map(str.strip, wanted.split("+"))
    ]
    joined = [b"\n".join(cell for cell in row if cell) for row in zip(*columns, strict=True)]
    if not blank and b"" in joined:
        row = joined.index(b"")
        raise UsageError(
            f'{task}: {table.where(row)}: columns "{wanted}", row {row + 1} is empty: every document needs text'
        )
    return wanted, joined


def _texts(task: str, column: str, table: Table, blank: bool) -> list[bytes]:
    contents = []
    for row, value in enumerate(table.values(column)):
        text = b"" if value is None and blank else _text(value)
        if text is None or not (text or blank):
            what = (
                "is missing" if value is None else "is empty" if text == b"" else f"is {type(value).__name__}, not text"
            )
            raise UsageError(
                f'{task}: {table.where(row)}: column "{column}", row {row + 1} {what}: every document needs text'
            )
        contents.append(text)
    return contents


def _text(value) -> bytes | None:
    """A cell as UTF-8; digits are text too; None where it is none."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else None
