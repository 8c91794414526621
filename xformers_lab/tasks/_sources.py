"""Documents from disk or from a hub: files, folders, and tables read by the `datasets` library.

`datasets` is imported where it is needed and nowhere else: plain files work without it. Every failure to read becomes
a UsageError that names the option and says what to give instead.
"""

import difflib
import os
import pathlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TypeVar

from xformers_lab.errors import UsageError, nearest
from xformers_lab.tasks import SPLITS, Split, _splits

KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
_SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# What `datasets` leaves in a folder that it saved.
_SAVED = ("dataset_dict.json", "dataset_info.json")

# The columns of a table by name; `[:]` reads one.
Columns = Mapping[str, Sequence]
_Document = TypeVar("_Document")


def existing(task: str, path: str) -> pathlib.Path:
    """The file or folder behind an option; raises UsageError with what stands in its place."""
    if not path:
        raise UsageError(f"{task}: path= is empty: give a file or a folder")
    place = pathlib.Path(path).expanduser()
    try:
        if place.is_file() or place.is_dir():
            return place
        if place.exists():
            raise UsageError(f"{task}: path={path} is neither a file nor a folder")
        parent = next(folder for folder in place.parents if folder.is_dir())
        names = [entry.name for entry in sorted(parent.iterdir())]
    except OSError as error:
        raise UsageError(f"{task}: path={path} cannot be opened: {error.strerror}") from error
    near = nearest(place.name, difflib.get_close_matches(place.name, names, 8, 0.0), f"in {parent}")
    raise UsageError(f"{task}: path={path} does not exist: {near or 'give a file or a folder'}")


def files(folder: pathlib.Path, skip: Container[str] = ()) -> list[pathlib.Path]:
    """Every regular file below a folder but hidden ones and those in folders to skip, ordered by relative path."""
    paths = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and name not in skip]
        paths += [pathlib.Path(root, name) for name in names if not name.startswith(".")]
    paths = [file for file in paths if file.is_file()]
    return sorted(paths, key=lambda file: file.relative_to(folder).as_posix())


def read(task: str, file: pathlib.Path) -> bytes:
    """The bytes of a file; raises UsageError where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{task}: cannot read {file}: {error.strerror}") from error


def is_table(path: pathlib.Path) -> bool:
    """Whether `datasets` reads this: a table file, a folder of nothing but tables, or a folder that it saved."""
    if path.is_file():
        return _kind(path) is not None
    return any((path / name).is_file() for name in _SAVED) or bool(_tables(path))


def tables(task: str, path: pathlib.Path, header: bool = True) -> dict[Split | None, Columns]:
    """The columns of each split of a table file or folder; None where a table is of no named split."""
    import_datasets(task)
    import datasets

    if any((path / name).is_file() for name in _SAVED):
        return _columns(task, f"path={path}", lambda: datasets.load_from_disk(str(path)))
    groups: dict[str, list[str]] = {}
    for file in [path] if path.is_file() else _tables(path):
        split = None if path.is_file() else split_name(file.name.split(".")[0]) or split_name(file.parent.name)
        groups.setdefault(split or "whole", []).append(str(file))
    if "whole" in groups and len(groups) > 1:
        raise UsageError(
            f"{task}: path={path}: {groups['whole'][0]} is of no split beside files that are: "
            "name each like train.csv, validation.csv, test.csv, or none"
        )
    endings = {_ending(pathlib.Path(file)) for group in groups.values() for file in group}
    # A tsv is a csv to the library, but one separator serves all files.
    kinds = {(KINDS[ending], ending == ".tsv") for ending in endings}
    if len(kinds) > 1:
        mixed = " and ".join(ending[1:] for ending in sorted(endings))
        raise UsageError(f"{task}: path={path} mixes {mixed} files: keep one kind")
    ((kind, tabs),) = kinds
    options: dict = {}
    if kind == "csv":
        first = pathlib.Path(next(iter(groups.values()))[0])
        options["sep"] = "\t" if tabs else ","
        if not header:
            options |= {"header": None, "column_names": _numbered(task, first, options["sep"])}
    if not header and kind != "csv":
        raise UsageError(f"{task}: header=false is for csv and tsv files, path={path} is {kind}")
    return _columns(task, f"path={path}", lambda: datasets.load_dataset(str(kind), data_files=groups, **options))


def hub(task: str, name: str, config: str | None) -> dict[Split | None, Columns]:
    """The columns of each split of a data set on the hub; raises UsageError where it cannot be had."""
    import_datasets(task)
    import datasets

    if not name or pathlib.Path(name).exists():
        raise UsageError(f"{task}: hub={name} is {'a local path: use path=' + name if name else 'empty'}")
    return _columns(task, f"hub={name}", lambda: datasets.load_dataset(name, config))


def import_datasets(task: str) -> None:
    """Import `datasets` and keep it quiet; raises UsageError where it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{task}: tables and hub data are read by the datasets library: pip install datasets"
        ) from error
    # What goes wrong is said once, in our message.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def split_name(name: str) -> Split | None:
    """The split that a file, folder or split name means: the first word of "train-00000-of-00001", "valid", "dev"."""
    return _SPLIT_NAMES.get(name.lower().replace("_", "-").split("-")[0])


