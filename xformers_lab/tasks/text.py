"""Text: classify documents by their bytes, or by subwords."""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import Batch, Setting, Split, _presets, _tokens
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading import account, columns, files, labels, layout, lines, saved, splits, tables
from xformers_lab.tasks._reading.splits import Overlap

_DEFAULT_HUB = "stanfordnlp/imdb"
_TEXTS = ("text", "sentence", "review", "content", "document", "body", "description")
_LABELS = ("label", "labels", "class", "category", "sentiment", "target", "y")
# The folder of unlabelled documents in IMDb's archive.
_UNLABELLED = "unsup"
_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")

Label = int | str


class Text(InPasses):
    """Document classification by bytes, the Text task of Long Range Arena (Tay et al., 2020, arXiv 2011.04006), or by
    subwords.

    By default IMDb reviews from the hub (Maas et al., 2011); or a csv, json or parquet file (or a folder of them named
    by split, such as train.csv and test.csv) with a text and a label column; or a folder with a sub-folder of text
    files for each class; or one with such folders in train/ and test/, like IMDb's archive. A document is its tokens +
    1, cut off at max_length, padded at the end with 0. Test data that the source sets apart stay test data: validation
    is a tenth of the training documents (Long Range Arena validated on its test data). Without them, documents are
    split 80 / 10 / 10. Documents go by a hash of their whole text, so copies stay together. A document that is held out
    too, as the model sees it (cut off, without blanks around), is dropped from the training data. A split whose labels
    are hidden (no such column, or all -1, as in GLUE) counts as missing; a label that only held-out data have is
    refused. Fields of tables are text as it stands, and only an empty one is missing. A byte-pair encoding is trained
    on the training documents that are not held out too, so it is the same at every length. The first token is marked.

    Options:
        path: a csv, json or parquet file, or a folder (none: the hub)
        hub: a data set on the hub (none, and no path: stanfordnlp/imdb)
        config: which configuration of the hub data set
        text_column: the column that holds the text (none: one called text, sentence, review, ...); title+body joins two
        label_column: the column that holds the class (none: one called label, class, sentiment, ...)
        header: whether the first line of a csv names its columns (false: they are called 0, 1, 2, ...)
        max_length: the most tokens of a document that are read (none: seq_len)
        preset: lra: documents of up to 4,000 bytes, at seq_len=4000 or more; Long Range Arena has IMDb
        overlap: what becomes of training documents that are held out too: keep, drop, or refuse
        tokens: bytes; bpe (trained on the training split); (file:PATH) with a tokenizer.json; (hub:MODEL)
        vocab: how many tokens a bpe is trained to have, 4096 by default

    Metric: accuracy. Chance: 1 / classes.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    marks = 1

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
        max_length: int | None = None,
        preset: _presets.Preset | None = None,
        overlap: Overlap = "drop",
        tokens: str = "bytes",
        vocab: int | None = None,
    ):
        super().__init__(setting)
        if path is not None and hub is not None:
            raise ValueError(f"path={path} and hub={hub} are two sources: give one")
        if config is not None and path is not None:
            raise ValueError(f"config={config} is for a hub data set: give hub=... instead of path=..., or drop it")
        if not header and path is None:
            raise ValueError("header=false is for a csv file: give path=... too, or drop it")
        if preset is not None:
            subwords = None if tokens == "bytes" else tokens
            _presets.published(preset, {"max_length": (max_length, 4000), "tokens": (subwords, "bytes")})
            _presets.check_length(preset, setting.seq_len, 4000)
            max_length = 4000
        self.longest = length = setting.seq_len if max_length is None else max_length
        if not 1 <= length <= setting.seq_len:
            raise ValueError(
                f"max_length={max_length} does not fit: use 1 to {setting.seq_len} at seq_len={setting.seq_len}"
            )
        corpus = load(path, hub, config, text_column, label_column, header, files.stamp("text", path))
        self.tokens = _tokens.of("text", tokens, vocab, lambda: _not_held_out(corpus))
        self.vocab, self.tokenizer = self.tokens.vocab + 1, self.tokens.named(1)
        ids = splits.each(corpus.splits, lambda part: [of[:length] for of in self.tokens.encode_all(part[0])])
        copies = splits.shared({split: self._seen(corpus.splits[split][0], of) for split, of in ids.items()})
        dropped = splits.settle("text", corpus.source, copies, overlap)
        kept: dict[Split, tuple[list[bytes], np.ndarray]] = {
            split: (splits.without(texts, dropped[split]), np.delete(answers, dropped[split]))
            for split, (texts, answers) in corpus.splits.items()
        }
        self.corpus = dataclasses.replace(corpus, splits=kept)
        self.ids: dict[Split, list[np.ndarray]] = {
            split: splits.without(of, dropped[split]) for split, of in ids.items()
        }
        self.dropped = sum(map(len, dropped.values()))
        sizes = splits.each(kept, lambda part: len(part[1]))
        classes = splits.each(kept, lambda part: len(np.unique(part[1])))
        counts = splits.each(copies, len)
        told = corpus.account.saying(self.tokens.reading(np.concatenate([np.zeros(0, np.uint8), *self.ids["train"]])))
        self.read = account.record(told, sizes, counts, unit="document", classes=classes, overlap=overlap)
        for split, size in sizes.items():
            if not size:
                words = ", ".join(f"{name}: {number}" for name, number in sizes.items())
                words += splits.empty(self.dropped)
                raise ValueError(f"the {split} split of {self.corpus.source} is empty ({words}): give more documents")
        self.outputs = len(self.corpus.classes)
        self.chance = 1 / self.outputs

    def examples(self, split: Split) -> int:
        return len(self.corpus.splits[split][1])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        inputs = np.zeros((len(numbers), self.setting.seq_len), np.int32)
        for row, document in enumerate(numbers):
            content = self.ids[split][document]
            inputs[row, : len(content)] = content + np.int32(1)
        marked = np.broadcast_to(np.arange(inputs.shape[1]) == 0, inputs.shape)
        answers, weights = self.corpus.splits[split][1][numbers], np.ones(len(numbers), np.float32)
        return Batch(inputs, answers, weights, inputs > 0, marked=marked)

    def encode(self, text: str) -> list[int]:
        """The tokens of a document, plus one."""
        return [token + 1 for token in self.tokens.encode(text.encode()).tolist()]

    def decode(self, tokens: list[int]) -> str:
        return self.tokens.decode([token - 1 for token in tokens if token]).decode(errors="replace")

    def answer_name(self, answer: int) -> str:
        return self.corpus.classes[answer]

    def describe(self) -> dict:
        """Source, classes, documents per split, copies dropped, share of the most frequent class, sha256 of it all, the
        tokenizer."""
        sizes = {f"{split}_documents": len(labels) for split, (_, labels) in self.corpus.splits.items()}
        counts = np.bincount(self.corpus.splits["test"][1])
        fingerprint = hashlib.sha256()
        for documents, answers in self.corpus.splits.values():
            for document, label in zip(documents, answers, strict=True):
                fingerprint.update(b"%d %d " % (label, len(document)) + document)
        return {
            "source": self.corpus.source,
            "classes": list(self.corpus.classes),
            **sizes,
            "copies_dropped": self.dropped,
            "majority": round(float(counts.max() / counts.sum()), 4),
            "sha256": fingerprint.hexdigest(),
            **self.tokens.describe(),
            "reading": self.read,
        }

    def reading(self) -> list[str]:
        return account.words(self.read)

    def _seen(self, documents: Sequence[bytes], ids: Sequence[np.ndarray]) -> list[bytes]:
        """What a model sees of documents, without blanks around, by which they are compared."""
        return [text[: self.tokens.count(of)].strip() for text, of in zip(documents, ids, strict=True)]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Labelled documents: for each split their bytes and, as indices into `classes`, their labels (n,) int32."""

    source: str
    classes: tuple[str, ...]
    splits: dict[Split, tuple[list[bytes], np.ndarray]]
    account: account.Account


