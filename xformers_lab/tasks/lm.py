"""Lm: predict the next byte of text."""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import platform
import re
import sysconfig

import jax
import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split, Task, _sources, _splits

# Parts of the standard library that are no plain source of it: tests, applications, what this machine generated.
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"}
_COLUMNS = ("text", "content", "document", "sentence")


class Lm(Task):
    """Next-byte language modelling of any text (byte-level as in Al-Rfou et al., 2018, arXiv 1808.04444).

    The corpus is the bytes of a file, of every file in a folder, of a column of a table (csv, json, parquet) or of a
    data set on the hub; by default it is the source of Python's own standard library, without its tests, real text that
    every machine has. A folder is split by file and a table by document, through a hash of the name or the text (80 /
    10 / 10), and files with the same content count once; a folder of which every file or sub-folder is named by its
    split (train.txt, valid.txt, test.txt) keeps these splits, and a missing one is the last tenth of train; a single
    file is cut into its first 90 %, the next 5 % and the last 5 %; a table or hub data set that has splits of its own
    keeps them, and a missing one is taken from train by document. A sequence is a window of seq_len + 1 bytes at a
    random place of its split; it may span the end of a document. With a memory, every row of the batch reads a part of
    its own of the split from its first byte to its last, one segment a step, and begins anew, a little shifted, when
    all have been read; nothing is forgotten at the end of a document, as in Transformer-XL.

    Options:
        path: a file or folder (none, and no hub: the standard library's source)
        hub: a data set on the hub, such as Salesforce/wikitext
        config: which configuration of the hub data set
        column: the column that holds the text, in a table or hub data set

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
    ):
        super().__init__(setting)
        if path is not None and hub is not None:
            raise ValueError(f"path={path} and hub={hub} are two sources: give one")
        if config is not None and hub is None:
            raise ValueError(f"config={config} is for a hub data set: give hub=... too, or drop it")
        if column is not None and path is None and hub is None:
            raise ValueError(f"column={column} is for a table: give path=... or hub=... too, or drop it")
        self.source, self.files, self.bytes = corpus(path, hub, config, column)
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
        return {"source": self.source, "documents": self.files, **sizes, "sha256": fingerprint.hexdigest()}


@functools.lru_cache(maxsize=4)
def corpus(
    path: str | None, hub: str | None, config: str | None, column: str | None
) -> tuple[str, int, dict[Split, np.ndarray]]:
    """(what it is, number of documents, the bytes of each split); read once per process."""
    if hub is not None:
        return f"hub {hub}", *_joined(_from_columns(_sources.hub("lm", hub, config), column))
    if path is None:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        names = [
            file for file in _sources.files(root, _NOT_SOURCE) if file.suffix == ".py" and "_sysconfig" not in file.name
        ]
        if not names:
            raise UsageError(f"lm: this Python has no source of its standard library in {root}: give path=...")
        return f"Python {platform.python_version()} standard library", *_joined(_from_files(root, names))
    place = _sources.existing("lm", path)
    if _sources.is_table(place):
        return path, *_joined(_from_columns(_sources.tables("lm", place), column))
    if column is not None:
        raise UsageError(f"lm: column={column} is for a table, but path={path} is no csv, json or parquet")
    if place.is_dir():
        names = _sources.files(place)
        if not names:
            raise UsageError(f"lm: path={path} is a folder without files")
        return path, *_joined(_from_files(place, names))
    content = np.frombuffer(_sources.read("lm", place), np.uint8)
    ends = [0, len(content) * 90 // 100, len(content) * 95 // 100, len(content)]
    return path, 1, {split: content[ends[i] : ends[i + 1]] for i, split in enumerate(SPLITS)}


def _from_files(root: pathlib.Path, names: list[pathlib.Path]) -> dict[Split, list[bytes]]:
    documents: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    named = _named(root, names)
    # Of copies the one held out stays.
    for file in sorted(named, key=lambda file: -SPLITS.index(named[file])) or names:
        content = _sources.read("lm", file)
        if content not in seen:
            seen.add(content)
            hashed = _splits.of_bytes(os.fsencode(file.relative_to(root).as_posix()))
            documents[named.get(file, hashed)].append(content)
    for split in SPLITS[1:] if named else ():
        if not documents[split]:
            text = b"".join(documents["train"])
            end = len(text) * 9 // 10
            documents["train"], documents[split] = [text[:end]], [text[end:]]
    return documents


def _named(root: pathlib.Path, names: list[pathlib.Path]) -> dict[pathlib.Path, Split]:
    """The split that each file's name, or that of its folder in the root, speaks of; nothing unless all do but for a
    read-me, train among them."""
    named: dict[pathlib.Path, Split] = {}
    for file in names:
        path = file.relative_to(root)
        words = re.findall("[a-z]+", f"{path.parts[0]} {path.name}".lower())
        splits: list[Split] = [split for word in words if (split := _sources.split_name(word)) is not None]
        if splits:
            named[file] = splits[0]
        elif path.suffix.lower() not in (".md", ""):
            return {}
    return named if "train" in named.values() else {}


def _from_columns(columns: dict[Split | None, _sources.Columns], wanted: str | None) -> dict[Split, list[bytes]]:
    documents = {}
    for split, table in columns.items():
        name = _sources.pick("lm", "column", wanted, _COLUMNS, table)
        documents[split] = _sources.texts("lm", name, table[name], blank=True)
    if len(documents) < len(SPLITS):
        # Rows may be lines, blank ones too; hashed, all the blank ones would pile up in one split.
        documents = {split: [text for text in texts if text] for split, texts in documents.items()}
    return _sources.resplit("lm", documents, lambda text: text)


def _joined(documents: dict[Split, list[bytes]]) -> tuple[int, dict[Split, np.ndarray]]:
    """The documents of each split one after the other, each ending in a newline."""
    whole = {}
    for split in SPLITS:
        text = b"".join(content if content.endswith(b"\n") else content + b"\n" for content in documents[split])
        whole[split] = np.frombuffer(text, np.uint8)
    return sum(len(documents[split]) for split in SPLITS), whole
