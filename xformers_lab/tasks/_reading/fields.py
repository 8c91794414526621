"""The text of a csv, tsv or json file to rows of fields. Every field is a string; errors name the line."""

import csv
import io
import json
import pathlib
import re
from typing import Any, NamedTuple

from xformers_lab.errors import UsageError
from xformers_lab.tasks._reading import lines
from xformers_lab.tasks._reading.layout import shown

_LONGEST = 2**31 - 1  # bytes of a field
# Stands for a carriage return that ends no line, which the csv module takes for the end of one.
_RETURN = "\ufdd0"


class Rows(NamedTuple):
    """names: of the columns; rows: a list of fields each, None where a cell is empty; at: the line where each begins;
    notes: what was done to them."""

    names: list[str]
    rows: list[list]
    at: list[int]
    lines: int
    notes: list[str]


def from_csv(task: str, file: pathlib.Path, content: bytes, header: bool) -> Rows:
    """Fields with commas between, quoted by the rules of RFC 4180; raises UsageError where these are broken."""
    lines.split(task, file, content)
    text = lines.decoded(task, file, content)
    if lone := re.search("\r(?!\n)", text):
        text = text[: lone.start()] + re.sub("\r(?!\n)", _RETURN, text[lone.start() :])
    before = csv.field_size_limit(_LONGEST)
    # Lines end at line feeds alone; a blank line is no row.
    reader, records, at, ends = csv.reader(io.StringIO(text, newline="\n"), strict=True), [], [], []
    line = 1
    try:
        for record in reader:
            if len(record) > 1 or "".join(record).strip():
                records.append(record)
                at.append(line)
                ends.append(reader.line_num)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{task}: {file} cannot be read: line {line}: a quoted field that begins there does not end before a comma "
            f"or at the end of a line ({error}): double the quotes within fields, or take them away"
        ) from None
    finally:
        csv.field_size_limit(before)
    if lone:
        records = [[field.replace(_RETURN, "\r") for field in record] for record in records]
    _check_width(task, file, records, at, header, "comma")
    _check_swallowed(task, file, text.split("\n"), records[header:], at[header:], ends[header:])
    return _rows(task, file, records, at, reader.line_num, header, [])


def from_tsv(task: str, file: pathlib.Path, content: bytes, header: bool) -> Rows:
    """Fields with tabs between. A quote is a letter like any other, but where every cell of a column is quoted."""
    split = lines.split(task, file, content)
    lines.decoded(task, file, content)
    pairs = [(line.decode().split("\t"), at) for at, line in enumerate(split, 1) if line.strip()]
    records, at = [record for record, _ in pairs], [at for _, at in pairs]
    _check_width(task, file, records, at, header, "tab")
    body, notes = records[header:], []
    for column in range(len(records[0]) if body else 0):
        cells = [record[column] for record in body]
        if all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
            for record in records:
                if len(record[column]) > 1 and record[column][0] == record[column][-1] == '"':
                    record[column] = record[column][1:-1].replace('""', '"')
            notes.append(f"{file.name}: every cell of column {column + 1} is quoted: the quotes are taken off")
    return _rows(task, file, records, at, len(split), header, notes)


def from_json(task: str, file: pathlib.Path, content: bytes) -> Rows:
    """An array of objects, an object of arrays, or an object in each line."""
    text = lines.decoded(task, file, content)
    if not text.strip():
        raise UsageError(f"{task}: {file} cannot be read: it is empty")
    try:
        whole = json.loads(text)
    except RecursionError:
        raise UsageError(f"{task}: {file} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return from_jsonl(task, file, content)
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f"{task}: {file} cannot be read: {where}") from None
    if isinstance(whole, dict) and len(whole) == 1:  # {"data": [...]}
        (only,) = whole.values()
        whole = only if isinstance(only, list) and only and all(isinstance(row, dict) for row in only) else whole
    if isinstance(whole, dict) and whole and all(isinstance(column, list) for column in whole.values()):
        lengths = {len(column) for column in whole.values()}
        if len(lengths) > 1:
            raise UsageError(f"{task}: {file} cannot be read: its arrays are of different lengths")
        whole = [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]
    elif isinstance(whole, dict):
        whole = [whole]
    if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
        raise UsageError(f"{task}: {file} cannot be read: it must be an array of objects, or an object in each line")
    return _of_objects(task, file, whole, [], text.count("\n") + (not text.endswith("\n")))