def _not_held_out(corpus: Corpus) -> list[bytes]:
    """The training documents that stand in no other split."""
    documents = splits.each(corpus.splits, lambda part: part[0])
    copies = splits.shared(splits.each(documents, lambda of_split: [text.strip() for text in of_split]))
    return splits.without(documents["train"], copies["train"])


@functools.lru_cache(maxsize=4)
def load(
    path: str | None,
    hub: str | None,
    config: str | None,
    text_column: str | None,
    label_column: str | None,
    header: bool,
    stamp: str | None,
) -> Corpus:
    """Read, check and split the documents; once per process, and again where the stamp of the files is another."""
    names = text_column, label_column
    if path is None:
        source = hub if hub is not None else _DEFAULT_HUB
        return _labelled(f"hub {source}", saved.from_hub("text", source, config), *names)
    place = files.existing("text", path)
    if place.is_dir() and saved.is_saved(place):
        return _labelled(path, saved.from_folder("text", place), *names)
    if place.is_file():
        if not tables.is_table(place):
            kinds = ", ".join(sorted(tables.KINDS))
            raise UsageError(
                f'text: path={path}: unknown kind "{place.suffix}": give a file of kind {kinds}, or a folder'
            )
        return _labelled(path, tables.read("text", place, [place], header), *names)
    if chosen := chosen_tables(place):
        return _labelled(path, tables.read("text", place, chosen, header), *names)
    if text_column is not None or label_column is not None or not header:
        raise UsageError(
            f"text: path={path} is no table: text_column, label_column and header are for csv, json and parquet"
        )
    return _foldered(path, place)


