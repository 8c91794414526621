"""Babi: questions about short stories."""

import functools
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading import account, files, layout, lines, splits
from xformers_lab.tasks._reading.splits import Overlap

# Tokens before the words: what fills a row up, a word that training lacks, the ends of a sentence and of the question.
BLANK, UNKNOWN, SENTENCE, QUESTION = range(4)
_SIGNS = ("", "(unknown)", ".", "?")
# The class of an answer that training lacks.
UNHEARD = 0
_NUMBERS = range(1, 21)
_FILE = re.compile(r"qa(?P<number>[0-9]+)(_.+)?_(?P<split>train|valid|test)\.txt")
_SPLITS: dict[str, Split] = {"train": "train", "valid": "validation", "test": "test"}
_LINE = re.compile(r"(?P<at>[0-9]+) (?P<text>[^\t]+)(\t(?P<answer>[^\t]+)(\t(?P<facts>[0-9 ]*))?)?")

Words = tuple[str, ...]


class Babi(InPasses):
    """bAbI, questions about short stories (Weston et al., 2015, arXiv 1502.05698).

    `mary went to the kitchen . john got the milk . where is mary ?` is answered by `kitchen`. A sequence is the
    sentences of the story up to the question, the question, padding; questions before it are left out. Words are in
    lower case, a sign stands behind each sentence and another one behind the question, other signs are dropped. Words
    and answers are those of the training split: another word is one token of its own, and another answer counts as
    wrong. An answer of several words, `milk,football`, is a class like any other. A story that does not fit loses its
    first sentences, which is counted and said. The question's words are marked. Test data are the published ones,
    validation too where there are such files (valid); else it is a tenth of the training stories, each with all of its
    questions, by a hash of the story.

    Tasks 1, 2 and 3 ask for one, two and three supporting facts. With the question a story has at most 72, 557 and
    1,400 tokens or so there, and half of those of 2 and 3 have fewer than 93 and 262.

    Options:
        path: a folder with the published files of one size and language, qa1_NAME_train.txt and so on (also compressed)
        number: which task, 1 to 20; 1+2+3 joins several, which share words and answers
        overlap: what becomes of training questions that are held out too, story and all: keep, drop, or refuse

    Metric: accuracy. Chance: 1 / answers.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")

    def __init__(self, setting: Setting, *, path: str | None = None, number: str = "1", overlap: Overlap = "drop"):
        super().__init__(setting)
        if path is None:
            raise ValueError("stories are read from path=: give path= the folder with bAbI's files, such as en-10k")
        corpus = load(path, _numbers(number), files.stamp("babi", path))
        self.source, self.number = corpus.source, number
        self.words = (*_SIGNS, *sorted({word for each in corpus.splits["train"] for word in each.words}))
        self.answers = ("(unheard)", *sorted({each.answer for each in corpus.splits["train"]}))
        self.vocab, self.outputs, self.chance = len(self.words), len(self.answers), 1 / (len(self.answers) - 1)
        self.tokenizer = f"{self.vocab:,} words {hashlib.sha256(' '.join(self.words).encode()).hexdigest()[:12]}"
        self._token = {word: token for token, word in enumerate(self.words) if token >= len(_SIGNS)}
        most = max(len(each.question) + 1 for of_split in corpus.splits.values() for each in of_split)
        if most > setting.seq_len:
            raise ValueError(f"seq_len={setting.seq_len} does not hold the question alone: use {most} or more")
        self.marks = most
        fitted = splits.each(corpus.splits, lambda asked: [_fitted(each, setting.seq_len) for each in asked])
        rows = splits.each(fitted, lambda asked: [self._tokens(each) for each in asked])
        copies = splits.shared(splits.each(rows, lambda of: [row.tobytes() for row in of]))
        dropped = splits.settle("babi", self.source, copies, overlap)
        self.dropped = sum(map(len, dropped.values()))
        classes = {answer: at for at, answer in enumerate(self.answers)}
        self.rows: dict[Split, list[np.ndarray]] = {}
        self.targets: dict[Split, np.ndarray] = {}
        self.cut: dict[Split, int] = {}
        notes = []
        for split in SPLITS:
            kept = splits.without(list(zip(corpus.splits[split], fitted[split], strict=True)), dropped[split])
            if not kept:
                raise ValueError(
                    f"the {split} split of {self.source} has no question{splits.empty(self.dropped)}: give more stories"
                )
            self.rows[split] = splits.without(rows[split], dropped[split])
            self.targets[split] = np.array([classes.get(each.answer, UNHEARD) for each, _ in kept], np.int32)
            shorter = [each for each, seen in kept if len(seen.story) < len(each.story)]
            lost = sum(min(each.facts) < len(each.story) - len(seen.story) for each, seen in kept if each.facts)
            self.cut[split] = len(shorter)
            if shorter:
                notes.append(
                    f"{split}: stories cut on the left to fit into seq_len={setting.seq_len}: {len(shorter):,}, of "
                    f"which without a fact that the answer needs: {lost:,}"
                )
            if unheard := int((self.targets[split] == UNHEARD).sum()):
                notes.append(f"{split}: answers that the training data lack, which count as wrong: {unheard:,}")
            if strange := sum(bool((row == UNKNOWN).any()) for row in self.rows[split]):
                notes.append(f"{split}: stories with words that the training data lack: {strange:,}")
        counts, sizes = splits.each(copies, len), splits.each(self.rows, len)
        answers = splits.each(self.targets, lambda of: len(np.unique(of)))
        told = corpus.account.saying(notes)
        self.read = account.record(told, sizes, counts, unit="question", classes=answers, overlap=overlap)

    def examples(self, split: Split) -> int:
        return len(self.rows[split])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        inputs = np.full((len(numbers), self.setting.seq_len), BLANK, np.int32)
        for row, number in zip(inputs, numbers, strict=True):
            tokens = self.rows[split][number]
            row[: len(tokens)] = tokens
        weights, real = np.ones(len(numbers), np.float32), inputs != BLANK
        # The question is what stands behind the last sentence.
        told = np.maximum.accumulate((inputs == SENTENCE)[:, ::-1], 1)[:, ::-1]
        return Batch(inputs, self.targets[split][numbers], weights, real, marked=real & ~told)

    def encode(self, text: str) -> list[int]:
        """A story and a question as they are written: "Mary went to the kitchen. Where is Mary?" """
        tokens = []
        for sentence, end in re.findall(r"([^.?]+)([.?]?)", text):
            words = _words(sentence)
            if unknown := [word for word in words if word not in self._token]:
                raise ValueError(f'"{layout.shown(unknown[0])}" is no word of the training data')
            tokens += [self._token[word] for word in words]
            tokens += [SENTENCE if end == "." else QUESTION] if end and words else []
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return " ".join(filter(None, (self.words[token] for token in tokens)))

    def answer_name(self, answer: int) -> str:
        return self.answers[answer]

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(right answers, questions); no answer is right where the training data lack the right one."""
        weights = jnp.asarray(batch.weights)
        right = (logits.argmax(-1) == batch.targets) & (jnp.asarray(batch.targets) != UNHEARD)
        return (right * weights).sum(), weights.sum()

    def describe(self) -> dict:
        """Source, which tasks, questions of each split, words and answers, the longest story, how many were cut, share
        of the most frequent answer, sha256."""
        fingerprint = hashlib.sha256(" ".join((*self.words, *self.answers)).encode())
        for split in SPLITS:
            for row, target in zip(self.rows[split], self.targets[split], strict=True):
                fingerprint.update(b"%d %d " % (len(row), target) + row.tobytes())
        counts = np.bincount(self.targets["test"])
        return {
            "source": self.source,
            "number": self.number,
            **{f"{split}_questions": len(rows) for split, rows in self.rows.items()},
            "words": len(self.words) - len(_SIGNS),
            "answers": len(self.answers) - 1,
            "longest": {split: max(map(len, rows)) for split, rows in self.rows.items()},
            "cut": self.cut,
            "copies_dropped": self.dropped,
            "majority": round(float(counts.max() / counts.sum()), 4),
            "sha256": fingerprint.hexdigest(),
            "reading": self.read,
        }

    def reading(self) -> list[str]:
        return account.words(self.read)

    def _tokens(self, asked: "Asked") -> np.ndarray:
        """(n,) int32, without padding."""
        known = lambda words: [self._token.get(word, UNKNOWN) for word in words]
        tokens = [token for sentence in asked.story for token in (*known(sentence), SENTENCE)]
        return np.array([*tokens, *known(asked.question), QUESTION], np.int32)


