"""Translate: pairs of sentences, byte by byte or by subwords."""

import functools
import hashlib
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Produce, Setting, Split, _tokens
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading import account, columns, files, layout, lines, names, saved, splits, tables
from xformers_lab.tasks._reading.splits import Overlap

# Symbols before the bytes or subwords: what fills a sentence up, what begins a translation, what ends it.
BLANK, BEGIN, END, FIRST = 0, 1, 2, 3
_GIVE = "give a folder with pairs of files like train.de and train.en (also .gz), or a table with a column for each"

Pair = tuple[bytes, bytes]
Read = tuple[dict[Split | None, list[Pair]], account.Account]


class Translate(InPasses):
    """Translation of sentences (machine translation as in Vaswani et al., 2017, arXiv 1706.03762), by bytes (as in
    ByT5: Xue et al., 2021, arXiv 2105.13626) or by subwords that both languages share (Sennrich et al., 2016, arXiv
    1508.07909), trained on both sides of the training pairs.

    A sequence is `source, blanks, BEGIN, translation, END, blanks`: the first half of seq_len, rounded down, is the
    source's, which an encoder-decoder reads, and the model is asked for the translation and its end alone. Pairs of
    which a side does not fit are left out and counted. Read are pairs of files with a sentence in every line, named by
    split and language (train.de and train.en, also compressed), or two columns of a table (csv, json, parquet) or hub
    data set. Several files of one split are read together. A split that the data lack is taken from train by a hash of
    the pair; a pair of test or validation data is dropped from the data trained on. A line ends at a line feed alone.

    Options:
        path: a folder of pairs of files, or a table
        hub: a data set on the hub
        config: which configuration of the hub data set
        source: the language translated from: the ending of its files, or its column
        target: the language translated to
        header: whether the first line of a csv names its columns (false: they are called 0, 1, 2, ...)
        overlap: what becomes of training pairs that are held out too: keep, drop, or refuse
        tokens: bytes; bpe (trained on the training pairs); (file:PATH) with a tokenizer.json; (hub:MODEL)
        vocab: how many tokens a bpe is trained to have, 4096 by default

    Metric: bits per byte of the translation, its end counted as one, whatever the tokens are; lower is better. Beside
    it the perplexity per token, and of what `xlab eval --beams` generates BLEU (Papineni et al., 2002) and chrF
    (Popović, 2015) by sacrebleu (Post, 2018, arXiv 1804.08771). Chance: a uniform guess among all symbols, on the test
    split.
    """

    metric_name = "bits_per_byte"
    higher_is_better = False
    kinds = ("encoder_decoder", "decoder")
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
        header: bool = True,
        overlap: Overlap = "drop",
        tokens: str = "bytes",
        vocab: int | None = None,
    ):
        super().__init__(setting)
        if (path is None) == (hub is None):
            raise ValueError(f"sentences are read from path= or from hub=: {_GIVE} as path=...")
        if config is not None and hub is None:
            raise ValueError(f"config={config} is for a hub data set: give hub=... too, or drop it")
        if source == target:
            raise ValueError(f"source={source} and target={target} are the same: there is nothing to translate")
        self.source_length = setting.seq_len // 2
        if not header and path is None:
            raise ValueError("header=false is for a csv file: give path=... too, or drop it")
        corpus = load(path, hub, config, source, target, header, files.stamp("translate", path))
        copies = splits.shared(splits.each(corpus.splits, lambda pairs: list(map(_stripped, pairs))))
        dropped = splits.settle("translate", corpus.source, copies, overlap)
        kept: dict[Split, list[Pair]] = {
            split: splits.without(pairs, dropped[split]) for split, pairs in corpus.splits.items()
        }
        self.corpus = corpus._replace(splits=kept)
        self.dropped = sum(map(len, dropped.values()))
        self.tokens = _tokens.of("translate", tokens, vocab, lambda: [side for pair in kept["train"] for side in pair])
        self.vocab = self.outputs = FIRST + self.tokens.vocab
        self.tokenizer = self.tokens.named(FIRST)
        self.sizes = np.concatenate([np.array([0, 0, 1], np.float32), self.tokens.sizes])
        encoded = splits.each(
            kept, lambda pairs: [self.tokens.encode_all([pair[side] for pair in pairs]) for side in (0, 1)]
        )
        self.rows: dict[Split, tuple[np.ndarray, np.ndarray]] = {
            split: self._fitting(split, *encoded[split]) for split in SPLITS
        }
        sizes = splits.each(self.rows, lambda part: len(part[0]))
        longer = [
            f"{split}: {many:,} pairs left out: a side does not fit into seq_len={setting.seq_len}"
            for split, pairs in kept.items()
            if (many := len(pairs) - sizes[split])
        ]
        counts = splits.each(copies, len)
        of_train = np.concatenate([ids for side in encoded["train"] for ids in side])
        read = corpus.account.saying([*longer, *self.tokens.reading(of_train)])
        self.read = account.record(read, sizes, counts, unit="pair", overlap=overlap)
        test = self.take("test", np.arange(sizes["test"]))
        answers = np.asarray(test.targets)[np.asarray(test.weights) > 0]
        self.chance = math.log2(self.vocab) * len(answers) / float(self.sizes[answers].sum())

    def examples(self, split: Split) -> int:
        return len(self.rows[split][0])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        (tokens, ends), S, T = self.rows[split], self.source_length, self.setting.seq_len
        whole = tokens[numbers].astype(np.int32)
        wanted = (np.arange(T)[None] >= S) & (np.arange(T)[None] < ends[numbers][:, None])
        return Batch(whole[:, :-1], whole[:, 1:], wanted.astype(np.float32))

    def encode(self, text: str) -> list[int]:
        """A sentence to translate -> all that stands before its translation."""
        tokens = (self.tokens.encode(text.encode()).astype(np.int64) + FIRST).tolist()
        if len(tokens) > self.source_length:
            raise ValueError(
                f"a sentence of {len(tokens)} {self.tokens.unit}, but the model reads {self.source_length}"
            )
        return tokens + [BLANK] * (self.source_length - len(tokens)) + [BEGIN]

    def decode(self, tokens: list[int]) -> str:
        return self.tokens.decode([token - FIRST for token in tokens if token >= FIRST]).decode(errors="replace")

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Nats, and the bytes that the targets stand for."""
        nats, weight = self.loss(logits, batch)
        if self.tokens.tokenizer is not None:
            weight = (jnp.asarray(self.sizes)[batch.targets] * batch.weights).sum()
        return nats, weight

    def finish(self, mean: float) -> float:
        """Nats per byte to bits per byte."""
        return mean / math.log(2)

    def figures(self, loss: float) -> dict[str, float]:
        return {"perplexity": _tokens.perplexity(loss)}

    def generated(self, split: Split, numbers: np.ndarray, produce: Produce) -> dict[str, Any]:
        """BLEU and chrF of translations against the one that the data have, each with its signature of sacrebleu."""
        try:
            from sacrebleu.metrics.bleu import BLEU
            from sacrebleu.metrics.chrf import CHRF
        except ImportError:
            raise UsageError(
                "translate: BLEU and chrF are counted by sacrebleu: pip install 'xformers_lab[text]'"
            ) from None
        (tokens, ends), S = self.rows[split], self.source_length
        rows = tokens[numbers].astype(np.int64)
        prompts = rows[:, : S + 1].tolist()
        wanted = [self.decode(row[S + 1 : end].tolist()) for row, end in zip(rows, ends[numbers], strict=True)]
        said = [self.decode(translation) for translation in produce(prompts, self.setting.seq_len - S - 1)]
        scores: dict[str, Any] = {}
        for name, measure in (("bleu", BLEU()), ("chrf", CHRF())):
            scores[name] = round(measure.corpus_score(said, [wanted]).score, 4)
            scores[f"{name}_signature"] = str(measure.get_signature())
        return scores

    def describe(self) -> dict:
        """Source, languages, pairs of each split, pairs left out for their length, copies dropped, a sha256 of all."""
        fingerprint = hashlib.sha256(b"".join(tokens.tobytes() for tokens, _ in self.rows.values()))
        sizes = {f"{split}_pairs": len(tokens) for split, (tokens, _) in self.rows.items()}
        longer = sum(map(len, self.corpus.splits.values())) - sum(sizes.values())
        about = {"source": self.corpus.source, "languages": self.corpus.languages}
        counts = {**sizes, "too_long": longer, "copies_dropped": self.dropped}
        return (
            about
            | counts
            | self.tokens.describe()
            | {
                "sha256": fingerprint.hexdigest(),
                "reading": self.read,
            }
        )

    def reading(self) -> list[str]:
        return account.words(self.read)

    def _fitting(
        self, split: Split, sources: list[np.ndarray], targets: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, seq_len + 1) of the pairs that fit, and where each asks for its end, plus one (n,)."""
        S, T, unit = self.source_length, self.setting.seq_len, self.tokens.unit
        pairs = zip(sources, targets, strict=True)
        fitting = [(source, target) for source, target in pairs if len(source) <= S and len(target) < T - S]
        if not fitting:
            if not sources:
                copies = splits.empty(self.dropped)
                raise ValueError(f"the {split} split of {self.corpus.source} is empty{copies}: give more pairs")
            raise ValueError(
                f"of {len(sources)} {split} pairs of {self.corpus.source} none has a source of at most {S} {unit} and "
                f"a translation of at most {T - S - 1}: use a larger seq_len"
            )
        tokens = np.full((len(fitting), T + 1), BLANK, np.uint16 if self.vocab <= 2**16 else np.uint32)
        for row, (source, target) in zip(tokens, fitting, strict=True):
            row[: len(source)] = source.astype(row.dtype) + FIRST
            row[S] = BEGIN
            row[S + 1 : S + 1 + len(target)] = target.astype(row.dtype) + FIRST
            row[S + 1 + len(target)] = END
        return tokens, np.array([S + len(target) + 1 for _, target in fitting])