def chosen_tables(root: pathlib.Path) -> list[pathlib.Path]:
    """The tables of a folder whose splits they are, or of one without class folders, which hold other documents."""
    if named := tables.of_splits(root):
        return named
    all_files = files.below(root)
    deep = [file for file in all_files if file.parent != root]
    documents = [
        file for file in deep if not (tables.is_table(file) or layout.is_about(file) or layout.is_beside(file))
    ]
    return [] if documents else [file for file in all_files if tables.is_table(file)]


def _foldered(path: str, root: pathlib.Path) -> Corpus:
    """The documents of a folder, with the name of their sub-folder as the class."""
    placed = layout.of_classes(root)
    documents: dict[Split | None, list[tuple[bytes, Label]]] = {}
    parts: dict[Split | None, account.Part] = {}
    unlabelled = 0
    for split, tops in placed.files.items():
        classes = [folder for top in tops for folder in files.folders(top)]
        labelled = [(file, folder.name) for folder in classes if folder.name != _UNLABELLED
                    for file in files.below(folder)]  # fmt: skip
        unlabelled += sum(len(files.below(folder)) for folder in classes if folder.name == _UNLABELLED)
        if not labelled:
            raise UsageError(f"text: path={tops[0]} has no sub-folder with documents: make one for each class")
        documents[split] = [(lines.text_bytes("text", file), label) for file, label in labelled]
        empty = [file for (file, _), (document, _) in zip(labelled, documents[split], strict=True) if not document]
        if empty:
            more = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UsageError(f"text: {empty[0]} is empty{more}: every document needs text")
        names = tuple(file.relative_to(root).as_posix() for file, _ in labelled)
        parts[split] = account.Part(names, len(names), None, sum(len(document) for document, _ in documents[split]))
    notes = [*placed.notes, *([f"ignored: {unlabelled:,} documents without label"] if unlabelled else [])]
    return _corpus(path, documents, account.Account(parts, tuple(notes)), None)


def _labelled(path: str, source: tables.Source, text_column: str | None, label_column: str | None) -> Corpus:
    """The corpus of tables with a column of text and one of labels."""
    documents: dict[Split | None, list[tuple[bytes, Label]]] = {}
    parts: dict[Split | None, account.Part] = {}
    classes, notes = None, list(source.notes)
    for split, of_split in source.tables.items():
        part, rows = account.Part(), []
        held_out = split in ("validation", "test") and "train" in source.tables
        if held_out and all(_hidden(table, label_column) for table in of_split):
            shown = layout.listed([name for table in of_split for name in table.part.files])
            notes.append(f"{split}: {shown} has no labels: such a split counts as missing")
            continue
        for table in of_split:
            text, texts = columns.texts("text", "text_column", text_column, _TEXTS, table)
            label = columns.pick("text", "label_column", label_column, _LABELS, table)
            if text == label:
                raise UsageError(
                    f'text: column "{text}" cannot be both text and label: give text_column=... and label_column=...'
                )
            classes = table.classes.get(label, classes)
            rows += zip(texts, _labels(label, table), strict=True)
            part += table.part
        documents[split], parts[split] = rows, part
    return _corpus(path, documents, account.Account(parts, tuple(notes)), classes)