class Asked(NamedTuple):
    """A question, the sentences before it, its answer, and which of these sentences it rests on, from 0."""

    story: Sequence[Words]
    question: Words
    answer: str
    facts: Sequence[int]

    @property
    def words(self) -> set[str]:
        return {word for sentence in self.story for word in sentence} | set(self.question)

    @property
    def length(self) -> int:
        """How many tokens it takes."""
        return sum(len(sentence) + 1 for sentence in (*self.story, self.question))


class Corpus(NamedTuple):
    """The questions of each split."""

    source: str
    splits: dict[Split, list[Asked]]
    account: account.Account


def _numbers(number: str) -> tuple[int, ...]:
    """The tasks that `1+2+3` names, each once."""
    parts = number.split("+")
    if not all(part.isdecimal() and int(part) in _NUMBERS for part in parts):
        raise ValueError(f"number={number}: use 1 to 20, or several of these, such as 1+2+3")
    if len(set(map(int, parts))) < len(parts):
        raise ValueError(f"number={number}: names a task twice")
    return tuple(map(int, parts))


def _fitted(asked: Asked, length: int) -> Asked:
    """The same without as many of its first sentences as do not fit."""
    over, first = asked.length - length, 0
    while over > 0:
        over -= len(asked.story[first]) + 1
        first += 1
    return asked._replace(story=asked.story[first:])