def from_jsonl(task: str, file: pathlib.Path, content: bytes) -> Rows:
    """An object in each line; blank lines are no rows."""
    split = lines.split(task, file, content)
    lines.decoded(task, file, content)
    objects, at = [], []
    for number, line in enumerate(split, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise UsageError(f"{task}: {file} cannot be read: line {number}: it is nested too deeply") from None
        except ValueError as error:
            raise UsageError(f"{task}: {file} cannot be read: line {number}: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{task}: {file} cannot be read: line {number} must be an object, {{...}}")
        objects.append(row)
        at.append(number)
    return _of_objects(task, file, objects, at, len(split))


def _of_objects(task: str, file: pathlib.Path, objects: list[dict[str, Any]], at: list[int], many: int) -> Rows:
    if not objects:
        raise UsageError(f"{task}: {file} cannot be read: it has no rows")
    names = list(dict.fromkeys(name for row in objects for name in row))
    return Rows(names, [[row.get(name) for name in names] for row in objects], at, many, [])


def _rows(
    task: str, file: pathlib.Path, records: list[list[str]], at: list[int], many: int, header: bool, notes: list[str]
) -> Rows:
    """Records with the names of their columns; those of a file without header are 0, 1, ..."""
    numbers = [str(number) for number in range(len(records[0]))]
    names = [name.strip() or number for name, number in zip(records[0], numbers, strict=True)] if header else numbers
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(
            f'{task}: {file} cannot be read: line {at[0]} names two columns "{shown(twice)}": rename one, or, where it '
            "is no header, give header=false"
        )
    if len(records) == 1 and header:
        raise UsageError(
            f"{task}: {file} cannot be read: line {at[0]} is all that it holds, a header without rows: add rows, or, "
            "where it is no header, give header=false"
        )
    body = [[cell or None for cell in record] for record in records[header:]]
    return Rows(names, body, at[header:], many, notes)


def _check_width(
    task: str, file: pathlib.Path, records: list[list[str]], at: list[int], header: bool, separator: str
) -> None:
    """Raises UsageError at the first row with more or fewer fields than the first."""
    if not records:
        raise UsageError(f"{task}: {file} cannot be read: it is empty")
    width = len(records[0])
    for record, line in zip(records, at, strict=True):
        if len(record) != width:
            first = "the header" if header else f"line {at[0]}"
            mend = " (quote a field that holds a comma)" if separator == "comma" else ""
            raise UsageError(
                f"{task}: {file} cannot be read: line {line} has {len(record)} fields, {first} has {width}: every row "
                f"needs as many, with a {separator} between{mend}"
            )


def _check_swallowed(
    task: str, file: pathlib.Path, split: list[str], records: list[list[str]], at: list[int], ends: list[int]
) -> None:
    """Raises UsageError at a quoted field over several lines of which each looks like a row of its own.

    So it does where it has as many commas as a row and, in one column, what rows of one line have there, or numbers as
    these do: a quote that nobody meant to open a field swallows rows up to the next quote.
    """
    width = len(records[0]) if records else 0
    spread = [number for number, (first, last) in enumerate(zip(at, ends, strict=True)) if last > first]
    if not spread or width < 2:
        return
    usual: list[set[str]] = [set() for _ in range(width)]
    for record, first, last in zip(records, at, ends, strict=True):
        if last == first:
            for column, field in zip(usual, record, strict=True):
                column.add(field)
    for number in spread:
        within = [line.removesuffix("\r").split(",") for line in split[at[number] - 1 : ends[number]]]
        if all(len(line) == width for line in within) and any(
            all(line[column] in usual[column] for line in within)
            or (usual[column] and all(map(str.isdecimal, [*usual[column], *(line[column] for line in within)])))
            for column in range(width)
        ):
            raise UsageError(
                f"{task}: {file} cannot be read: line {at[number]}: a quoted field that begins there goes on to line "
                f"{ends[number]} and swallows what look like rows: double the quotes within fields, or take them away"
            )