def pick(task: str, option: str, wanted: str | None, usual: Iterable[str], columns: Columns) -> str:
    """The column to use: the wanted one, else the one with a usual name; raises UsageError with the nearest."""
    known = list(columns)
    if wanted is not None:
        if wanted not in columns:
            raise UsageError(f"{task}: {option}={wanted}: no such column: {nearest(wanted, known, 'columns')}")
        return wanted
    for name in usual:
        for column in known:
            if column.lower() == name:
                return column
    raise UsageError(f"{task}: which column is it? give {option}=... (columns: {', '.join(known)})")


def texts(task: str, column: str, values: Sequence, blank: bool = False) -> list[bytes]:
    """A column of text as UTF-8 bytes; raises UsageError at the first row without text; `blank` allows empty text."""
    contents = []
    for row, value in enumerate(values[:], 1):
        if not isinstance(value, str) or not (value or blank):
            what = (
                "is missing" if value is None else "is empty" if value == "" else f"is {type(value).__name__}, not text"
            )
            raise UsageError(f'{task}: column "{column}", row {row} {what}: every document needs text')
        contents.append(value.encode("utf-8", "surrogatepass"))
    return contents


def resplit(
    task: str, documents: Mapping[Split | None, list[_Document]], content: Callable[[_Document], bytes]
) -> dict[Split, list[_Document]]:
    """Train, validation and test: a split that the source has is kept, one that it lacks is taken from train by a hash.

    Documents that say the same thing fall in the same split. Where the source is in one piece, all three come from it.
    """
    if len(documents) > 1 and "train" not in documents:
        raise UsageError(
            f"{task}: there are {' and '.join(map(str, documents))} data but no train data: add a train split"
        )
    (pool,) = [documents["train"]] if "train" in documents else documents.values()
    named: dict[Split, list[_Document]] = {
        split: documents[split] for split in SPLITS[1:] if split in documents and len(documents) > 1
    }
    parts: dict[Split, list[_Document]] = {split: list(named.get(split, [])) for split in SPLITS}
    for document in pool:
        split = _splits.of_bytes(content(document))
        parts["train" if split in named else split].append(document)
    return parts


def _columns(task: str, where: str, load: Callable) -> dict[Split | None, Columns]:
    """Run a loader of `datasets` and take its splits by our names; the errors of the library become one message."""
    import datasets

    try:
        loaded = load()
    except ConnectionError as error:
        raise UsageError(
            f"{task}: {where} is not available offline and was not fetched before: connect this machine, "
            f"or give a local copy with path=... (a folder, or a csv, json or parquet file)"
        ) from error
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UsageError(f"{task}: {where} cannot be read: {type(error).__name__}: {reason}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {"whole": loaded}
    named: dict[Split | None, Columns] = {}
    for name, table in loaded.items():
        split = split_name(str(name))
        if split is not None or name == "whole":
            named.setdefault(split, {column: table[column] for column in table.column_names})
    if not named:
        raise UsageError(
            f"{task}: {where} has no train, validation or test split (it has {', '.join(map(str, loaded))})"
        )
    return named


def _kind(file: pathlib.Path) -> str | None:
    return KINDS.get(_ending(file))


def _ending(file: pathlib.Path) -> str:
    return pathlib.Path(file.name.removesuffix(".gz")).suffix.lower()


def _tables(folder: pathlib.Path) -> list[pathlib.Path]:
    """The tables of a folder that holds little else (a read-me does not count), or none."""
    tables = [file for file in files(folder) if file.suffix.lower() not in (".md", "")]
    return tables if all(_kind(file) for file in tables) else []


def _numbered(task: str, file: pathlib.Path, separator: str) -> list[str]:
    """Names "0", "1", ... for the columns of a csv file without a header."""
    import pandas

    try:
        return [str(number) for number in range(pandas.read_csv(file, sep=separator, header=None, nrows=1).shape[1])]
    except ValueError as error:
        raise UsageError(f"{task}: path={file} cannot be read: {error}") from error
