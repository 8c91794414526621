"""Data sets of the `datasets` library: on the hub, or saved in a folder. It is imported here and nowhere else."""

import pathlib
from collections.abc import Callable

from xformers_lab.errors import UsageError
from xformers_lab.tasks import Split
from xformers_lab.tasks._reading import names
from xformers_lab.tasks._reading.account import Part
from xformers_lab.tasks._reading.tables import Source, Table

# What `datasets` leaves in a folder that it saved.
_SAVED = ("dataset_dict.json", "dataset_info.json")


def is_saved(path: pathlib.Path) -> bool:
    """Whether a folder is one that `datasets` saved."""
    return any((path / name).is_file() for name in _SAVED)


def from_folder(task: str, path: pathlib.Path) -> Source:
    """The tables of each split of a folder that `datasets` saved; raises UsageError."""
    _import(task)
    import datasets

    return _source(task, f"path={path}", lambda: datasets.load_from_disk(str(path)))


def from_hub(task: str, name: str, config: str | None) -> Source:
    """The tables of each split of a data set on the hub; raises UsageError where it cannot be had."""
    _import(task)
    import datasets

    if not name or pathlib.Path(name).exists():
        raise UsageError(f"{task}: hub={name} is {'a local path: use path=' + name if name else 'empty'}")
    return _source(task, f"hub={name}", lambda: datasets.load_dataset(name, config))


def _import(task: str) -> None:
    """Import `datasets` and keep it quiet; raises UsageError where it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{task}: hub data are read by the datasets library: pip install datasets") from error
    # What goes wrong is said once, in our message.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def _source(task: str, where: str, load: Callable) -> Source:
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
        return Source({None: [_table(where, "whole", loaded)]}, [])
    tables: dict[Split | None, list[Table]] = {}
    ignored = []
    for name, table in loaded.items():
        split = names.split_of(str(name))
        if split is None:
            ignored.append(str(name))
        else:
            tables.setdefault(split, []).append(_table(where, str(name), table))
    if not tables:
        raise UsageError(f"{task}: {where} has no train, validation or test split (it has {', '.join(ignored)})")
    return Source(tables, [f"ignored: split {', '.join(ignored)}"] if ignored else [])


def _table(where: str, name: str, table) -> Table:
    import datasets

    columns = {column: table[column] for column in table.column_names}
    classes = {
        column: feature.names for column, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    part = Part((name,), len(table), None, None)
    return Table(f"{where}, split {name}", columns, len(table), (), classes, False, part)
