"""Text: classify documents by their bytes."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split, Task, _sources, _splits

_DEFAULT_HUB = "stanfordnlp/imdb"
_TEXTS = ("text", "sentence", "review", "content", "document", "body", "description")
_LABELS = ("label", "labels", "class", "category", "sentiment", "target", "y")
# The folder of unlabelled documents in IMDb's archive.
_UNLABELLED = "unsup"
# What benchmarks put for the labels of a test split that they keep secret; such a split is none.
_HIDDEN = -1


Label = int | str


class Text(Task):
    """Byte-level document classification, the Text task of Long Range Arena (Tay et al., 2020, arXiv 2011.04006).

    By default IMDb reviews from the hub (Maas et al., 2011); or a csv, json or parquet file (or a folder of them named
    by split, such as train.csv and test.csv) with a text and a label column; or a folder with a sub-folder of text
    files for each class; or one with such folders in train/ and test/, like IMDb's archive. A document is its bytes
    + 1, cut off at seq_len, padded at the end with 0. Test data that the source sets apart stay test data: validation
    is a tenth of the training documents (Long Range Arena validated on its test data). Without them, documents are
    split 80 / 10 / 10. Documents go by a hash of their whole text, so copies stay together; a copy of a test document
    is dropped from the training data. A split whose labels are hidden (all -1, as in GLUE) counts as missing.

    Options:
        path: a csv, json or parquet file, or a folder (none: the hub)
        hub: a data set on the hub (none, and no path: stanfordnlp/imdb)
        config: which configuration of the hub data set
        text_column: the column that holds the text (none: one called text, sentence, review, ...)
        label_column: the column that holds the class (none: one called label, class, sentiment, ...)
        header: whether the first line of a csv names its columns (false: they are called 0, 1, 2, ...)

    Metric: accuracy. Chance: 1 / classes.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    vocab = 257

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        hub: str | None = None,
        config: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        header: bool = True,
    ):
        super().__init__(setting)
        if path is not None and hub is not None:
            raise ValueError(f"path={path} and hub={hub} are two sources: give one")
        if config is not None and path is not None:
            raise ValueError(f"config={config} is for a hub data set: give hub=... instead of path=..., or drop it")
        if not header and path is None:
            raise ValueError("header=false is for a csv file: give path=... too, or drop it")
        self.corpus = load(path, hub, config, text_column, label_column, header)
        for split, (_, labels) in self.corpus.splits.items():
            if not len(labels):
                sizes = ", ".join(f"{name}: {len(answers)}" for name, (_, answers) in self.corpus.splits.items())
                raise ValueError(f"the {split} split of {self.corpus.source} is empty ({sizes}): give more documents")
        self.outputs = len(self.corpus.classes)
        self.chance = 1 / self.outputs
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def batch(self, split: Split, step: int) -> Batch:
        """Documents in an order shuffled anew for every pass over the split: each comes once a pass."""
        count = self.setting.batch
        passes, places = np.divmod(np.arange(step * count, (step + 1) * count), self.examples(split))
        chosen = [self._order(split, int(one))[place] for one, place in zip(passes, places, strict=True)]
        return self.take(split, np.array(chosen))

    def examples(self, split: Split) -> int:
        return len(self.corpus.splits[split][1])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        (documents, labels), length = self.corpus.splits[split], self.setting.seq_len
        inputs = np.zeros((len(numbers), length), np.int32)
        for row, document in enumerate(numbers):
            content = np.frombuffer(documents[document][:length], np.uint8)
            inputs[row, : len(content)] = content + np.int32(1)
        return Batch(inputs, labels[numbers], np.ones(len(numbers), np.float32), inputs > 0)

    def describe(self) -> dict:
        """Source, classes, documents per split, copies dropped, share of the most frequent class, sha256 of it all."""
        sizes = {f"{split}_documents": len(labels) for split, (_, labels) in self.corpus.splits.items()}
        counts = np.bincount(self.corpus.splits["test"][1])
        fingerprint = hashlib.sha256()
        for documents, labels in self.corpus.splits.values():
            for document, label in zip(documents, labels, strict=True):
                fingerprint.update(b"%d %d " % (label, len(document)) + document)
        return {
            "source": self.corpus.source,
            "classes": list(self.corpus.classes),
            **sizes,
            "copies_dropped": self.corpus.dropped,
            "majority": round(float(counts.max() / counts.sum()), 4),
            "sha256": fingerprint.hexdigest(),
        }

    def _shuffled(self, split: Split, one: int) -> np.ndarray:
        return _splits.generator(self.setting.seed, split, one).permutation(len(self.corpus.splits[split][1]))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Labelled documents: for each split their bytes and, as indices into `classes`, their labels (n,) int32."""

    source: str
    classes: tuple[str, ...]
    splits: dict[Split, tuple[list[bytes], np.ndarray]]
    dropped: int


@functools.lru_cache(maxsize=4)
def load(
    path: str | None,
    hub: str | None,
    config: str | None,
    text_column: str | None,
    label_column: str | None,
    header: bool,
) -> Corpus:
    """Read, check and split the documents; once per process."""
    if path is None:
        source = hub if hub is not None else _DEFAULT_HUB
        columns = _sources.hub("text", source, config)
        return _corpus(f"hub {source}", _labelled(columns, text_column, label_column))
    place = _sources.existing("text", path)
    if _sources.is_table(place):
        return _corpus(path, _labelled(_sources.tables("text", place, header), text_column, label_column))
    if text_column is not None or label_column is not None or not header:
        raise UsageError(
            f"text: path={path} is no table: text_column, label_column and header are for csv, json and parquet"
        )
    if place.is_file():
        kinds = ", ".join(sorted(_sources.KINDS))
        raise UsageError(f'text: path={path}: unknown kind "{place.suffix}": give a file of kind {kinds}, or a folder')
    return _corpus(path, _foldered(place))


def _foldered(root: pathlib.Path) -> dict[Split | None, list[tuple[bytes, Label]]]:
    """The documents of a folder, with the name of their sub-folder as the class."""
    parts = {_sources.split_name(folder.name): folder for folder in _folders(root)}
    parts = {split: folder for split, folder in parts.items() if split is not None} or {None: root}
    documents = {}
    for split, part in parts.items():
        files = [
            (file, folder.name)
            for folder in _folders(part)
            if folder.name != _UNLABELLED
            for file in _sources.files(folder)
        ]
        documents[split] = [(_sources.read("text", file), label) for file, label in files]
        if not files:
            raise UsageError(f"text: path={part} has no sub-folder with documents: make one for each class")
        empty = [file for (file, _), (document, _) in zip(files, documents[split], strict=True) if not document]
        if empty:
            more = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UsageError(f"text: {empty[0]} is empty{more}: every document needs text")
    return documents


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _labelled(
    columns: dict[Split | None, _sources.Columns], text_column: str | None, label_column: str | None
) -> dict[Split | None, list[tuple[bytes, Label]]]:
    """(text, label) of every row of the tables."""
    labelled = {}
    for split, table in columns.items():
        text = _sources.pick("text", "text_column", text_column, _TEXTS, table)
        label = _sources.pick("text", "label_column", label_column, _LABELS, table)
        if text == label:
            raise UsageError(
                f'text: column "{text}" cannot be both text and label: give text_column=... and label_column=...'
            )
        documents = _sources.texts("text", text, table[text])
        labels = _labels(label, table[label])
        if set(labels) != {_HIDDEN} or len(columns) == 1:
            labelled[split] = list(zip(documents, labels, strict=True))
    return labelled


def _labels(column: str, values: Sequence) -> list[Label]:
    """The labels as they are, whole floats as integers; raises UsageError at one that is missing or no class."""
    labels = []
    for row, value in enumerate(values[:], 1):
        if value is None or value != value or value == "":
            raise UsageError(f'text: column "{column}", row {row} has no label: every document needs one')
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, (bool, int, str)):
            raise UsageError(
                f'text: column "{column}", row {row} is {value!r}: a label is a whole number, a word, or true/false'
            )
        labels.append(value)
    return labels


def _corpus(source: str, documents: dict[Split | None, list[tuple[bytes, Label]]]) -> Corpus:
    """Split the documents and drop copies: what is in test from the other splits, what is in validation from train."""
    labels = {label for part in documents.values() for _, label in part}
    total = sum(map(len, documents.values()))
    if len({type(label) for label in labels}) > 1:
        raise UsageError(
            f"text: the labels of {source} mix numbers and words: {', '.join(sorted(map(repr, labels))[:6])}"
        )
    if len(labels) < 2:
        raise UsageError(f"text: {source} has {len(labels)} class(es) in {total} documents: there must be 2 or more")
    if 2 * len(labels) > total:
        raise UsageError(
            f"text: {source} has {len(labels)} classes in {total} documents, too many to learn: "
            "give label_column=... with the name of another column, or more documents"
        )
    classes = sorted(labels, key=lambda label: (0, label) if isinstance(label, str) else (label, ""))
    number = {label: index for index, label in enumerate(classes)}
    parts = _sources.resplit("text", documents, lambda document: document[0])
    seen: set[bytes] = set()
    splits, count = {}, 0
    for split in reversed(SPLITS):
        new = [(text, label) for text, label in parts[split] if text not in seen]
        seen.update(text for text, _ in new)
        count += len(new)
        splits[split] = ([text for text, _ in new], np.array([number[label] for _, label in new], np.int32))
    return Corpus(source, tuple(map(str, classes)), {split: splits[split] for split in SPLITS}, total - count)