class Corpus(NamedTuple):
    """Pairs of sentences of each split, UTF-8."""

    source: str
    languages: str
    splits: dict[Split, list[Pair]]
    account: account.Account


def _stripped(pair: Pair) -> Pair:
    return pair[0].strip(), pair[1].strip()


@functools.lru_cache(maxsize=4)
def load(
    path: str | None, hub: str | None, config: str | None, source: str, target: str, header: bool, stamp: str | None
) -> Corpus:
    """Read the pairs of all splits; once per process, and again where the stamp of the files is another."""
    if path is None:
        assert hub is not None
        where, (pairs, read) = f"hub {hub}", _of_tables(saved.from_hub("translate", hub, config), source, target)
    else:
        where, (pairs, read) = path, _of_path(path, source, target, header)
    parts = splits.complete("translate", pairs, lambda pair: b"\n".join(pair))
    return Corpus(where, f"{source}-{target}", parts, read)


def _of_path(path: str, source: str, target: str, header: bool) -> Read:
    place = files.existing("translate", path)
    if place.is_dir() and saved.is_saved(place):
        return _of_tables(saved.from_folder("translate", place), source, target)
    if place.is_file():
        if not tables.is_table(place):
            raise UsageError(f"translate: path={path} is no table: {_GIVE}")
        return _of_tables(tables.read("translate", place, [place], header), source, target)
    all_files = files.below(place)
    stems = _stems(all_files, source, target)
    chosen = [file for file in all_files if tables.is_table(file)]
    if not any(len(sides) == 2 for sides in stems.values()) and chosen:
        return _of_tables(tables.read("translate", place, chosen, header), source, target)
    if not header:
        raise UsageError(f"translate: header=false is for a csv, but path={path} is none")
    return _of_files(path, place, stems, source, target)


