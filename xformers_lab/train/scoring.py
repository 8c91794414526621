"""The score of a state of training on a split, as it was trained and otherwise."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from xformers_lab import config as configs
from xformers_lab.errors import ran_out_of_memory
from xformers_lab.tasks import Batch, Split
from xformers_lab.train import evaluation, otherwise, selection
from xformers_lab.train.failures import MEND, Diverged
from xformers_lab.train.jobs import Job, prepare
from xformers_lab.train.layout import to_score
from xformers_lab.train.state import TrainState
from xformers_lab.train.wrong import Wrong


def score(
    job: Job,
    state: TrainState,
    split: Split,
    wanted: evaluation.Wanted,
    most: int | None,
    stop_signal: Callable[[], int],
    doing: Callable[[str], None],
    wrong: Wrong | None = None,
) -> evaluation.Score:
    """Score a split as `evaluation` has it; raises Stopped when `stop_signal()` is not 0, and Diverged where the loss
    or the metric is no number."""
    doing(f"preparing the {split} split")

    def evaluate(state: TrainState, batch: Batch) -> tuple:
        doing(("testing" if split == "test" else "validating") if job.program.scored else "compiling the evaluation")
        scored = job.program.score(state, batch)
        job.program.scored = True
        if stop_signal():
            raise Stopped
        return scored

    sample = evaluation.sample(job.task, job.rebuilt, split, wanted, most, job.segments)
    compiled = job.program.scored
    score = evaluation.score(job.task, sample, evaluate, job.layout.place_batch, state, wrong, compiled=compiled)
    if score.answers == 0:
        raise Diverged(f"no answer of the {split} split counts: all weights in it are 0")
    if not (math.isfinite(score.loss) and math.isfinite(score.metric)):
        raise Diverged(f"the loss on the {split} split is non-finite after step {int(state.step)}; {MEND}")
    return score


def by_length(job: Job, state: TrainState, score: Callable[[Job, TrainState], evaluation.Score]) -> list[dict]:
    """The scores at each length of test_len. One that is no number, or that the device has no room for, says so."""
    rows = []
    for length in configs.lengths(job.config.test_len):
        other, there = at(job, length)
        row: dict = {"seq_len": length} | ({"changed": other.changed} if other.changed else {})
        try:
            figures = reported(score(there, moved(other, there, state)))
            rows.append(row | {key: figures[key] for key in otherwise.FIGURES})
        except Diverged as error:
            rows.append(row | dict.fromkeys(otherwise.FIGURES) | {"reason": str(error)})
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            rows.append(row | dict.fromkeys(otherwise.FIGURES) | {"reason": "out of memory"})
    return rows


def at(job: Job, length: int | None = None, asked: Mapping[str, Any] | None = None) -> tuple[otherwise.Other, Job]:
    """A job at another length and with other options, where nothing is compiled yet; what becomes otherwise is said."""
    other = otherwise.at(job.config, job.task, length, asked)
    if words := other.said():
        logging.getLogger(__name__).warning("%s", words)
    return other, prepare(other.config, job.run_dir, to_score)


def moved(other: otherwise.Other, there: Job, state: TrainState) -> TrainState:
    """The state of training on the devices, as a job at another length or with other options takes it."""
    target, _ = selection.parted(there.target())
    return there.layout.place_state(other.state(state, target))


def reported(score: evaluation.Score) -> dict:
    """A score, for a record, and what the model says of itself: the layers that a token passed through, and all else
    that it reports."""
    return {
        "loss": score.loss,
        "metric": score.metric,
        "metric_interval": score.interval,
        "examples": score.examples,
        "examples_of": score.of,
        "majority": score.majority,
        "computation": score.scalars.get("computation"),
        "aux": score.scalars,
        **({"consecutive": True} if score.consecutive else {}),
    }


class Stopped(Exception):
    """A signal came in the middle of an evaluation."""
