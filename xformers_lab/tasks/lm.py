"""Lm: predict the next byte, or the next token, of text."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import platform
import sysconfig
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split, _packing, _splits, _tokens
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading import account, columns, files, layout, lines, saved, splits, tables
from xformers_lab.tasks._reading.splits import Overlap

T = TypeVar("T")
# Parts of the standard library that are no plain source of it: tests, applications, what this machine generated.
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"}
_COLUMNS = ("text", "content", "document", "sentence")


class Lm(InPasses):
    """Language modelling of any text, by bytes (as in Al-Rfou et al., 2018, arXiv 1808.04444) or by subwords.

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

    Subwords are those of a tokenizer that loses nothing: a byte-pair encoding trained on the training split alone, or a
    byte-level one of a file or the hub. Then sequences are windows of tokens; which text is in which split, and which
    is dropped, is as with bytes. An evaluation predicts every token of a split but the first, once: by windows that
    follow one another, or by ones that overlap, each of which is scored on its last `stride` tokens, so that all but
    the first window's have seq_len - stride tokens or more before them.

    Packed, a row holds whole documents (rows of a table or of a data set, files of a folder) one after another, as many
    as fit, and no token is told of another document than its own: attention sees none, positions that are added to
    tokens begin anew, and a choice that cannot respect the boundaries is refused. Of a document each token predicts the
    next; its first is predicted from nothing and not scored, and its last predicts nothing and stands in no row. One of
    more than seq_len + 1 tokens is cut into pieces, which share the token at the cut, so that all others are predicted
    once. Rows are filled once, longest document first, each into the fullest row that has room; steps take them in an
    order that is shuffled anew for each pass over the split. The rest of a row is padding, whose share the data say.

    Options:
        path: a file or folder (none, and no hub: the standard library's source)
        hub: a data set on the hub, such as Salesforce/wikitext
        config: which configuration of the hub data set
        column: the column that holds the text, in a table or hub data set; title+body joins two
        header: whether the first line of a csv names its columns (false: they are called 0, 1, 2, ...)
        overlap: what becomes of training documents that are held out too: keep, drop, or refuse
        tokens: bytes; bpe (trained on the training split); (file:PATH) with a tokenizer.json; (hub:MODEL)
        vocab: how many tokens a bpe is trained to have, 4096 by default
        packed: whether rows hold whole documents that are kept apart, not windows of the whole text
        stride: tokens that a window of an evaluation is scored on, fewer than seq_len where windows overlap (none: all)

    Metric: bits per byte of the text, whatever the tokens are: the nats of all that is scored over the bytes it stands
    for; lower is better. Beside it the perplexity per token. Chance: a uniform guess among all tokens, on the test
    split; 8.0 with bytes. The data say what `unigram` scores there, which guesses by how often each token comes in the
    training split.
    """

    metric_name = "bits_per_byte"
    higher_is_better = False
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
        tokens: str = "bytes",
        vocab: int | None = None,
        packed: bool = False,
        stride: int | None = None,
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
        if stride is not None and not 1 <= stride <= setting.seq_len:
            raise ValueError(f"stride={stride}: use 1 to seq_len={setting.seq_len}")
        if packed and stride is not None:
            raise ValueError(f"stride={stride} is of windows, and packed=true has none: drop one of them")
        self.stride = setting.seq_len if stride is None else stride
        self.segments = self.stride == setting.seq_len and not packed
        self.packed = packed
        read = corpus(path, hub, config, column, header, files.stamp("lm", path))
        parts, counts = _settled(read, setting.seq_len, overlap)
        if packed and all(len(texts) < 2 for texts in parts.values()):
            raise ValueError(
                f"packed=true packs documents, and {read.source} is one text: use a table or a folder of files, or "
                "packed=false"
            )
        self.source, self.files = read.source, 1 if read.how == "by position" else sum(map(len, parts.values()))
        self.bytes: dict[Split, np.ndarray] = {
            split: np.frombuffer(texts[0], np.uint8) if read.how == "by position" else _joined(texts)
            for split, texts in parts.items()
        }
        self.tokens = _tokens.of("lm", tokens, vocab, lambda: [self.bytes["train"].tobytes()])
        self.ids = self.bytes
        if packed:
            texts = splits.each(parts, lambda texts: [_ended(text) for text in texts if text])
            documents = splits.each(texts, self.tokens.encode_all)
            self.ids = splits.each(documents, lambda of_split: np.concatenate([np.zeros(0, np.uint8), *of_split]))
            self.rows = splits.each(
                documents, lambda ids: _packing.pack(np.array([*map(len, ids)], int), setting.seq_len)
            )
        elif self.tokens.tokenizer is not None:
            self.ids = splits.each(self.bytes, lambda content: self.tokens.encode_all([content.tobytes()])[0])
        self.vocab = self.outputs = self.tokens.vocab
        self.tokenizer = self.tokens.named()
        sizes = splits.each(self.bytes, len)
        told = read.account.saying(self.tokens.reading(self.ids["train"]))
        self.read = account.record(told, sizes, counts, unit="byte", how=read.how, overlap=overlap)
        for split, ids in self.ids.items():
            if packed and not self.rows[split].count:
                raise ValueError(
                    f"the {split} split of {self.source} has no document of 2 {self.tokens.unit} or more, and "
                    "packed=true needs one: give more text, or use packed=false"
                )
            if not packed and len(ids) <= setting.seq_len:
                raise ValueError(
                    f"the {split} split of {self.source} has {len(ids)} {self.tokens.unit}, seq_len={setting.seq_len} "
                    f"needs {setting.seq_len + 1} or more: give more text, join its files into one, or use a smaller "
                    "seq_len"
                )
        self.chance = math.log2(self.vocab) / self.tokens.bytes_per_token(self._scored("test"))

    def _scored(self, split: Split) -> np.ndarray:
        """The tokens of a split that are predicted."""
        return self.ids[split][self.rows[split].targets if self.packed else slice(1, None)]

    def batch(self, split: Split, step: int) -> Batch:
        if self.packed:
            return super().batch(split, step)
        rng, ids = _splits.generator(self.setting.seed, split, step), self.ids[split]
        starts = rng.integers(0, len(ids) - self.setting.seq_len, self.setting.batch)
        return self._windows(split, starts)

    def examples(self, split: Split) -> int:
        """Windows, `stride` tokens apart, or packed rows: together they predict every token but the first, or but the
        first of each document, once."""
        if self.packed:
            return self.rows[split].count
        return 1 + -(-max(len(self.ids[split]) - 1 - self.setting.seq_len, 0) // self.stride)

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        if self.packed:
            return self._packed(split, numbers)
        batch = self._windows(split, numbers * self.stride)
        # The first window has nothing before it: all of it is scored.
        new = np.arange(self.setting.seq_len) >= self.setting.seq_len - self.stride
        return dataclasses.replace(batch, weights=batch.weights * (new | (numbers == 0)[:, None]))

    def segment(self, split: Split, step: int) -> Batch:
        T, B, room = self.setting.seq_len, self.setting.batch, len(self.ids[split]) - 1
        each = room // (B * T)  # segments that every row reads before all begin anew
        if not each:
            raise UsageError(
                f"the {split} split of {self.source} has {room + 1} {self.tokens.unit}, too few for batch={B} rows "
                f"that each read a part of their own in segments of seq_len={T}: use a smaller batch or seq_len, or "
                "give more text"
            )
        turn, number = divmod(step, each)
        shift = _splits.generator(self.setting.seed, split, turn).integers(0, room - each * B * T + 1)
        starts = shift + np.arange(B) * each * T + number * T
        return dataclasses.replace(self._windows(split, starts), fresh=np.full(B, number == 0))

    def _windows(self, split: Split, starts: np.ndarray) -> Batch:
        """What a window lacks at the end of the split is filled up, without weight; nothing before it looks there."""
        ids = self.ids[split]
        places = starts[:, None] + np.arange(self.setting.seq_len + 1)
        windows = ids[np.minimum(places, len(ids) - 1)].astype(np.int32)
        return Batch(windows[:, :-1], windows[:, 1:], (places[:, 1:] < len(ids)).astype(np.float32))

    def _packed(self, split: Split, numbers: np.ndarray) -> Batch:
        """Rows of these numbers; padding is a document of its own, without weight."""
        places, documents = self.rows[split].take(numbers)
        ids, valid = self.ids[split], places >= 0
        token = lambda at: np.where(valid, ids[np.where(valid, at, 0)], 0).astype(np.int32)
        return Batch(token(places), token(places + 1), valid.astype(np.float32), valid, documents=documents)

    def encode(self, text: str) -> list[int]:
        return self.tokens.encode(text.encode()).tolist()

    def decode(self, tokens: list[int]) -> str:
        return self.tokens.decode(tokens).decode(errors="replace")

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Nats, and the bytes that the targets stand for."""
        nats, weight = self.loss(logits, batch)
        if self.tokens.tokenizer is not None:
            weight = (jnp.asarray(self.tokens.sizes)[batch.targets] * batch.weights).sum()
        return nats, weight

    def finish(self, mean: float) -> float:
        """Nats per byte to bits per byte."""
        return mean / math.log(2)

    def figures(self, loss: float) -> dict[str, float]:
        return {"perplexity": _tokens.perplexity(loss)}

    def describe(self) -> dict:
        """Source, number of files or documents, bytes of each split, a sha256 over the splits, the tokenizer."""
        fingerprint = hashlib.sha256(
            b"".join(hashlib.sha256(content.tobytes()).digest() for content in self.bytes.values())
        )
        sizes = {f"{split}_bytes": len(content) for split, content in self.bytes.items()}
        identity = {"source": self.source, "documents": self.files, **sizes, "sha256": fingerprint.hexdigest()}
        if self.packed:
            identity["packed"] = splits.each(self.rows, lambda rows: {"rows": rows.count, "padding": rows.padding})
        return identity | self.tokens.describe() | {"unigram": self._unigram, "reading": self.read}

    @functools.cached_property
    def _unigram(self) -> float:
        return round(self.tokens.unigram(self.ids["train"], self._scored("test")), 4)

    def reading(self) -> list[str]:
        if not self.packed:
            return account.words(self.read)
        words = lambda rows: f"packed into {rows.count:,} rows of {rows.length}, {rows.padding:.1%} of them padding"
        return [*account.words(self.read), *(f"{split}: {words(rows)}" for split, rows in self.rows.items())]


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
        broken = splits.each(parts, _numbered_lines)
        keys = splits.each(broken, lambda of_split: [_key(line, length) for _, line in of_split])
        rest, more = _without_shared(corpus.source, broken, keys, overlap)
        for split, many in more.items():
            parts[split] = _of_lines(rest[split]) if many else parts[split]
            counts[split] += many
    for split in corpus.missing:
        parts["train"], parts[split] = _cut(parts["train"], sum(map(len, parts["train"])) * 9 // 10)
    return parts, counts


def _without_shared(
    source: str, parts: dict[Split, list[T]], keys: dict[Split, list[bytes | None]], overlap: str
) -> tuple[dict[Split, list[T]], dict[Split, int]]:
    copies = splits.shared(keys)
    dropped = splits.settle("lm", source, copies, overlap)
    rest: dict[Split, list[T]] = {split: splits.without(texts, dropped[split]) for split, texts in parts.items()}
    return rest, splits.each(copies, len)


def _key(text: bytes, shortest: int) -> bytes | None:
    """What a document or line is compared by; None where it is too short to be."""
    stripped = text.strip()
    return stripped if len(stripped) >= shortest else None


def _numbered_lines(documents: list[bytes]) -> list[tuple[int, bytes]]:
    """The lines of each document, with its number."""
    return [(at, line) for at, text in enumerate(documents) for line in _ended(text)[:-1].split(b"\n")]


def _of_lines(numbered: list[tuple[int, bytes]]) -> list[bytes]:
    """The documents that still have a line."""
    of_document = itertools.groupby(numbered, lambda pair: pair[0])
    return [b"".join(line + b"\n" for _, line in lines) for _, lines in of_document]


def _cut(documents: list[bytes], end: int) -> tuple[list[bytes], list[bytes]]:
    """What stands in the first `end` bytes of documents, and what stands behind."""
    ends = list(itertools.accumulate(map(len, documents)))
    number = bisect.bisect_right(ends, end)
    before = end - (ends[number - 1] if number else 0)
    if number == len(documents) or not before:
        return documents[:number], documents[number:]
    middle = documents[number]
    return [*documents[:number], middle[:before]], [middle[before:], *documents[number + 1 :]]


def _ended(text: bytes) -> bytes:
    return text if text.endswith(b"\n") else text + b"\n"


def _joined(documents: list[bytes]) -> np.ndarray:
    """The documents one after the other, each ending in a newline."""
    return np.frombuffer(b"".join(map(_ended, documents)), np.uint8)
