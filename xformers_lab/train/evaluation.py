"""One pass over a split: which examples it scores, in what batches, and how sure its figure is.

Which examples are scored is a function of the split and of `eval_batches` alone: neither `batch` nor `seed` changes it.
A split with an end is read once, each example exactly once; the last batch is filled up with rows that do not count. A
smaller sample is the first part of one fixed shuffled order, or where a model remembers what it read before, runs of
examples that follow one another, spread over the split. Of a task that draws its examples without end, example i
of a split is row i % UNIT of batch i // UNIT of the same task with batch=UNIT and seed=0.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import Batch, Split, Task
from xformers_lab.train import prefetch
from xformers_lab.train.state import TrainState, empty
from xformers_lab.train.wrong import Wrong

UNIT = 32  # examples that one of eval_batches stands for, whatever `batch` is
DRAWN = 8 * UNIT  # examples that eval_batches=all stands for where a task draws them without end
WATCHED = 32 * UNIT  # examples at most of a validation while training
SHARES = ("accuracy", "exact_match")  # metrics that are shares of right answers
_NORMAL = 1.959964  # the 97.5 % point of the normal distribution

Wanted = int | Literal["all"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is scored. examples: how many; of: how many the split has, None without end; batches: how many batches hold
    them; batch(number) is one of these on the host, whose `counted` says which of its rows are examples; consecutive:
    whether they are a part of the split in runs that follow one another, for a model that remembers."""

    examples: int
    of: int | None
    batches: int
    batch: Callable[[int], Batch]
    consecutive: bool = False


@dataclasses.dataclass(frozen=True)
class Score:
    """loss: nats for each answer; metric: as reported; answers: the sum of their weights; interval: where the metric of
    all examples lies with 95 %, None where all were scored; majority: the share of the most frequent answer, None where
    the metric is no accuracy; scalars, tokens: means of what the model reports of itself, the latter by position; the
    scalars are also what the task reports beside its metric; seconds: the median time of a batch, without compiling;
    consecutive: as of the sample."""

    loss: float
    metric: float
    answers: float
    examples: int
    of: int | None
    interval: list[float] | None
    majority: float | None
    scalars: dict[str, float]
    tokens: dict[str, list[float]]
    seconds: float
    consecutive: bool = False


def amount(of: int | None, wanted: Wanted, most: int | None = None) -> int:
    """How many examples are scored of `of` (None: drawn without end), at most `most`."""
    if wanted == "all":
        examples = DRAWN if of is None else of
    else:
        examples = wanted * UNIT if of is None else min(wanted * UNIT, of)
    return examples if most is None else min(examples, most)


def sample(
    task: Task, rebuilt: Callable[[int], Task], split: Split, wanted: Wanted, most: int | None, segments: bool
) -> Sample:
    """The examples to score, in batches of the task's own size; rebuilt(batch) is the task with that batch and seed 0.

    segments: whether each row of a batch has to go on where it ended in the batch before, or begin anew. The rows then
    each read a part of their own, whose first window has nothing before it, so there the size of the batch decides what
    is remembered, though not what is scored.
    """
    of, size = task.examples(split), task.setting.batch
    if of == 0:
        raise UsageError(f"task {type(task).__name__}: the {split} split has no example to score")
    examples = amount(of, wanted, most)
    if of is None and segments:
        count = math.ceil(examples / size)
        return Sample(count * size, None, count, lambda number: prefetch.checked(rebuilt(size), split, number, True))
    count = math.ceil(examples / size)
    order = None if of is None else _runs(examples, of) if segments else _shuffled(of)
    drawn = functools.lru_cache(maxsize=2)(lambda number: prefetch.checked(rebuilt(UNIT), split, number))

    def batch(number: int) -> Batch:
        numbers = np.arange(size) * count + number if segments else np.arange(number * size, (number + 1) * size)
        chosen = numbers % examples if order is None else order[numbers % examples]
        counted = numbers < examples
        taken = _drawn(drawn, chosen) if of is None else task.take(split, chosen)
        prefetch.check(task, taken, f"{split} batch {number}")
        weights = np.asarray(taken.weights)
        weights = np.where(counted.reshape(-1, *[1] * (weights.ndim - 1)), weights, np.zeros_like(weights))
        fresh = taken.fresh
        if segments and order is not None:
            fresh = (number == 0) | ((chosen != order[(numbers - 1) % examples] + 1) & counted)
        return dataclasses.replace(taken, weights=weights, fresh=fresh, counted=counted)

    return Sample(examples, of, count, batch, segments and of is not None and examples < of)


def _shuffled(of: int) -> np.ndarray:
    """All examples of a split in one fixed order."""
    return np.random.Generator(np.random.PCG64(0)).permutation(of)


def _runs(examples: int, of: int) -> np.ndarray:
    """So many of the examples of a split, in runs of UNIT that follow one another, spread over the split."""
    if examples == of:
        return np.arange(of)
    runs = math.ceil(examples / UNIT)
    starts = np.arange(runs) * of // runs
    return (starts[:, None] + np.arange(UNIT)).ravel()[:examples]


