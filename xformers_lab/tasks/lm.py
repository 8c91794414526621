"""Lm: predict the next byte of text."""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import platform
import sysconfig
from typing import Literal, NamedTuple

import jax
import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split, Task, _splits
from xformers_lab.tasks._reading import account, columns, files, layout, lines, saved, splits, tables
from xformers_lab.tasks._reading.splits import Overlap

# Parts of the standard library that are no plain source of it: tests, applications, what this machine generated.
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"}
_COLUMNS = ("text", "content", "document", "sentence")


class Lm(Task):
    """Next-byte language modelling of any text (byte-level as in Al-Rfou et al., 2018, arXiv 1808.04444).

    The corpus is the bytes of a file, of every file in a folder, of a column of a table (csv, json, parquet) or of a
    data set on the hub; by default it is the source of Python's own standard library, without its tests, real text that
    every machine has. Compressed files are expanded. A folder is split by file and a table by document, through a hash
    of the name or the text (80 / 10 / 10), and files with the same content count once; a folder with files or
    sub-folders that are named by their split (train.txt, valid.txt, test.txt) keeps these splits and ignores other
    files, and a missing split is the last tenth of train; a single file, alone in a folder or not, is cut into its
    first 90 %, the next 5 % and the last 5 %; a table or hub data set that has splits of its own keeps them, and a
    missing one is taken from train by document. A document that is held out too is dropped from the training data, and,
    from files that are named by their split, a line of seq_len bytes or more. A sequence is a window of seq_len + 1
    bytes at a random place of its split; it may span the end of a document. With a memory, every row of the batch reads
    a part of its own of the split from its first byte to its last, one segment a step, and begins anew, a little
    shifted, when all have been read; nothing is forgotten at the end of a document, as in Transformer-XL.

    Options:
        path: a file or folder (none, and no hub: the standard library's source)
        hub: a data set on the hub, such as Salesforce/wikitext
        config: which configuration of the hub data set
        column: the column that holds the text, in a table or hub data set; title+body joins two
        header: whether the first line of a csv names its columns (false: they are called 0, 1, 2, ...)
        overlap: what becomes of training documents that are held out too: keep, drop, or refuse

    Metric: bits per byte, lower is better. Chance: 8.0, a uniform guess among 256 bytes.
    """

    metric_name = "bits_per_byte"
    higher_is_better = False
    vocab = outputs = 256
    chance = 8.0
    segments = True

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        hub: str | None = None,
        config: str | None = None,
        column: str | None = None,
        header: bool = True,
        overlap: Overlap = "drop",
    ):
        super().__init__(setting)
        if path is not None and hub is not None:
            raise ValueError(f"path={path} and hub={hub} are two sources: give one")
        if config is not None and hub is None:
            raise ValueError(f"config={config} is for a hub data set: give hub=... too, or drop it")
        if column is not None and path is None and hub is None:
            raise ValueError(f"column={column} is for a table: give path=... or hub=... too, or drop it")
        if not header and path is None:
            raise ValueError("header=false is for a csv file: give path=... too, or drop it")
        read = corpus(path, hub, config, column, header, files.stamp("lm", path))
        parts, counts = _settled(read, setting.seq_len, overlap)
        self.source, self.files = read.source, 1 if read.how == "by position" else sum(map(len, parts.values()))
        self.bytes: dict[Split, np.ndarray] = {
            split: np.frombuffer(texts[0], np.uint8) if read.how == "by position" else _joined(texts)
            for split, texts in parts.items()
        }
        sizes = splits.each(self.bytes, len)
        self.read = account.record(read.account, sizes, counts, unit="byte", how=read.how, overlap=overlap)
        for split, content in self.bytes.items():
            if len(content) <= setting.seq_len:
                raise ValueError(
                    f"the {split} split of {self.source} has {len(content)} bytes, seq_len={setting.seq_len} needs "
                    f"{setting.seq_len + 1} or more: give more text, join its files into one, or use a smaller seq_len"
                )

    def batch(self, split: Split, step: int) -> Batch:
        rng, content = _splits.generator(self.setting.seed, split, step), self.bytes[split]
        starts = rng.integers(0, len(content) - self.setting.seq_len, self.setting.batch)
        return self._windows(split, starts)

    def examples(self, split: Split) -> int:
        """Windows that follow one another: together they predict every byte but the first, each once."""
        return -(-(len(self.bytes[split]) - 1) // self.setting.seq_len)

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        return self._windows(split, numbers * self.setting.seq_len)

    def segment(self, split: Split, step: int) -> Batch:
        T, B, room = self.setting.seq_len, self.setting.batch, len(self.bytes[split]) - 1
        each = room // (B * T)  # segments that every row reads before all begin anew
        if not each:
            raise UsageError(
                f"the {split} split of {self.source} has {room + 1} bytes, too few for batch={B} rows that each read a "
                f"part of their own in segments of seq_len={T}: use a smaller batch or seq_len, or give more text"
            )
        turn, number = divmod(step, each)
        shift = _splits.generator(self.setting.seed, split, turn).integers(0, room - each * B * T + 1)
        starts = shift + np.arange(B) * each * T + number * T
        return dataclasses.replace(self._windows(split, starts), fresh=np.full(B, number == 0))

    def _windows(self, split: Split, starts: np.ndarray) -> Batch:
        """What a window lacks at the end of the split is filled up, without weight; nothing before it looks there."""
        content = self.bytes[split]
        places = starts[:, None] + np.arange(self.setting.seq_len + 1)
        windows = content[np.minimum(places, len(content) - 1)].astype(np.int32)
        return Batch(windows[:, :-1], windows[:, 1:], (places[:, 1:] < len(content)).astype(np.float32))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return self.loss(logits, batch)

    def finish(self, mean: float) -> float:
        """Nats per byte to bits per byte."""
        return mean / math.log(2)

    def describe(self) -> dict:
        """Source, number of files or documents, bytes of each split, and a sha256 over the splits."""
        fingerprint = hashlib.sha256(
            b"".join(hashlib.sha256(content.tobytes()).digest() for content in self.bytes.values())
        )
        sizes = {f"{split}_bytes": len(content) for split, content in self.bytes.items()}
        identity = {"source": self.source, "documents": self.files, **sizes, "sha256": fingerprint.hexdigest()}
        return identity | {"reading": self.read}

    def reading(self) -> list[str]:
        return account.words(self.read)


class Corpus(NamedTuple):
    """Documents of each split, in their order.

    missing: splits that the source lacks, which are taken from the end of its train text; compared: what must not stand
    in two splits, whole documents, documents that fill all that the model sees ("pieces" of a text), or documents and
    such lines ("lines").
    """

    source: str
    splits: dict[Split, list[bytes]]
    account: account.Account
    how: str = "by a hash"
    missing: tuple[Split, ...] = ()
    compared: Literal["nothing", "documents", "pieces", "lines"] = "documents"


@functools.lru_cache(maxsize=4)
def corpus(
    path: str | None, hub: str | None, config: str | None, column: str | None, header: bool, stamp: str | None
) -> Corpus:
    """Read and split the documents; once per process, and again where the stamp of the files is another."""
    if hub is not None:
        return _of_tables(f"hub {hub}", saved.from_hub("lm", hub, config), column)
    if path is None:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        names = [
            file for file in files.below(root, _NOT_SOURCE) if file.suffix == ".py" and "_sysconfig" not in file.name
        ]
        if not names:
            raise UsageError(f"lm: this Python has no source of its standard library in {root}: give path=...")
        source = f"Python {platform.python_version()} standard library"
        return _of_files(source, root, layout.Layout({None: names}, []))
    place = files.existing("lm", path)
    if place.is_dir() and saved.is_saved(place):
        return _of_tables(path, saved.from_folder("lm", place), column)
    chosen = [place] if place.is_file() and tables.is_table(place) else []
    if place.is_dir():
        chosen = tables.of_folder(place)
        if not chosen and (column is not None or not header):
            chosen = [file for file in files.below(place) if tables.is_table(file)]
    if chosen:
        return _of_tables(path, tables.read("lm", place, chosen, header), column)
    if column is not None or not header:
        option = f"column={column}" if column is not None else "header=false"
        raise UsageError(f"lm: {option} is for a table, but path={path} is no csv, json or parquet")
    if place.is_dir():
        names = files.below(place)
        if not names:
            raise UsageError(f"lm: path={path} is a folder without files")
        placed = layout.of_texts("lm", place, names)
        # A hash of one name would leave two splits without a text.
        alone = len(placed.files.get(None, ())) == len(placed.files) == 1
        return _of_one(path, placed.files[None][0], placed.notes) if alone else _of_files(path, place, placed)
    return _of_one(path, place, [])


def _of_one(source: str, file: pathlib.Path, notes: list[str]) -> Corpus:
    """The text of one file, cut into splits by position."""
    content = lines.text_bytes("lm", file)
    ends = [0, len(content) * 90 // 100, len(content) * 95 // 100, len(content)]
    parts: dict[Split, list[bytes]] = {split: [content[ends[i] : ends[i + 1]]] for i, split in enumerate(SPLITS)}
    part = account.Part((file.name,), _lines(content), _lines(content), len(content))
    read = account.Account({None: part}, tuple(notes))
    return Corpus(source, parts, read, "by position", compared="nothing")


def _of_files(source: str, root: pathlib.Path, placed: layout.Layout) -> Corpus:
    """The texts of files, by their splits, else by a hash of their names. Files with the same content count once."""
    documents: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    parts: dict[Split | None, account.Part] = {}
    for split, names in placed.files.items():
        seen: set[bytes] = set()
        shown, ended, size = [], 0, 0
        for file in names:
            content, name = lines.text_bytes("lm", file), file.relative_to(root).as_posix()
            shown.append(name)
            ended, size = ended + _lines(content), size + len(content)
            if content not in seen:
                seen.add(content)
                documents[split or _splits.of_bytes(os.fsencode(name))].append(content)
        copies = {"copies of a file": len(names) - len(seen)} if len(seen) < len(names) else {}
        parts[split] = account.Part(tuple(shown), ended, ended, size, copies)
    read = account.Account(parts, tuple(placed.notes))
    if None in placed.files:
        return Corpus(source, documents, read, "by a hash of file names")
    missing: tuple[Split, ...] = tuple(split for split in SPLITS[1:] if split not in placed.files)
    return Corpus(source, documents, read, "as the last tenth", missing, "lines")


def _of_tables(path: str, source: tables.Source, wanted: str | None) -> Corpus:
    documents: dict[Split | None, list[bytes]] = {}
    parts: dict[Split | None, account.Part] = {}
    for split, of_split in source.tables.items():
        documents[split], parts[split] = [], account.Part()
        for table in of_split:
            documents[split] += columns.texts("lm", "column", wanted, _COLUMNS, table, blank=True)[1]
            parts[split] += table.part
    # Rows may be lines, blank ones too.
    blank: dict[Split | None, int] = {split: texts.count(b"") for split, texts in documents.items()}
    if len(documents) < len(SPLITS):
        # Hashed, all the blank ones would pile up in one split.
        for split, texts in documents.items():
            documents[split] = [text for text in texts if text]
        for split, many in blank.items():
            if many:
                parts[split] = dataclasses.replace(parts[split], dropped={"blank": many})
    read = account.Account(parts, tuple(source.notes))
    compared = "pieces" if any(blank.values()) else "documents"
    return Corpus(path, splits.complete("lm", documents, lambda text: text), read, compared=compared)


def _lines(content: bytes) -> int:
    """How many lines a text has; the last one need not end."""
    return content.count(b"\n") + (not content.endswith(b"\n") and content != b"")


def _settled(corpus: Corpus, length: int, overlap: str) -> tuple[dict[Split, list[bytes]], dict[Split, int]]:
    """The documents of all splits, without what is held out too, and how many documents and lines that was.

    Where the files have splits of their own, a line of `length` bytes or more counts too: it fills all that the model
    sees. A split that the source lacks is the last tenth of its train text.
    """
    parts: dict[Split, list[bytes]] = dict(corpus.splits)
    counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    if corpus.compared != "nothing":
        shortest = length if corpus.compared == "pieces" else 1
        keys = splits.each(parts, lambda texts: [_key(text, shortest) for text in texts])
        parts, counts = _without_shared(corpus.source, parts, keys, overlap)
    if corpus.compared == "lines":
        broken = splits.each(parts, lambda texts: b"".join(map(_ended, texts)).split(b"\n"))
        keys = splits.each(broken, lambda of_split: [_key(line, length) for line in of_split])
        rest, more = _without_shared(corpus.source, broken, keys, overlap)
        for split, many in more.items():
            parts[split] = [b"\n".join(rest[split])] if many else parts[split]
            counts[split] += many
    for split in corpus.missing:
        text = b"".join(parts["train"])
        end = len(text) * 9 // 10
        parts["train"], parts[split] = [text[:end]], [text[end:]]
    return parts, counts


def _without_shared(
    source: str, parts: dict[Split, list[bytes]], keys: dict[Split, list[bytes | None]], overlap: str
) -> tuple[dict[Split, list[bytes]], dict[Split, int]]:
    copies = splits.shared(keys)
    dropped = splits.settle("lm", source, copies, overlap)
    rest: dict[Split, list[bytes]] = {split: splits.without(texts, dropped[split]) for split, texts in parts.items()}
    return rest, splits.each(copies, len)


def _key(text: bytes, shortest: int) -> bytes | None:
    """What a document or line is compared by; None where it is too short to be."""
    stripped = text.strip()
    return stripped if len(stripped) >= shortest else None


def _ended(text: bytes) -> bytes:
    return text if text.endswith(b"\n") else text + b"\n"


def _joined(documents: list[bytes]) -> np.ndarray:
    """The documents one after the other, each ending in a newline."""
    return np.frombuffer(b"".join(map(_ended, documents)), np.uint8)