def _hidden(table: tables.Table, label_column: str | None) -> bool:
    """Whether the labels of a table are kept secret: there is no such column, it is empty, or it holds -1 alone."""
    wanted = label_column if label_column in table.columns else None
    label = wanted if label_column is not None else columns.usual_column(_LABELS, table)
    hidden = (None, labels.HIDDEN, str(labels.HIDDEN))
    return label is None or all(value in hidden for value in table.values(label))


def _labels(column: str, table: tables.Table) -> list[Label]:
    """The labels without blanks around, whole floats as integers, numbers of named classes as their names.

    Raises UsageError at one that is missing or no class.
    """
    read: list[Label] = []
    names = table.classes.get(column, ())
    for row, value in enumerate(table.values(column)):
        value = value.strip() if isinstance(value, str) else value
        where = f'text: {table.where(row)}: column "{column}", row {row + 1}'
        if value is None or value != value or value == "":
            raise UsageError(f"{where} has no label: every document needs one")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, (bool, int, str)):
            raise UsageError(f"{where} is {value!r}: a label is a whole number, a word, or true/false")
        if names and isinstance(value, int):
            value = names[value] if 0 <= value < len(names) else str(value)
        read.append(value)
    return read


def _corpus(
    source: str,
    documents: dict[Split | None, list[tuple[bytes, Label]]],
    read: account.Account,
    names: Sequence[str] | None,
) -> Corpus:
    """Number the classes and split the documents; names: of the classes in their order, where the source has one."""
    documents = _numbers(documents)
    kinds = {label for part in documents.values() for _, label in part}
    total = sum(map(len, documents.values()))
    if len({type(label) for label in kinds}) > 1:
        raise UsageError(
            f"text: the labels of {source} mix numbers and words: {', '.join(sorted(map(repr, kinds))[:6])}"
        )
    if len(kinds) < 2:
        raise UsageError(f"text: {source} has {len(kinds)} class(es) in {total} documents: there must be 2 or more")
    if 2 * len(kinds) > total:
        raise UsageError(
            f"text: {source} has {len(kinds)} classes in {total} documents, too many to learn: "
            "give label_column=... with the name of another column, or more documents"
        )
    of_split: dict[Split | None, list[Label]] = {
        split: [label for _, label in part] for split, part in documents.items()
    }
    labels.check_known("text", source, of_split)
    order = {name: at for at, name in enumerate(names or ())}
    key = lambda label: (order.get(label, len(order)), label) if isinstance(label, str) else (label, "")
    classes = sorted(kinds, key=key)
    number = {label: index for index, label in enumerate(classes)}
    parts = splits.complete("text", documents, lambda document: document[0])
    arrays: dict[Split, tuple[list[bytes], np.ndarray]] = {
        split: ([text for text, _ in part], np.array([number[label] for _, label in part], np.int32))
        for split, part in parts.items()
    }
    return Corpus(source, tuple(map(str, classes)), arrays, read.saying(labels.warnings(of_split)))


def _numbers(documents: dict[Split | None, list[tuple[bytes, Label]]]) -> dict[Split | None, list[tuple[bytes, Label]]]:
    """Labels that are all spelled as whole numbers become these numbers, so that their order is that of numbers."""
    spelled = {label for part in documents.values() for _, label in part}
    if not all(isinstance(label, str) and _WHOLE.fullmatch(label) for label in spelled):
        return documents
    return {
        split: [(text, int(str(label).partition(".")[0])) for text, label in part] for split, part in documents.items()
    }
