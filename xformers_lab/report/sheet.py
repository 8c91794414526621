"""Rows as CSV and Parquet, for spreadsheets and other programs: a line for each cell, the keys of rows as its head.

A value within a value has both keys in its head, `matched.changed.dim.from`. What has no place in one line (a curve, an
attention map, the config) is left out.
"""

import csv
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xformers_lab import files
from xformers_lab.record import PLACES, Record, keys
from xformers_lab.report import human, rows

# Keys whose values are nested and still written, each value under a head of its own.
NESTED = ("matched", "shared", "tuning", "by_length", "aux", "machine", "metric_interval")
# What pairs of numbers are, by their key; "" for all others.
PAIRS = {"metric_interval": ("low", "high"), "": ("from", "to")}
LARGEST_WHOLE = 2**63


def write_csv(
    cells: Sequence[dict], varied_keys: Sequence[str], path: pathlib.Path | str, schema: type[Record] = Record
) -> None:
    """Write where each row stands and what was measured. Raises OSError where the file cannot be written."""
    columns = columns_of(cells, varied_keys, schema)
    page = io.StringIO()
    sheet = csv.writer(page, lineterminator="\n")
    sheet.writerow(_text(head) for head in columns)
    for line in zip(*columns.values(), strict=True):
        sheet.writerow(map(_text, line))
    files.replace_text(pathlib.Path(path), page.getvalue())


def write_parquet(
    cells: Sequence[dict], varied_keys: Sequence[str], path: pathlib.Path | str, schema: type[Record] = Record
) -> None:
    """The columns of `write_csv`, each of one type: truth values, whole numbers of 64 bits, floats, else text; null for
    what a row has not. Raises OSError where the file cannot be written."""
    import pyarrow  # here, since it takes long to import and few ask for it
    from pyarrow import parquet

    columns = columns_of(cells, varied_keys, schema)
    table = pyarrow.table({human.plain(head): pyarrow.array(*_typed(values)) for head, values in columns.items()})
    page = pyarrow.BufferOutputStream()
    parquet.write_table(table, page)
    files.replace_bytes(pathlib.Path(path), page.getvalue().to_pybytes())


def columns_of(
    cells: Sequence[dict], varied_keys: Sequence[str], schema: type[Record] = Record
) -> dict[str, list[Any]]:
    """Head -> the value of each row, None where it has none: first what places and names the rows, then what was
    measured. A head that no row has a value for is left out."""
    lines: list[dict[str, Any]] = []
    placed = list(dict.fromkeys([*PLACES, *rows.named_by(varied_keys)]))
    measured = [key for key in keys(schema) if key not in placed]
    for row in cells:
        line = {}
        for key in placed:
            line |= {key: rows.value(row, key)}
        for key in measured:
            line |= dict(_flat(key, row.get(key))) if key in NESTED else {key: row.get(key)}
        lines.append({head: value for head, value in line.items() if value is not None and _single(value)})
    known = {head: None for line in lines for head in line}
    first = {key: at for at, key in enumerate([*placed, *measured])}
    # Heads of one key stand together, though a row before may have had none of them.
    heads = sorted(known, key=lambda head: first.get(head, first.get(head.partition(".")[0], len(first))))
    return {head: [line.get(head) for line in lines] for head in heads}


def _flat(head: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(head, value) of every single value within a value."""
    key = head.rpartition(".")[2]
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{head}.{name}", inner)
    elif isinstance(value, list | tuple) and len(value) == 2 and all(map(_single, value)) and key != "knobs":
        yield from zip((f"{head}.{name}" for name in PAIRS.get(key, PAIRS[""])), value, strict=True)
    elif key == "knobs" and isinstance(value, list | tuple):
        yield head, ", ".join(map(str, value))
    elif key == "by_length" and isinstance(value, list | tuple):
        for each in value:
            if isinstance(each, Mapping) and each.get("seq_len") is not None:
                rest = {name: inner for name, inner in each.items() if name != "seq_len"}
                yield from _flat(f"{head}.{each['seq_len']}", rest)
    elif _single(value):
        yield head, value


def _single(value: object) -> bool:
    return not isinstance(value, Mapping | list | tuple)


def _typed(values: list[Any]) -> tuple[list[Any], str]:
    """A column's values as one type, and what pyarrow calls it."""
    there = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in there):
        return values, "bool"
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in there)
    if numbers and all(isinstance(value, int) and -LARGEST_WHOLE <= value < LARGEST_WHOLE for value in there):
        return values, "int64"
    if numbers:
        return [None if value is None else float(value) for value in values], "float64"
    return [None if value is None else human.plain(value) for value in values], "string"


def _text(value: object) -> object:
    """A value as it is; text on one line, and none that a spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = human.plain(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
