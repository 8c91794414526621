"""The shelf of tasks: data, loss and metric. One file = one task, a class named like the file.

A task is built as `Task(setting, *, option=default)` and gives

* `batch(split, step)`: a pure function of (seed, split, step); no iterator, no hidden state. The three splits share no
  example: generated tasks draw each split from its own part of the example space (see `_splits`), corpora by file.
* `examples(split)`: how many examples a split has, where it has an end, and then `take(split, numbers)`: those of these
  numbers, counted from 0, as a batch. So an evaluation scores each example once, whatever batch and seed are. A task
  without them is scored on `batch` of the same task with batch=32 and seed=0.
* `vocab`: number of input symbols; `outputs`: number of classes of a prediction; `target`: "token" (one prediction per
  position, logits (B, T, outputs)) or "sequence" (one per sequence, logits (B, outputs)).
* `tokenizer`: where inputs are text, what turned it into tokens; equal names give equal tokens, whatever the task.
* `channels`: where inputs are no tokens but numbers of about unit variance, how many at a position; else 0. Then
  `vocab` is 0, `outputs` is how many numbers are predicted, and the task defines its own loss and metric.
* `kinds`: the models it is made for, the first is what `model=auto` takes. A task that predicts the next token names
  only "decoder": an encoder would see the answer.
* `source_length`: how many of the first positions no answer is wanted of, as the encoder of an encoder-decoder reads
  them; 0 where the two are mixed.
* `blank`: the token that fills a source up to that length, which no encoder looks at; None where all are as long.
* `begin`: the tokens that a target begins with, where a source alone is given to generate from.
* `stop`: tokens at which what is generated ends.
* `image`: rows and columns, where the inputs are the grey levels (below `vocab`) of one image, row by row; else None.
* `segments`: whether its texts can also be read in segments that follow one another, as a memory needs; then it gives
  `segment(split, step)`, whose row b goes on where row b of the step before ended, except where `fresh` says that a new
  text begins. It is a pure function like `batch`. If it has `examples` too, each goes on where the one before ended.
* `packed`: whether a row holds several documents, one after the other, that know nothing of one another; its batches
  then have `documents`.
* `marks`: how many positions of a row it marks, at most, for mechanisms that treat some unlike the others, as global
  tokens are (a question, a separator); its batches then have `marked`.
* `metric_name`, `higher_is_better`, `chance`: what is reported, and what guessing scores on it.
* `figures(loss)`: what is reported beside the metric, by name.
* `generated(split, numbers, produce)`: what the texts that a model generates score, where a task asks for texts.
* `describe()`: what the data are, for the record of a run (sizes, source, fingerprint of a corpus); under "reading" how
  they were read, which is no part of what identifies them.
* `reading()`: the same in words, a line for each split, which is said once the data are loaded.
* `show(example)`: one example as a person reads it, which `xlab show task=NAME` prints; by default what `decode` makes
  of its tokens, or a picture where the task has an `image`, and `answer_name` of the class.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.errors import UsageError

Split = Literal["train", "validation", "test"]
Produce = Callable[[list[list[int]], int], list[list[int]]]
"""produce(prompts, new) -> up to `new` tokens that a model generates behind each prompt."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the lab gives to a task: T tokens per sequence, B sequences per batch, the seed of the data."""

    seq_len: int
    batch: int
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch, as numpy on the host and as jax arrays on devices.

    inputs (B, T) int32 token ids below `vocab`; targets (B, T) or (B,) int32 below `outputs`; weights, float32 and
    shaped like targets, 0 where no answer counts; of a task with channels inputs are (B, T, channels) float32 and
    targets have a last axis of `outputs` float32; valid (B, T) bool, False at padding, or None where a task never
    pads; fresh (B,) bool, True where a sequence does not go on from the step before (None: memory is left as it is).
    documents (B, T) int32, which document of its row each position is of, of a task that is packed, else None.
    marked (B, T) bool, which positions are marked, of a task that has `marks`, else None.
    counted (B,) bool is the lab's: False for the rows that fill up the last batch of an evaluation (None: all count).
    """

    inputs: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array
    valid: np.ndarray | jax.Array | None = None
    fresh: np.ndarray | jax.Array | None = None
    documents: np.ndarray | jax.Array | None = None
    marked: np.ndarray | jax.Array | None = None
    counted: np.ndarray | jax.Array | None = None


class Task:
    """Cross-entropy on weighted targets, scored by accuracy; a task overrides what differs."""

    vocab: int
    outputs: int
    tokenizer: str = ""
    channels: int = 0
    target: ClassVar[Literal["token", "sequence"]] = "token"
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    metric_name: str = "accuracy"
    higher_is_better: ClassVar[bool] = True
    chance: float
    segments: bool = False
    packed: bool = False
    marks: int = 0
    source_length: int = 0
    blank: ClassVar[int | None] = None
    begin: ClassVar[tuple[int, ...]] = ()
    image: tuple[int, int] | None = None
    stop: ClassVar[tuple[int, ...]] = ()

    def __init__(self, setting: Setting):
        self.setting = setting

    def batch(self, split: Split, step: int) -> Batch:
        """The batch of a step of a split; the same whenever it is called."""
        raise NotImplementedError(f"{type(self).__name__} must define batch(split, step)")

    def examples(self, split: Split) -> int | None:
        """How many examples a split has; None where they are drawn without end."""
        return None

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        """The examples of these numbers (n,), each from 0 to below `examples(split)`, as a batch of n rows."""
        raise NotImplementedError(f"{type(self).__name__} has examples: define take(split, numbers)")

    def segment(self, split: Split, step: int) -> Batch:
        """The batch of a step whose rows go on where those of the step before ended."""
        raise NotImplementedError(f"{type(self).__name__} has segments: define segment(split, step)")

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt as a user types it; by default numbers with spaces between. Raises ValueError."""
        words = text.replace(",", " ").split()
        if wrong := [word for word in words if not word.removeprefix("-").isdecimal()]:
            raise ValueError(f'"{wrong[0]}" is no token: prompts of this task are numbers with spaces between')
        tokens = [int(word) for word in words]
        if bad := [token for token in tokens if not 0 <= token < self.vocab]:
            raise ValueError(f"token {bad[0]} is not below the vocabulary's {self.vocab}")
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Tokens as text: the inverse of `encode`."""
        return " ".join(map(str, tokens))

    def answer_name(self, answer: int) -> str:
        """What a class of a whole sequence is called."""
        return str(answer)

    def show(self, example: Batch) -> dict[str, str]:
        """One example, a batch of one row, as a person reads it: what is given and what is wanted, each by its name."""
        from xformers_lab.tasks import _showing

        return _showing.example(self, example)

    def describe(self) -> dict:
        """What the data are, as JSON has it."""
        return {}

    def reading(self) -> list[str]:
        """What was read of data that come from elsewhere: a line for each split, and one for each thing left out."""
        return []

    def loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of weighted cross-entropies in nats, sum of weights): sums, so that parts of a batch add up exactly."""
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), batch.targets[..., None], -1)[
            ..., 0
        ]
        return (losses * batch.weights).sum(), jnp.asarray(batch.weights).sum()

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum over weighted predictions, their weight); the reported metric is `finish(sum / weight)`."""
        right = (logits.argmax(-1) == batch.targets) * batch.weights
        return right.sum(), jnp.asarray(batch.weights).sum()

    def finish(self, mean: float) -> float:
        """Turns the weighted mean into the reported metric (bits per byte from nats, say)."""
        return mean

    def figures(self, loss: float) -> dict[str, float]:
        """What is reported beside the metric, of the mean loss in nats for each answer."""
        return {}

    def generated(self, split: Split, numbers: np.ndarray, produce: Produce) -> dict[str, Any]:
        """Scores of what a model generates for the examples of these numbers, by name; none where a task has none."""
        return {}


class _WithoutTest(Task):
    """A task whose test split nobody can read, its own methods neither."""

    def batch(self, split: Split, step: int) -> Batch:
        return super().batch(_not_test(split), step)

    def examples(self, split: Split) -> int | None:
        return super().examples(_not_test(split))

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        return super().take(_not_test(split), numbers)

    def segment(self, split: Split, step: int) -> Batch:
        return super().segment(_not_test(split), step)


def without_test(task: Task) -> Task:
    """The same task, which from now on raises UsageError wherever its test split is asked for, and so do the tasks
    that it reads from."""
    own = type(task)
    for inner in vars(task).values():
        if isinstance(inner, Task):
            without_test(inner)
    task.__class__ = type(own.__name__, (_WithoutTest, own), {"__module__": own.__module__, "__doc__": own.__doc__})
    return task


def _not_test(split: Split) -> Split:
    if split == "test":
        raise UsageError("the test split cannot be read with score=validation: score=test reads it, once all is chosen")
    return split
