"""Scan: commands to the actions they mean."""

import functools
import hashlib
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.errors import UsageError, nearest
from xformers_lab.tasks import SPLITS, Batch, Setting, Split
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading import account, columns, files, layout, lines, saved, splits
from xformers_lab.tasks._reading.splits import Overlap

# Symbols before the words: what fills a command up, what begins its actions, what ends them.
BLANK, BEGIN, END = 0, 1, 2
COMMANDS = [
    "walk",
    "look",
    "run",
    "jump",
    "turn",
    "left",
    "right",
    "opposite",
    "around",
    "twice",
    "thrice",
    "and",
    "after",
]
ACTIONS = ["I_WALK", "I_LOOK", "I_RUN", "I_JUMP", "I_TURN_LEFT", "I_TURN_RIGHT"]
SIGNS = ("", "", "", *COMMANDS, *ACTIONS)
# Words of the longest command: as many positions are the source's at every seq_len.
SOURCE = 9
_LINE = re.compile(rb"IN: (?P<command>[^:]+) OUT: (?P<actions>[^:]+)")
_FILE = re.compile(r"tasks_(?P<side>train|test)_(?P<split>.+)\.txt")

Pair = tuple[bytes, bytes]


class Scan(InPasses):
    """SCAN, commands of a small language and the actions they mean (Lake and Baroni, 2018, arXiv 1711.00350).

    `jump left twice` is I_TURN_LEFT I_JUMP I_TURN_LEFT I_JUMP. A sequence is `command, blanks, BEGIN, actions, END,
    blanks`, the command and its blanks being the first 9 tokens, which an encoder-decoder reads; the model is asked for
    the actions and their end alone. The published splits say what is to be generalised: `length` tests on 24 to 48
    actions where training has up to 22, so seq_len=58 or more holds it; `addprim_jump` on `jump` within commands, which
    training has alone. Test data are the published ones; validation is a tenth of the training data by a hash of the
    command, and so of the same kind as these. Examples that do not fit seq_len are left out and counted.

    Options:
        path: a folder with the published files, tasks_train_length.txt and so on (also compressed)
        hub: a data set on the hub, with columns commands and actions, whose configuration is the split
        split: which published split: simple, length, addprim_jump, ...
        overlap: what becomes of training commands that are held out too: keep, drop, or refuse

    Metric: exact match, the share of commands of which every action and the end are right. A model that is right at
    every action given those before says the same when it decodes greedily. Chance: 0.
    """

    metric_name = "exact_match"
    kinds = ("encoder_decoder", "decoder")
    vocab = outputs = len(SIGNS)
    chance = 0.0
    source_length = SOURCE
    blank, begin, stop = BLANK, (BEGIN,), (END,)

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        hub: str | None = None,
        split: str = "simple",
        overlap: Overlap = "drop",
    ):
        super().__init__(setting)
        if (path is None) == (hub is None):
            raise ValueError("commands are read from path= or from hub=: give path= a folder with SCAN's files")
        corpus = load(path, hub, split, files.stamp("scan", path))
        copies = splits.shared(splits.each(corpus.splits, lambda pairs: [command for command, _ in pairs]))
        dropped = splits.settle("scan", corpus.source, copies, overlap)
        kept = {name: splits.without(pairs, dropped[name]) for name, pairs in corpus.splits.items()}
        self.dropped, room = sum(map(len, dropped.values())), setting.seq_len - SOURCE - 1
        self.rows: dict[Split, np.ndarray] = {}
        notes = []
        for name in SPLITS:
            pairs = kept[name]
            fitting = [pair for pair in pairs if len(pair[1].split()) <= room]
            if not fitting:
                most = max((len(actions.split()) for _, actions in pairs), default=0)
                more = f"the longest has {most} actions: use seq_len={most + SOURCE + 1}" if most else "give more data"
                raise ValueError(f"the {name} split of {corpus.source} has no example that fits: {more}")
            if longer := len(pairs) - len(fitting):
                notes.append(f"{name}: {longer:,} examples left out: they do not fit into seq_len={setting.seq_len}")
            self.rows[name] = self._tokens(fitting)
        self.source, self.split = corpus.source, split
        self.longer = sum(map(len, kept.values())) - sum(map(len, self.rows.values()))
        counts = splits.each(copies, len)
        sizes = splits.each(self.rows, len)
        self.read = account.record(corpus.account.saying(notes), sizes, counts, unit="example", overlap=overlap)

    def examples(self, split: Split) -> int:
        return len(self.rows[split])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        whole = self.rows[split][numbers]
        wanted = whole[:, 1:] != BLANK
        wanted[:, :SOURCE] = False
        return Batch(whole[:, :-1], whole[:, 1:], wanted.astype(np.float32))

    def encode(self, text: str) -> list[int]:
        """A command as it is written -> all that stands before its actions."""
        words = text.split()
        if wrong := [word for word in words if word not in COMMANDS]:
            raise ValueError(f'"{wrong[0]}" is no word of a command: {" ".join(COMMANDS)}')
        if len(words) > SOURCE:
            raise ValueError(f"a command of {len(words)} words, but the longest has {SOURCE}")
        return [SIGNS.index(word) for word in words] + [BLANK] * (SOURCE - len(words)) + [BEGIN]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(filter(None, (SIGNS[token] for token in tokens)))

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(commands of which every answer is right, commands)."""
        weights = jnp.asarray(batch.weights)
        wrong = ((logits.argmax(-1) != batch.targets) * weights).sum(-1)
        asked = weights.max(-1)
        return ((wrong == 0) * asked).sum(), asked.sum()

    def describe(self) -> dict:
        """Source, which split, examples of each part, what was left out, and a sha256 of all."""
        return {
            "source": self.source,
            "split": self.split,
            **{f"{name}_examples": len(rows) for name, rows in self.rows.items()},
            "longest": {name: int((rows[:, SOURCE + 1 :] > END).sum(1).max()) for name, rows in self.rows.items()},
            "too_long": self.longer,
            "copies_dropped": self.dropped,
            "sha256": hashlib.sha256(b"".join(rows.tobytes() for rows in self.rows.values())).hexdigest(),
            "reading": self.read,
        }

    def reading(self) -> list[str]:
        return account.words(self.read)

    def _tokens(self, pairs: list[Pair]) -> np.ndarray:
        """(n, seq_len + 1) int32."""
        tokens = np.full((len(pairs), self.setting.seq_len + 1), BLANK, np.int32)
        number = {sign.encode(): at for at, sign in enumerate(SIGNS)}
        for row, (command, actions) in zip(tokens, pairs, strict=True):
            source, target = ([number[word] for word in side.split()] for side in (command, actions))
            row[: len(source)] = source
            row[SOURCE : SOURCE + len(target) + 2] = [BEGIN, *target, END]
        return tokens


class Corpus(NamedTuple):
    """A command and its actions, words with spaces between, for each example of each split."""

    source: str
    splits: dict[Split, list[Pair]]
    account: account.Account


@functools.lru_cache(maxsize=4)
def load(path: str | None, hub: str | None, split: str, stamp: str | None) -> Corpus:
    """Read one published split; once per process, and again where the stamp of the files is another."""
    pairs: dict[Split | None, list[Pair]] = {}
    parts: dict[Split | None, account.Part] = {}
    if path is None:
        assert hub is not None
        name, source = f"hub {hub}", saved.from_hub("scan", hub, split)
        for part, of_part in source.tables.items():
            for table in of_part:
                sides = [columns.texts("scan", "hub", None, (column,), table)[1] for column in ("commands", "actions")]
                pairs.setdefault(part, []).extend(
                    _checked(pair, table.where(row)) for row, pair in enumerate(zip(*sides, strict=True))
                )
                parts[part] = parts.get(part, account.Part()) + table.part
        notes = source.notes
    else:
        name, root = path, files.existing("scan", path)
        chosen = _files(path, root, split)
        for side, file in chosen.items():
            content = lines.text_bytes("scan", file)
            rows = lines.split("scan", file, content)
            pairs[side] = [_parsed(row, f"{file}, line {at}") for at, row in enumerate(rows, 1) if row.strip()]
            shown = (file.relative_to(root).as_posix(),)
            parts[side] = account.Part(shown, len(pairs[side]), len(rows), len(content))
        notes = layout.ignored(root, [file for file in files.below(root) if file not in chosen.values()])
    complete = splits.complete("scan", pairs, lambda pair: pair[0])
    return Corpus(name, complete, account.Account(parts, tuple(notes)))


def _files(path: str, root: pathlib.Path, split: str) -> dict[Split, pathlib.Path]:
    """The train and the test file of a published split; raises UsageError where there are none, or two of a name."""
    found: dict[str, dict[Split, pathlib.Path]] = {}
    for file in files.below(root) if root.is_dir() else ():
        if match := _FILE.fullmatch(layout.bare(file)):
            side: Split = "train" if match["side"] == "train" else "test"
            if (other := found.setdefault(match["split"], {}).setdefault(side, file)) != file:
                raise UsageError(f"scan: {other} and {file} have the same name: keep one, or give path= its folder")
    whole = {name: sides for name, sides in found.items() if len(sides) == 2}
    if not whole:
        raise UsageError(
            f"scan: path={path} has no pair of files like tasks_train_simple.txt and tasks_test_simple.txt (also .gz)"
        )
    if split not in whole:
        raise UsageError(f"scan: split={split}: path={path} has no such split: {nearest(split, whole, 'splits')}")
    return whole[split]


def _parsed(line: bytes, where: str) -> Pair:
    """A line `IN: command OUT: actions`; raises UsageError."""
    if not (match := _LINE.fullmatch(line.strip())):
        raise UsageError(f"scan: {where} is not like IN: jump twice OUT: I_JUMP I_JUMP")
    return _checked((match["command"], match["actions"]), where)


def _checked(pair: Pair, where: str) -> Pair:
    """The pair, if its words are known; raises UsageError."""
    for side, known in zip(pair, (COMMANDS, ACTIONS), strict=True):
        words = side.decode(errors="replace").split()
        if wrong := [word for word in words if word not in known]:
            raise UsageError(f'scan: {where}: unknown word "{layout.shown(wrong[0])}": {nearest(wrong[0], known)}')
    if not 1 <= len(pair[0].split()) <= SOURCE or not pair[1].split():
        raise UsageError(f"scan: {where}: a command has 1 to {SOURCE} words, and one action or more")
    return pair
