"""Tables from disk: which files of a folder are tables of which split, and their columns."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xformers_lab.errors import UsageError
from xformers_lab.tasks import Split
from xformers_lab.tasks._reading import compressed, fields, files, layout, lines, names
from xformers_lab.tasks._reading.account import Part

KINDS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}


class Table(NamedTuple):
    """The columns of a table, and how to speak of its rows.

    name: of the file or data set; columns: by name, values that `values` reads; at: the line that each row begins in,
    empty where rows have none; classes: of columns of class numbers, the names of the classes; headed: its first line
    was taken for a header; notes: what was done to its cells.
    """

    name: str
    columns: Mapping[str, Any]
    rows: int
    at: Sequence[int] = ()
    classes: Mapping[str, Sequence[str]] = {}
    headed: bool = False
    part: Part = Part()
    notes: Sequence[str] = ()

    def values(self, column: str) -> list:
        """The values of a column, None where a cell is empty."""
        values = self.columns[column]
        return values.to_pylist() if hasattr(values, "to_pylist") else list(values[:])

    def where(self, row: int) -> str:
        """How a row, counted from 0, is called in a message."""
        return f"{self.name}, line {self.at[row]}" if self.at else self.name


class Source(NamedTuple):
    """Tables by split (None: of no split, or all in one) and what is to be said of them."""

    tables: dict[Split | None, list[Table]]
    notes: list[str]


def is_table(file: pathlib.Path) -> bool:
    """Whether the name of a file is that of a table."""
    return layout.ending(file) in KINDS


def of_folder(folder: pathlib.Path) -> list[pathlib.Path]:
    """The tables below a folder that holds no other data, what only speaks of data aside; or whose splits they are."""
    data = [file for file in files.below(folder) if not layout.is_about(file) and layout.ending(file)]
    return data if all(map(is_table, data)) else of_splits(folder)


def of_splits(folder: pathlib.Path) -> list[pathlib.Path]:
    """The tables below a folder, if some in it are train data and others are held out, and no other file is either."""
    all_files = [file for file in files.below(folder) if not layout.is_about(file)]
    tables = [file for file in all_files if is_table(file)]
    splits = {names.split_of(layout.bare(file)) for file in tables if file.parent == folder} - {None}
    others = [file for file in all_files if not (is_table(file) or layout.is_beside(file)) and _split(folder, file)]
    return tables if "train" in splits and len(splits) > 1 and not others else []


def read(task: str, path: pathlib.Path, chosen: list[pathlib.Path], header: bool = True) -> Source:
    """The tables of a file, or of these files of a folder, by the split that their names or folders speak of.

    Where some are of a split, the others are ignored; raises UsageError where these could be data of the same kind, and
    where files are of several kinds.
    """
    if path.is_file():
        table = _table(task, path, header, path.name)
        return Source({None: [table]}, list(table.notes))
    splits: dict[pathlib.Path, Split | None] = {file: _split(path, file) for file in chosen}
    placed = [file for file in chosen if splits[file]] or chosen
    kinds = {KINDS[layout.ending(file)] for file in placed}
    if len(kinds) > 1:
        raise UsageError(f"{task}: path={path} mixes {' and '.join(sorted(kinds))} files: keep one kind")
    tables: dict[Split | None, list[Table]] = {}
    name = lambda file: file.relative_to(path).as_posix()
    for file in placed:
        tables.setdefault(splits[file], []).append(_table(task, file, header, name(file)))
    for of_split in tables.values() if kinds <= {"csv", "tsv"} else ():
        for one in of_split[1:]:
            if set(one.columns) != set(of_split[0].columns):
                first = of_split[0].name
                raise UsageError(
                    f"{task}: path={path}: {one.name} has other columns than {first}: keep tables of one kind"
                )
    others = [file for file in chosen if file not in placed]
    columns = {tuple(table.columns) for part in tables.values() for table in part}
    for file in others:
        if KINDS[layout.ending(file)] in kinds and _columns(task, file, header) in columns:
            raise UsageError(
                f"{task}: path={path}: {file} is of no split beside files that are: "
                "name each like train.csv, validation.csv, test.csv, or none"
            )
    notes = [note for part in tables.values() for table in part for note in table.notes]
    apart = [file for file in files.below(path) if file not in chosen]
    return Source(tables, notes + layout.ignored(path, [*others, *apart]))


def _split(root: pathlib.Path, file: pathlib.Path) -> Split | None:
    folder = file.parent.relative_to(root).name
    return names.split_of(layout.bare(file)) or (names.split_of(folder) if folder else None)


def _columns(task: str, file: pathlib.Path, header: bool) -> tuple[str, ...]:
    """The names of the columns of a table; none where it cannot be read."""
    try:
        return tuple(_table(task, file, header, file.name).columns)
    except UsageError:
        return ()


def _table(task: str, file: pathlib.Path, header: bool, name: str) -> Table:
    kind = KINDS[layout.ending(file)]
    if not header and kind in ("json", "parquet"):
        raise UsageError(f"{task}: header=false is for csv and tsv files, path={file} is {kind}")
    if kind == "parquet":
        return _parquet(task, file, name)
    content = lines.text_bytes(task, file)
    if kind == "json":
        of_lines = layout.ending(file) != ".json"
        rows = (fields.from_jsonl if of_lines else fields.from_json)(task, file, content)
    else:
        rows = (fields.from_csv if kind == "csv" else fields.from_tsv)(task, file, content, header)
    columns = {column: [row[at] for row in rows.rows] for at, column in enumerate(rows.names)}
    part = Part((name,), len(rows.rows), rows.lines, len(content))
    return Table(str(file), columns, len(rows.rows), rows.at, {}, kind != "json" and header, part, rows.notes)


def _parquet(task: str, file: pathlib.Path, name: str) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"{task}: {file}: parquet is read by pyarrow, which comes with datasets: pip install datasets"
        ) from error
    content = compressed.content(task, file)
    try:
        opened = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        groups = [opened.metadata.row_group(at) for at in range(opened.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > compressed.LIMIT:
            raise UsageError(f"{task}: {file} expands to more than {compressed.LIMIT:,} bytes: take a part of it")
        table = opened.read()
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{task}: {file} cannot be read: {type(error).__name__}: {reason}") from error
    if not table.num_rows:
        raise UsageError(f"{task}: {file} cannot be read: it has no rows")
    columns = dict(zip(table.column_names, table.columns, strict=True))
    part = Part((name,), table.num_rows, None, len(content))
    return Table(str(file), columns, table.num_rows, (), _classes(table.schema.metadata or {}), False, part)


def _classes(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of classes that `datasets` writes into a parquet file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