def score(
    task: Task,
    sample: Sample,
    evaluate: Callable[[TrainState, Batch], tuple],
    place: Callable[[Batch], Batch],
    state: TrainState,
    wrong: Wrong | None = None,
    *,
    compiled: bool = False,
) -> Score:
    """Score a sample; evaluate(state, batch) is what `make_eval_step` makes, place(batch) brings one to the devices;
    `wrong` is shown what was answered, where the metric is accuracy. compiled: whether it needs no compiling at its
    first call."""
    answers = np.zeros(task.outputs)
    counts = task.metric_name == "accuracy"

    def make(number: int) -> tuple[Batch, Batch]:
        batch = sample.batch(number)
        if counts:
            targets, weights = np.ravel(batch.targets), np.ravel(batch.weights)
            np.add(answers, np.bincount(targets, weights, len(answers)), out=answers)
        return batch, place(batch)

    totals: Any = None
    pending, last = None, None
    seconds: list[float] = []
    since = 0.0

    def add(batch: Batch, sums: dict) -> None:
        """Waits for a batch to complete. Its seconds count from the completion of the one before."""
        nonlocal totals, since
        said = sums.pop("said", None)
        totals = _added(totals, sums)
        seconds.append(time.perf_counter() - since)
        if wrong is not None and said is not None and wrong.wants():
            wrong(batch, np.asarray(jax.device_get(said)))
        since = time.perf_counter()

    state = dataclasses.replace(state, memory=empty(state.memory))
    with contextlib.closing(prefetch.ahead(make, range(sample.batches))) as batches:
        for batch, placed in batches:
            since = time.perf_counter() if pending is None else since
            sums, memory = evaluate(state, placed)
            state = dataclasses.replace(state, memory=memory)
            if pending is not None:
                add(*pending)
            pending, last = (batch, sums), placed
    assert pending is not None, "a sample has a batch"
    add(*pending)
    if last is not None and not compiled and len(seconds) == 1:  # the only batch came with the compiling
        since = time.perf_counter()
        jax.block_until_ready(evaluate(state, last))
        seconds.append(time.perf_counter() - since)
    moments = totals.pop("moments")
    with np.errstate(invalid="ignore", divide="ignore"):
        means = jax.tree.map(lambda pair: (pair[0] / pair[1]).tolist(), totals)
    majority = float(answers.max() / answers.sum()) if counts and answers.any() else None
    return Score(
        loss=means["loss"],
        metric=_finished(task, means["metric"]),
        answers=float(totals["loss"][1]),
        examples=sample.examples,
        of=sample.of,
        interval=interval(task, moments, sample),
        # Of examples drawn without end the sample's share is above chance even where all answers are equally likely.
        majority=majority if sample.of is not None else task.describe().get("majority") if counts else None,
        scalars=means["scalars"] | task.figures(means["loss"]),
        tokens=means["tokens"],
        seconds=statistics.median(seconds if compiled else seconds[1:]),
        consecutive=sample.consecutive,
    )


def interval(task: Task, moments: np.ndarray, sample: Sample) -> list[float] | None:
    """Where the metric of the whole split, or of endlessly many examples, lies with 95 %; None where all were scored.

    Answers of one example are not independent, so the variance is that of a ratio of sums over whole examples. A share
    gets Wilson's interval for as many independent answers as have this variance. moments: as of `make_eval_step`.
    """
    left = 1.0 if sample.of is None else 1 - sample.examples / sample.of
    count, s, w, ss, sw, ww = moments
    if left == 0 or not np.isfinite(moments).all() or w == 0:
        return None
    mean = s / w
    variance = max(ss - 2 * mean * sw + mean**2 * ww, 0.0) / w**2
    if task.metric_name in SHARES and 0 <= mean <= 1:
        within = mean * (1 - mean)
        independent = (within / variance if min(within, variance) > 1e-12 else count) / left
        z = _NORMAL**2 / independent
        middle = (mean + z / 2) / (1 + z)
        half = math.sqrt(z * within + z**2 / 4) / (1 + z)
        ends = max(middle - half, 0.0), min(middle + half, 1.0)
    elif count < 2:
        return None
    else:
        half = _NORMAL * math.sqrt(variance * left * count / (count - 1))
        ends = mean - half, mean + half
    return sorted(_finished(task, end) for end in ends)


def _finished(task: Task, mean: float) -> float:
    try:
        return float(task.finish(mean))
    except OverflowError:
        return math.inf


def _drawn(drawn: Callable[[int], Batch], numbers: np.ndarray) -> Batch:
    """Examples by number out of batches of UNIT."""
    groups, where = np.unique(numbers // UNIT, return_inverse=True)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *[drawn(int(group)) for group in groups])
    return jax.tree.map(lambda array: array[where * UNIT + numbers % UNIT], whole)


def _added(totals: Any, sums: Any) -> Any:
    """The sums so far, and those of one more batch: an array for each tuple of sums."""
    arrays = jax.tree.map(
        lambda parts: np.array(parts, float), jax.device_get(sums), is_leaf=lambda node: type(node) is tuple
    )
    return arrays if totals is None else jax.tree.map(np.add, totals, arrays)
