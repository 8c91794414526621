"""Masked pixels: fill in pixels that are hidden, to train an encoder on images before it classifies them."""

import functools
import math

import jax
import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, _showing, _splits
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading.splits import Overlap
from xformers_lab.tasks.pixels import LEVELS, Pixels

# The token behind the grey levels. So row i of a table of tokens is level i, here and in `pixels`.
MASK = LEVELS
_MASKS = 1  # what else is random about a batch


class MaskedPixels(InPasses):
    """Masked prediction of grey levels, the BERT objective of Image GPT (Chen et al., 2020, Generative Pretraining from
    Pixels, section 2.2).

    Images are those of task `pixels`, read with the same options and in the same splits, but no label is looked at: a
    model that has been trained on them can be trained further to classify them, `init=RUN` (self-pretraining: Amos et
    al., 2023, arXiv 2310.02980). A share of the pixels of an image is chosen, one at least, anew at every step, and
    hidden by a mask; the model is asked for their levels, 0 to 255. In an evaluation the choice depends on the example
    alone.

    Deviations from the paper: pixels are grey levels, not colours of a palette of 512; exactly a share of an image is
    hidden, where the paper hides each pixel with that chance.

    Options:
        path: a folder of idx or npz files, or one npz file
        shrink: squares of so many pixels a side become one pixel, their mean
        overlap: what becomes of training images that are held out too: keep, drop, or refuse
        rate: the share of pixels that is hidden

    Metric: bits per hidden pixel; lower is better. Chance: a uniform guess among all levels, 8.0. The data say what
    `unigram` scores on all pixels of the test split, which guesses by how often each level comes in the training split.
    """

    target = "token"
    kinds = ("encoder",)
    vocab, outputs = LEVELS + 1, LEVELS
    metric_name = "bits_per_pixel"
    higher_is_better = False
    chance = math.log2(LEVELS)

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        shrink: int = 1,
        overlap: Overlap = "drop",
        rate: float = 0.15,
    ):
        super().__init__(setting)
        if not 0 < rate <= 1:
            raise ValueError(f"rate={rate:g}: use a share above 0 and at most 1")
        self.images = Pixels(setting, path=path, shrink=shrink, overlap=overlap)
        self.image = self.images.image
        self.hidden, self.rate = max(round(rate * setting.seq_len), 1), rate

    def batch(self, split: Split, step: int) -> Batch:
        pixels = np.asarray(self.images.batch(split, step).inputs)
        return self._asked(pixels, _splits.generator(self.setting.seed, split, step, _MASKS).random(pixels.shape))

    def examples(self, split: Split) -> int:
        return self.images.examples(split)

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        pixels = np.asarray(self.images.take(split, numbers).inputs)
        drawn = [_splits.generator(0, split, int(number), _MASKS).random(pixels.shape[1]) for number in numbers]
        return self._asked(pixels, np.array(drawn).reshape(pixels.shape))

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Nats, and the pixels that are asked for."""
        return self.loss(logits, batch)

    def finish(self, mean: float) -> float:
        """Nats to bits."""
        return mean / math.log(2)

    def show(self, example: Batch) -> dict[str, str]:
        """The image with a question mark for each hidden pixel, and the whole one."""
        inputs, whole = (np.asarray(array)[0] for array in (example.inputs, example.targets))
        hidden = np.asarray(example.weights)[0].reshape(self.image) > 0
        lines = _showing.picture(whole.reshape(self.image), LEVELS).splitlines()
        pairs = (zip(line, row, strict=True) for line, row in zip(lines, hidden, strict=True))
        shown = "\n".join("".join("?" if gone else sign for sign, gone in row) for row in pairs)
        positions = _showing.ranges(np.flatnonzero(inputs == MASK))
        return {"input": shown, "positions": positions, "answer": "\n".join(lines)}

    def describe(self) -> dict:
        """What `pixels` says of the images, the share that is hidden, what guessing by the counts of levels scores."""
        return self.images.describe() | {"rate": self.rate, "unigram": self._unigram}

    def reading(self) -> list[str]:
        return self.images.reading()

    @functools.cached_property
    def _unigram(self) -> float:
        """Bits of a pixel of the test split by the counts of the training split, one added to each."""
        counts, asked = self._counts("train") + 1, self._counts("test")
        return round(float(-np.log2(counts / counts.sum()) @ asked / asked.sum()), 4)

    def _counts(self, split: Split) -> np.ndarray:
        """How often each level comes in a split, (256,)."""
        return np.bincount(self.images.corpus.splits[split][0].ravel(), minlength=LEVELS)

    def _asked(self, pixels: np.ndarray, order: np.ndarray) -> Batch:
        """pixels (B, T); order (B, T): the pixels that come first in it are hidden."""
        chosen = order.argsort(1).argsort(1) < self.hidden
        return Batch(np.where(chosen, MASK, pixels).astype(np.int32), pixels, chosen.astype(np.float32))