@functools.lru_cache(maxsize=4)
def load(path: str, numbers: tuple[int, ...], stamp: str | None) -> Corpus:
    """Read the stories of some tasks; once per process, and again where the stamp of the files is another."""
    root = files.existing("babi", path)
    chosen = _files(path, root, numbers)
    stories: dict[Split | None, list[list[Asked]]] = {}
    parts: dict[Split | None, account.Part] = {}
    for split, of_split in chosen.items():
        stories[split], parts[split] = [], account.Part()
        for file in of_split:
            content = lines.text_bytes("babi", file)
            lines.decoded("babi", file, content)  # for the line that is no UTF-8
            rows = lines.split("babi", file, content)
            read = _stories(file, [row.decode() for row in rows])
            stories[split] += read
            shown = (file.relative_to(root).as_posix(),)
            parts[split] += account.Part(shown, sum(map(len, read)), len(rows), len(content))
    read_files = {file for of_split in chosen.values() for file in of_split}
    others = [file for file in files.below(root) if file not in read_files and not _FILE.fullmatch(layout.bare(file))]
    complete = splits.complete("babi", stories, lambda story: repr((story[-1].story, story[-1].question)).encode())
    asked = splits.each(complete, lambda of_split: [each for story in of_split for each in story])
    return Corpus(path, asked, account.Account(parts, tuple(layout.ignored(root, others))))


def _files(path: str, root: pathlib.Path, numbers: tuple[int, ...]) -> dict[Split, list[pathlib.Path]]:
    """The files of some tasks, in their order; raises UsageError where one is missing, or there twice."""
    found: dict[tuple[int, Split], pathlib.Path] = {}
    for file in files.below(root) if root.is_dir() else ():
        if match := _FILE.fullmatch(layout.bare(file)):
            place = int(match["number"]), _SPLITS[match["split"]]
            if place[0] in numbers and (other := found.setdefault(place, file)) != file:
                raise UsageError(f"babi: {other} and {file} are of one task and split: give path= the folder of one")
    has = lambda number, *wanted: all((number, split) in found for split in wanted)
    if not found:
        raise UsageError(
            f"babi: path={path} has no files of task {numbers[0]} like qa{numbers[0]}_NAME_train.txt and "
            f"qa{numbers[0]}_NAME_test.txt (also .gz)"
        )
    wanted: list[Split] = [split for split in SPLITS if split != "validation" or has(numbers[0], split)]
    for number in numbers:
        if missing := [split for split in wanted if not has(number, split)]:
            named = next(name for name, split in _SPLITS.items() if split == missing[0])
            raise UsageError(
                f"babi: path={path} has no {missing[0]} file of task {number}: add qa{number}_NAME_{named}.txt"
            )
    return {split: [found[number, split] for number in numbers] for split in wanted}


def _stories(file: pathlib.Path, rows: Sequence[str]) -> list[list[Asked]]:
    """The questions of each story of a file; raises UsageError that names a line."""
    stories: list[list[Asked]] = []
    sentences: list[Words] = []
    place: dict[str, int] = {}  # of a line of the story among its sentences
    for number, text in enumerate(rows, 1):
        if not text.strip():
            continue
        where = f"babi: {file}, line {number}"
        if not (match := _LINE.fullmatch(text.rstrip())) or not (words := _words(match["text"])):
            raise UsageError(f"{where} is not like 1 Mary went home. or 2 Where is Mary?<tab>home<tab>1")
        if match["at"] == "1":
            sentences, place = [], {}
            stories.append([])
        elif not stories:
            raise UsageError(f"{where}: a story begins with line 1, not {match['at']}")
        if (answer := match["answer"]) is None:
            place[match["at"]] = len(sentences)
            sentences.append(words)
            continue
        named = (match["facts"] or "").split()
        if unknown := [fact for fact in named if fact not in place]:
            raise UsageError(f"{where}: supporting fact {unknown[0]} is no sentence before it")
        asked = Asked(tuple(sentences), words, answer.strip().lower(), tuple(place[fact] for fact in named))
        stories[-1].append(asked)
    return [story for story in stories if story]


def _words(text: str) -> Words:
    """Words in lower case without the signs around them."""
    return tuple(word for part in text.lower().split() if (word := part.strip(".,?!;:\"'")))
