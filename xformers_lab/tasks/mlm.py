"""Mlm: fill in bytes, or subwords, that are hidden, to train an encoder before it classifies."""

from typing import Literal

import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split, Task, _splits
from xformers_lab.tasks._reading.splits import Overlap
from xformers_lab.tasks.lm import Lm
from xformers_lab.tasks.text import Text

# The byte that no UTF-8 has. So the vocabulary is that of `text`, whose embeddings a trained model hands on.
HIDDEN_BYTE = 0xFF
MASK = HIDDEN_BYTE + 1
# Of the chosen tokens, those that are hidden and those that are replaced (Devlin et al., section 3.1).
_HIDDEN, _REPLACED = 0.8, 0.1
_MASKS = 1  # what else is random about a batch


class Mlm(Task):
    """Masked language modelling (BERT: Devlin et al., 2019, arXiv 1810.04805) of bytes or subwords.

    A share of the tokens of a sequence is chosen, one at least, anew at every step; of these 80 % are hidden by a mask,
    10 % are replaced by a random token and 10 % stay, and the model is asked for what stood there. In an evaluation the
    choice depends on the example alone. Sequences are the documents of task `text`, read with the same options, in the
    same splits and by the same tokens, but no label is looked at: a model that has been trained on them can be trained
    further to classify them (self-pretraining: Amos et al., 2023, arXiv 2310.02980). Or they are windows of the text of
    task `lm`. The mask is the token of the byte 0xFF, which no UTF-8 has; text with it is refused. With subwords it is
    a token of its own, the last; the others are those of `text` with the same tokens=.

    Options:
        path: what task `text` reads, or with of=lm what task `lm` does
        hub: a data set on the hub
        config: which configuration of the hub data set
        of: the task whose text it is: text (labelled documents) or lm (any text)
        text_column: the column that holds the text, in a table or hub data set
        label_column: with of=text, the column that holds the class
        header: whether the first line of a csv names its columns (false: they are called 0, 1, 2, ...)
        overlap: what becomes of training documents that are held out too: keep, drop, or refuse
        rate: the share of tokens that is chosen
        tokens: bytes; bpe (trained on the training split); (file:PATH) with a tokenizer.json; (hub:MODEL)
        vocab: how many tokens a bpe is trained to have, 4096 by default

    Metric: accuracy on the chosen tokens. Chance: that of always saying the training split's most frequent token, on
    the test split.
    """

    target = "token"
    kinds = ("encoder",)

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        hub: str | None = None,
        config: str | None = None,
        of: Literal["text", "lm"] = "text",
        text_column: str | None = None,
        label_column: str | None = None,
        header: bool = True,
        overlap: Overlap = "drop",
        rate: float = 0.15,
        tokens: str = "bytes",
        vocab: int | None = None,
    ):
        super().__init__(setting)
        if not 0 < rate <= 1:
            raise ValueError(f"rate={rate:g}: use a share above 0 and at most 1")
        if of == "lm" and label_column is not None:
            raise ValueError(f"label_column={label_column} is of labelled documents: use of=text, or drop it")
        self.rate, self.of = rate, of
        common = {"path": path, "hub": hub, "config": config, "header": header, "overlap": overlap}
        common |= {"tokens": tokens, "vocab": vocab}
        if of == "lm":
            self.texts: Text | Lm = Lm(setting, column=text_column, **common)
        else:
            self.texts = Text(setting, text_column=text_column, label_column=label_column, **common)
        counts = {split: self._counts(split) for split in SPLITS}
        bytes_alone = self.texts.tokens.tokenizer is None
        self.mask = MASK if bytes_alone else self.texts.tokens.vocab + 1
        self.vocab = self.outputs = self.mask + 1
        self.tokenizer = self.texts.tokens.named(1)
        if hidden := [split for split, count in counts.items() if bytes_alone and count[HIDDEN_BYTE]]:
            source = self.texts.describe()["source"]
            raise UsageError(
                f"mlm: the {hidden[0]} split of {source} has the byte 0xff, which stands for the mask and which no "
                "UTF-8 has: turn the text into UTF-8 (iconv -t UTF-8)"
            )
        self.likeliest = int(counts["train"].argmax()) + 1
        self.chance = float(counts["test"][self.likeliest - 1] / counts["test"].sum())

    def batch(self, split: Split, step: int) -> Batch:
        inputs, valid = self._tokens(self.texts.batch(split, step))
        rng = _splits.generator(self.setting.seed, split, step, _MASKS)
        return self._asked(inputs, valid, *self._drawn(rng, inputs.shape))

    def examples(self, split: Split) -> int:
        return self.texts.examples(split)

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        inputs, valid = self._tokens(self.texts.take(split, numbers))
        rows = [self._drawn(_splits.generator(0, split, int(number), _MASKS), inputs[:1].shape) for number in numbers]
        return self._asked(inputs, valid, *map(np.concatenate, zip(*rows, strict=True)))

    def encode(self, text: str) -> list[int]:
        return [token + 1 for token in self.texts.tokens.encode(text.encode()).tolist()]

    def decode(self, tokens: list[int]) -> str:
        parts = [b"\xff" if token == self.mask else self.texts.tokens.decode([token - 1]) for token in tokens if token]
        return b"".join(parts).decode(errors="replace")

    def describe(self) -> dict:
        """What the task whose text it is says of it, the share that is chosen."""
        return self.texts.describe() | {"text_of": self.of, "rate": self.rate}

    def reading(self) -> list[str]:
        return self.texts.reading()

    def _counts(self, split: Split) -> np.ndarray:
        """How often each token comes in what a model sees of a split, (vocab of the tokenizer,)."""
        ids = self.texts.ids[split]
        seen = ids if isinstance(ids, np.ndarray) else np.concatenate(ids)
        return np.bincount(seen, minlength=self.texts.tokens.vocab)

    def _tokens(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Tokens as `text` has them, (B, T), and which are no padding."""
        inputs = np.asarray(batch.inputs)
        if batch.valid is not None:
            return inputs, np.asarray(batch.valid)
        # Of a window that the end of the text cuts off a token is there where the one before it is asked for it.
        there = np.pad(np.asarray(batch.weights)[:, :-1] > 0, ((0, 0), (1, 0)), constant_values=True)
        return np.where(there, inputs + 1, 0), there

    def _drawn(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each token: by which it is chosen, what becomes of it then, and the one that may replace it."""
        return rng.random(shape), rng.random(shape), rng.integers(1, self.mask, shape)

    def _asked(
        self, tokens: np.ndarray, valid: np.ndarray, order: np.ndarray, fate: np.ndarray, replacement: np.ndarray
    ) -> Batch:
        many = np.maximum(np.rint(self.rate * valid.sum(1, keepdims=True)), 1)
        rank = np.where(valid, order, 2.0).argsort(1).argsort(1)
        chosen = valid & (rank < many)
        became = np.where(fate < _HIDDEN, self.mask, np.where(fate < _HIDDEN + _REPLACED, replacement, tokens))
        inputs = np.where(chosen, became, tokens).astype(np.int32)
        return Batch(inputs, tokens.astype(np.int32), chosen.astype(np.float32), valid)
