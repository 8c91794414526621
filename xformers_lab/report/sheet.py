"""Rows as CSV, for spreadsheets and other programs: a line for each cell, the keys of rows as its head."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence

from xformers_lab import files
from xformers_lab.record import PLACES, Record, keys
from xformers_lab.report import human, rows


def write_csv(
    cells: Sequence[dict], varied_keys: Sequence[str], path: pathlib.Path | str, schema: type[Record] = Record
) -> None:
    """Write where each row stands and what was measured; what is no single value (a curve, the config) is left out.

    Raises OSError where the file cannot be written.
    """
    placed = [key for key in dict.fromkeys([*PLACES, *rows.named_by(varied_keys)]) if _known(cells, key)]
    measured = [key for key in keys(schema) if key not in placed and _known(cells, key)]
    page = io.StringIO()
    sheet = csv.writer(page, lineterminator="\n")
    sheet.writerow(_text(key) for key in [*placed, *measured])
    for row in cells:
        sheet.writerow([*(_text(rows.value(row, key)) for key in placed), *(_text(row.get(key)) for key in measured)])
    files.replace_text(pathlib.Path(path), page.getvalue())


def _known(cells: Sequence[dict], key: str) -> bool:
    """Whether some row has it, and every row that has it a single value."""
    values = [value for value in (rows.value(row, key) for row in cells) if value is not None]
    return bool(values) and not any(isinstance(value, Mapping | list | tuple) for value in values)


def _text(value: object) -> object:
    """A value as it is; text on one line, and none that a spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = human.plain(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
