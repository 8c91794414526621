"""Translate: pairs of sentences, byte by byte."""

import functools
import gzip
import hashlib
import math
import pathlib
import zlib
from typing import NamedTuple

import jax
import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split, Task, _sources, _splits

# Symbols before the 256 bytes: what fills a sentence up, what begins a translation, what ends it.
BLANK, BEGIN, END, BYTES = 0, 1, 2, 3
_GIVE = "give a folder with pairs of files like train.de and train.en (also .gz), or a table with a column for each"

Pair = tuple[bytes, bytes]


class Translate(Task):
    """Translation of sentences, byte-level (machine translation as in Vaswani et al., 2017, arXiv 1706.03762; bytes as
    in ByT5: Xue et al., 2021, arXiv 2105.13626).

    A sequence is `source, blanks, BEGIN, translation, END, blanks`: the first half of seq_len, rounded down, is the
    source's, which an encoder-decoder reads, and the model is asked for the translation and its end alone. Pairs of
    which a side does not fit are left out and counted. Read are pairs of files with a sentence in every line, named by
    split and language (train.de and train.en, also .gz), or two columns of a table (csv, json, parquet) or hub data
    set. A split that the data lack is taken from train by a hash of the pair; a pair of test or validation data is
    dropped from the data trained on.

    Options:
        path: a folder of pairs of files, or a table
        hub: a data set on the hub
        config: which configuration of the hub data set
        source: the language translated from: the ending of its files, or its column
        target: the language translated to

    Metric: bits per byte of the translation, its end counted as one; lower is better. Chance: a uniform guess.
    """

    metric_name = "bits_per_byte"
    higher_is_better = False
    vocab = outputs = BYTES + 256
    kinds = ("encoder_decoder", "decoder")
    chance = math.log2(BYTES + 256)
    blank, begin, stop = BLANK, (BEGIN,), (END,)

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        hub: str | None = None,
        config: str | None = None,
        source: str = "de",
        target: str = "en",
    ):
        super().__init__(setting)
        if (path is None) == (hub is None):
            raise ValueError(f"sentences are read from path= or from hub=: {_GIVE} as path=...")
        if config is not None and hub is None:
            raise ValueError(f"config={config} is for a hub data set: give hub=... too, or drop it")
        if source == target:
            raise ValueError(f"source={source} and target={target} are the same: there is nothing to translate")
        self.source_length = setting.seq_len // 2
        self.corpus = load(path, hub, config, source, target)
        self.rows = {split: self._fitting(split) for split in SPLITS}
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def batch(self, split: Split, step: int) -> Batch:
        """Pairs in an order shuffled anew for every pass over the split: each comes once a pass."""
        count = self.setting.batch
        passes, places = np.divmod(np.arange(step * count, (step + 1) * count), self.examples(split))
        chosen = [self._order(split, int(one))[place] for one, place in zip(passes, places, strict=True)]
        return self.take(split, np.array(chosen))

    def examples(self, split: Split) -> int:
        return len(self.rows[split][0])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        (tokens, ends), S, T = self.rows[split], self.source_length, self.setting.seq_len
        whole = tokens[numbers].astype(np.int32)
        wanted = (np.arange(T)[None] >= S) & (np.arange(T)[None] < ends[numbers][:, None])
        return Batch(whole[:, :-1], whole[:, 1:], wanted.astype(np.float32))

    def encode(self, text: str) -> list[int]:
        """A sentence to translate -> all that stands before its translation."""
        tokens = [byte + BYTES for byte in text.encode()]
        if len(tokens) > self.source_length:
            raise ValueError(f"a sentence of {len(tokens)} bytes, but the model reads {self.source_length}")
        return tokens + [BLANK] * (self.source_length - len(tokens)) + [BEGIN]

    def decode(self, tokens: list[int]) -> str:
        return bytes(token - BYTES for token in tokens if token >= BYTES).decode(errors="replace")

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return self.loss(logits, batch)

    def finish(self, mean: float) -> float:
        """Nats per byte to bits per byte."""
        return mean / math.log(2)

    def describe(self) -> dict:
        """Source, languages, pairs of each split, pairs left out for their length, copies dropped, a sha256 of all."""
        fingerprint = hashlib.sha256(b"".join(tokens.tobytes() for tokens, _ in self.rows.values()))
        sizes = {f"{split}_pairs": len(tokens) for split, (tokens, _) in self.rows.items()}
        longer = sum(map(len, self.corpus.splits.values())) - sum(sizes.values())
        names = {"source": self.corpus.source, "languages": self.corpus.languages}
        return {**names, **sizes, "too_long": longer, "copies_dropped": self.corpus.dropped} | {
            "sha256": fingerprint.hexdigest()
        }

    def _fitting(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, seq_len + 1) of the pairs that fit, uint16, and where each asks for its end, plus one (n,)."""
        S, T = self.source_length, self.setting.seq_len
        fitting = [pair for pair in self.corpus.splits[split] if len(pair[0]) <= S and len(pair[1]) < T - S]
        if not fitting:
            many = len(self.corpus.splits[split])
            raise ValueError(
                f"of {many} {split} pairs of {self.corpus.source} none has a source of at most {S} bytes and a "
                f"translation of at most {T - S - 1}: use a larger seq_len"
            )
        tokens = np.full((len(fitting), T + 1), BLANK, np.uint16)
        for row, (source, target) in zip(tokens, fitting, strict=True):
            row[: len(source)] = np.frombuffer(source, np.uint8).astype(np.uint16) + BYTES
            row[S] = BEGIN
            row[S + 1 : S + 1 + len(target)] = np.frombuffer(target, np.uint8).astype(np.uint16) + BYTES
            row[S + 1 + len(target)] = END
        return tokens, np.array([S + len(target) + 1 for _, target in fitting])

    def _shuffled(self, split: Split, one: int) -> np.ndarray:
        return _splits.generator(self.setting.seed, split, one).permutation(len(self.rows[split][0]))


class Corpus(NamedTuple):
    """Pairs of sentences of each split, UTF-8; dropped: copies of pairs held out."""

    source: str
    languages: str
    splits: dict[Split, list[Pair]]
    dropped: int


@functools.lru_cache(maxsize=4)
def load(path: str | None, hub: str | None, config: str | None, source: str, target: str) -> Corpus:
    """Read the pairs of all splits; once per process."""
    if hub is not None:
        pairs, where = _from_columns(_sources.hub("translate", hub, config), source, target), f"hub {hub}"
    else:
        assert path is not None
        place, where = _sources.existing("translate", path), path
        if _sources.is_table(place):
            pairs = _from_columns(_sources.tables("translate", place), source, target)
        else:
            pairs = _from_files(path, place, source, target)
    parts = _sources.resplit("translate", pairs, lambda pair: b"\n".join(pair))
    held, splits = set(), {}
    for split in reversed(SPLITS):
        splits[split] = [pair for pair in parts[split] if pair not in held]
        held.update(splits[split])
    dropped = sum(map(len, parts.values())) - sum(map(len, splits.values()))
    return Corpus(where, f"{source}-{target}", {split: splits[split] for split in SPLITS}, dropped)


def _from_columns(
    columns: dict[Split | None, _sources.Columns], source: str, target: str
) -> dict[Split | None, list[Pair]]:
    pairs = {}
    for split, table in columns.items():
        names = (_sources.pick("translate", *side, (), table) for side in (("source", source), ("target", target)))
        sides = (_sources.texts("translate", name, table[name]) for name in names)
        pairs[split] = list(zip(*sides, strict=True))
    return pairs


def _from_files(path: str, folder: pathlib.Path, source: str, target: str) -> dict[Split | None, list[Pair]]:
    """Every pair of files whose names differ in the language alone."""
    sides: dict[str, dict[str, pathlib.Path]] = {}
    for file in _sources.files(folder) if folder.is_dir() else []:
        stem, _, language = file.name.removesuffix(".gz").rpartition(".")
        if language in (source, target):
            other = sides.setdefault(stem, {}).setdefault(language, file)
            if other.parent != file.parent:
                raise UsageError(
                    f"translate: {other} and {file} have the same name: keep one, or give path= its folder"
                )
    pairs = {stem: files for stem, files in sides.items() if len(files) == 2}
    if not pairs:
        raise UsageError(f"translate: path={path} has no pair of files ending in .{source} and .{target}: {_GIVE}")
    sentences: dict[Split | None, list[Pair]] = {}
    for stem, files in pairs.items():
        first, second = (_lines(files[language]) for language in (source, target))
        if len(first) != len(second):
            raise UsageError(
                f"translate: {files[source]} has {len(first)} lines and {files[target]} {len(second)}: "
                "they must be pairs"
            )
        whole = [pair for pair in zip(first, second, strict=True) if all(pair)]
        sentences.setdefault(_sources.split_name(stem), []).extend(whole)
    return sentences


def _lines(file: pathlib.Path) -> list[bytes]:
    content = _sources.read("translate", file)
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"translate: cannot read {file}: {error}") from error
    return [line.strip() for line in content.splitlines()]