def _of_tables(read: tables.Source, source: str, target: str) -> Read:
    pairs: dict[Split | None, list[Pair]] = {}
    parts: dict[Split | None, account.Part] = {}
    for split, of_split in read.tables.items():
        pairs[split], parts[split] = [], account.Part()
        for table in of_split:
            sides = [
                columns.texts("translate", option, wanted, (), table)[1]
                for option, wanted in (("source", source), ("target", target))
            ]
            pairs[split] += zip(*sides, strict=True)
            parts[split] += table.part
    return pairs, account.Account(parts, tuple(read.notes))


def _stems(all_files: list[pathlib.Path], source: str, target: str) -> dict[str, dict[str, pathlib.Path]]:
    """The files that end in one of the languages, by what stands before it."""
    sides: dict[str, dict[str, pathlib.Path]] = {}
    for file in all_files:
        stem, _, language = layout.bare(file).rpartition(".")
        if language in (source, target):
            other = sides.setdefault(stem, {}).setdefault(language, file)
            if other != file:
                raise UsageError(
                    f"translate: {other} and {file} have the same name: keep one, or give path= its folder"
                )
    return sides


def _of_files(
    path: str, root: pathlib.Path, stems: dict[str, dict[str, pathlib.Path]], source: str, target: str
) -> Read:
    """Every pair of files whose names differ in the language alone."""
    pairs = {stem: sides for stem, sides in stems.items() if len(sides) == 2}
    if not pairs:
        raise UsageError(f"translate: path={path} has no pair of files ending in .{source} and .{target}: {_GIVE}")
    of_no_split = [stem for stem in pairs if names.split_of(stem) is None]
    if of_no_split and len(of_no_split) < len(pairs):
        raise UsageError(
            f"translate: path={path}: {of_no_split[0]}.{source} is of no split beside files that are: name each like "
            f"train.{source}, valid.{source}, test.{source}, or none"
        )
    sentences: dict[Split | None, list[Pair]] = {}
    parts: dict[Split | None, account.Part] = {}
    for stem, sides in pairs.items():
        contents = [lines.text_bytes("translate", sides[language]) for language in (source, target)]
        first, second = (
            [line.strip() for line in lines.split("translate", sides[language], content)]
            for language, content in zip((source, target), contents, strict=True)
        )
        if len(first) != len(second):
            raise UsageError(
                f"translate: {sides[source]} has {len(first)} lines and {sides[target]} {len(second)}: "
                "they must be pairs"
            )
        whole = [pair for pair in zip(first, second, strict=True) if all(pair)]
        split = names.split_of(stem)
        sentences.setdefault(split, []).extend(whole)
        blank = {"a side is blank": len(first) - len(whole)} if len(whole) < len(first) else {}
        name = f"{sides[source].relative_to(root).as_posix()} + .{target}"
        part = account.Part((name,), len(first), len(first), sum(map(len, contents)), blank)
        parts[split] = parts.get(split, account.Part()) + part
    read = {file for sides in pairs.values() for file in sides.values()}
    notes = layout.ignored(root, [file for file in files.below(root) if file not in read])
    return sentences, account.Account(parts, tuple(notes))
