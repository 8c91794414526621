"""Retrieval: do two documents belong together?"""

import functools
import hashlib
from typing import NamedTuple

import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split, _presets, _splits
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading import account, columns, files, saved, splits, tables
from xformers_lab.tasks._reading.splits import Overlap
from xformers_lab.tasks.text import Text, chosen_tables

# Tokens: 0 is padding, then the bytes plus one, then what stands between the documents.
SEPARATOR = 257
_FIRST = ("text1", "sentence1", "document1", "question1", "premise")
_SECOND = ("text2", "sentence2", "document2", "question2", "hypothesis")
_LABELS = ("label", "labels", "target", "is_duplicate")
_WORDS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


class Retrieval(InPasses):
    """Whether two documents belong together, byte by byte, the Retrieval task of Long Range Arena (Tay et al., 2020,
    arXiv 2011.04006; its pairs are of the ACL Anthology Network: Radev et al., 2013).

    A sequence is `first, separator, second, padding`; each document is cut off at max_length. Long Range Arena encodes
    the two apart and joins what comes out; here one model reads both, so that every mechanism sees the whole length.

    Read are tables of pairs (csv, json, parquet, by path or hub), with two columns of text and a label that is 0 or 1;
    or else labelled documents, as task=text reads them: then two different documents of one class belong together, and
    two of different classes do not, each half of the time. Training pairs are then drawn anew in every step; held-out
    ones are fixed, one for each document. No document is in two splits: pairs of no named split are split 80 / 10 / 10
    by a hash of their first document, and a training pair with a document that is held out is dropped. The separator is
    marked.

    Options:
        path: a csv, json or parquet file, or a folder
        hub: a data set on the hub
        config: which configuration of the hub data set
        first_column: the column of first documents (none: one called text1, sentence1, ...)
        second_column: the column of second documents (none: one called text2, sentence2, ...)
        text_column: of labelled documents: the column that holds the text
        label_column: the column of labels
        header: whether the first line of a csv names its columns (false: they are called 0, 1, 2, ...)
        max_length: the most bytes of a document that are read (none: what fits, half of seq_len)
        preset: lra: documents of up to 4,000 bytes, at seq_len=8001 or more
        overlap: what becomes of training data that are held out too: keep, drop, or refuse

    Metric: accuracy. Chance: 1 / 2.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    marks = 1
    vocab = SEPARATOR + 1
    tokenizer = "bytes from 1 on"
    outputs = 2
    chance = 0.5

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        hub: str | None = None,
        config: str | None = None,
        first_column: str | None = None,
        second_column: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        header: bool = True,
        max_length: int | None = None,
        preset: _presets.Preset | None = None,
        overlap: Overlap = "drop",
    ):
        super().__init__(setting)
        if (path is None) == (hub is None):
            raise ValueError("documents are read from path= or from hub=: give path=FILE or path=FOLDER, or a hub=")
        if config is not None and hub is None:
            raise ValueError(f"config={config} is for a hub data set: give hub=... too, or drop it")
        if preset is not None:
            _presets.published(preset, {"max_length": (max_length, 4000)})
            _presets.check_length(preset, setting.seq_len, 2 * 4000 + 1)
            max_length = 4000
        most = (setting.seq_len - 1) // 2
        self.longest = most if max_length is None else max_length
        if not 1 <= self.longest <= most:
            raise ValueError(
                f"max_length={self.longest} does not fit twice, with a separator, into seq_len={setting.seq_len}"
            )
        pair = first_column, second_column
        paired = load_pairs(path, hub, config, *pair, label_column, header, files.stamp("retrieval", path))
        self.drawn = paired is None
        if paired is None:
            if any(pair):
                raise ValueError("first_column and second_column are of a table of pairs, and this is none")
            self._of_documents(path, hub, config, text_column, label_column, header, overlap)
        else:
            if text_column is not None:
                raise ValueError(f"text_column={text_column} is of labelled documents, and these are pairs")
            self._of_pairs(paired, overlap)
        for split in SPLITS:
            if not len(self.pairs[split]):
                more = splits.empty(self.dropped)
                raise ValueError(f"the {split} split of {self.source} has no pair{more}: give more documents")

    def batch(self, split: Split, step: int) -> Batch:
        """Pairs drawn anew of labelled documents; else those there are, shuffled anew for every pass."""
        if self.drawn:
            count = self.setting.batch
            rng = _splits.generator(self.setting.seed, split, step)
            firsts = rng.integers(0, len(self.documents[split]), count)
            return self._joined(split, _partners(rng, self.classes[split], firsts, rng.integers(0, 2, count)))
        return super().batch(split, step)

    def examples(self, split: Split) -> int:
        return len(self.pairs[split])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        return self._joined(split, self.pairs[split][numbers])

    def show(self, example: Batch) -> dict[str, str]:
        tokens = np.asarray(example.inputs)[0].tolist()
        between = tokens.index(SEPARATOR)
        return {
            "first": self.decode(tokens[:between]),
            "second": self.decode(tokens[between:]),
            "answer": self.answer_name(int(np.asarray(example.targets)[0])),
        }

    def decode(self, tokens: list[int]) -> str:
        return bytes(token - 1 for token in tokens if 0 < token < SEPARATOR).decode(errors="replace")

    def answer_name(self, answer: int) -> str:
        return ("apart", "together")[answer]

    def describe(self) -> dict:
        """Source, documents and pairs of each split, what was dropped, share of the more frequent answer, sha256."""
        fingerprint = hashlib.sha256()
        for split in SPLITS:
            for document in self.documents[split]:
                fingerprint.update(b"%d " % len(document) + document)
            fingerprint.update(self.pairs[split].tobytes())
        together = float(self.pairs["test"][:, 2].mean())
        return {
            "source": self.source,
            "pairs": "built of labelled documents" if self.drawn else "given",
            **{f"{split}_documents": len(self.documents[split]) for split in SPLITS},
            **{f"{split}_pairs": len(self.pairs[split]) for split in SPLITS},
            "copies_dropped": self.dropped,
            "majority": round(max(together, 1 - together), 4),
            "sha256": fingerprint.hexdigest(),
            "reading": self.read,
        }

    def reading(self) -> list[str]:
        return account.words(self.read)

    def _of_documents(self, path, hub, config, text_column, label_column, header: bool, overlap: Overlap) -> None:
        """Documents, their classes, and one pair for each of them, of the source as task=text reads it."""
        setting = Setting(self.longest, self.setting.batch, self.setting.seed)
        options = {"text_column": text_column, "label_column": label_column, "header": header, "overlap": overlap}
        try:
            text = Text(setting, path=path, hub=hub, config=config, **options)
        except UsageError as error:
            raise UsageError(f"retrieval: {str(error).removeprefix('text: ')}") from error
        self.source, self.dropped, notes = text.corpus.source, text.dropped, []
        self.documents: dict[Split, list[bytes]] = {}
        self.classes: dict[Split, np.ndarray] = {}
        self.pairs: dict[Split, np.ndarray] = {}
        for split, (documents, classes) in text.corpus.splits.items():
            cut = [document[: self.longest] for document in documents]
            once = {document: number for number, document in reversed(list(enumerate(cut)))}
            alone = np.bincount(classes[sorted(once.values())], minlength=len(text.corpus.classes)) < 2
            kept = [number for number in sorted(once.values()) if not alone[classes[number]]]
            if len(kept) < len(cut):
                notes.append(
                    f"{split}: {len(cut) - len(kept):,} documents left out: copies within the split, or alone of their "
                    "class"
                )
            self.documents[split], self.classes[split] = [cut[number] for number in kept], classes[kept]
            if len(np.unique(self.classes[split])) < 2:
                raise ValueError(
                    f"the {split} split of {self.source} has documents of fewer than two classes: give more documents"
                )
            numbers = np.arange(len(kept))
            rng = _splits.generator(0, split, 0)
            self.pairs[split] = _partners(rng, self.classes[split], numbers, rng.permutation(numbers) % 2)
        self.read = {**text.read, "notes": [*text.read["notes"], *notes]}

    def _of_pairs(self, corpus: "Pairs", overlap: Overlap) -> None:
        """The pairs of a table, without those to train on of which a document is held out."""
        seen = lambda document: document[: self.longest].strip()
        held: set[bytes] = set()
        copies: dict[Split, list[int]] = {}
        for split in reversed(SPLITS):
            pairs = corpus.splits[split]
            copies[split] = [at for at, (*two, _) in enumerate(pairs) if held & set(map(seen, two))]
            held.update(seen(document) for *two, _ in pairs for document in two)
        dropped = splits.settle("retrieval", corpus.source, copies, overlap)
        self.source, self.dropped = corpus.source, sum(map(len, dropped.values()))
        self.documents, self.pairs = {}, {}
        for split in SPLITS:
            number: dict[bytes, int] = {}
            rows = [
                (*(number.setdefault(document[: self.longest], len(number)) for document in two), label)
                for *two, label in splits.without(corpus.splits[split], dropped[split])
            ]
            self.documents[split] = list(number)
            self.pairs[split] = np.array(rows, np.int32).reshape(-1, 3)
        sizes, counts = splits.each(self.pairs, len), splits.each(copies, len)
        self.read = account.record(corpus.account, sizes, counts, unit="pair", overlap=overlap)

    def _joined(self, split: Split, pairs: np.ndarray) -> Batch:
        """(n, 3), the numbers of two documents and whether they belong together -> a batch of n rows."""
        inputs = np.zeros((len(pairs), self.setting.seq_len), np.int32)
        for row, (first, second, _) in zip(inputs, pairs, strict=True):
            one, other = (np.frombuffer(self.documents[split][number], np.uint8) for number in (first, second))
            row[: len(one)] = one + np.int32(1)
            row[len(one)] = SEPARATOR
            row[len(one) + 1 : len(one) + 1 + len(other)] = other + np.int32(1)
        answers, weights = pairs[:, 2].astype(np.int32), np.ones(len(pairs), np.float32)
        return Batch(inputs, answers, weights, inputs > 0, marked=inputs == SEPARATOR)


class Pairs(NamedTuple):
    """Two documents and whether they belong together, 0 or 1, for each example of each split."""

    source: str
    splits: dict[Split, list[tuple[bytes, bytes, int]]]
    account: account.Account


@functools.lru_cache(maxsize=4)
def load_pairs(
    path: str | None,
    hub: str | None,
    config: str | None,
    first_column: str | None,
    second_column: str | None,
    label_column: str | None,
    header: bool,
    stamp: str | None,
) -> Pairs | None:
    """Read the pairs of a table or hub data set, once per process; None where these are no tables with two texts."""
    if path is None:
        assert hub is not None
        name, source = f"hub {hub}", saved.from_hub("retrieval", hub, config)
    else:
        name, place = path, files.existing("retrieval", path)
        if place.is_dir() and saved.is_saved(place):
            source = saved.from_folder("retrieval", place)
        else:
            chosen = [place] if place.is_file() and tables.is_table(place) else []
            chosen = chosen or (chosen_tables(place) if place.is_dir() else [])
            if not chosen:
                return None
            source = tables.read("retrieval", place, chosen, header)
    usual = lambda wanted, names, table: wanted is not None or columns.usual_column(names, table) is not None
    first_table = next(iter(source.tables.values()))[0]
    if not (usual(first_column, _FIRST, first_table) and usual(second_column, _SECOND, first_table)):
        return None
    pairs: dict[Split | None, list[tuple[bytes, bytes, int]]] = {}
    parts: dict[Split | None, account.Part] = {}
    for split, of_split in source.tables.items():
        part = account.Part()
        for table in of_split:
            _, firsts = columns.texts("retrieval", "first_column", first_column, _FIRST, table)
            _, seconds = columns.texts("retrieval", "second_column", second_column, _SECOND, table)
            label = columns.pick("retrieval", "label_column", label_column, _LABELS, table)
            pairs.setdefault(split, []).extend(zip(firsts, seconds, _together(label, table), strict=True))
            part += table.part
        parts[split] = part
    complete = splits.complete("retrieval", pairs, lambda pair: pair[0])
    return Pairs(name, complete, account.Account(parts, tuple(source.notes)))


def _together(column: str, table: tables.Table) -> list[int]:
    """The labels of pairs, 0 or 1; raises UsageError at one that is neither."""
    labels = []
    for row, value in enumerate(table.values(column)):
        word = str(value).strip().lower()
        if word not in _WORDS:
            raise UsageError(
                f'retrieval: {table.where(row)}: column "{column}", row {row + 1} is {value!r}: the label of a pair is '
                "1 where its documents belong together, else 0"
            )
        labels.append(_WORDS[word])
    return labels


def _partners(rng: np.random.Generator, classes: np.ndarray, firsts: np.ndarray, together: np.ndarray) -> np.ndarray:
    """(n, 3): each first document, another of its class or of any other as `together` says, and that.

    classes (documents,), each at least twice.
    """
    by_class = np.argsort(classes, kind="stable")
    begins = np.searchsorted(classes[by_class], np.arange(classes.max() + 2))
    rank = np.empty(len(classes), np.int64)
    rank[by_class] = np.arange(len(classes))
    first, last = begins[classes[firsts]], begins[classes[firsts] + 1]
    draws = rng.random(len(firsts))
    # Documents stand ordered by class: another of the same is one of its run but itself, one of another is outside it.
    inside = first + (draws * (last - first - 1)).astype(np.int64)
    inside += inside >= rank[firsts]
    outside = (draws * (len(classes) - (last - first))).astype(np.int64)
    outside += np.where(outside >= first, last - first, 0)
    seconds = by_class[np.where(together == 1, inside, outside)]
    return np.stack([firsts, seconds, together], 1).astype(np.int32)
