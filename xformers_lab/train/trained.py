"""A trained run: its scores on any split, at any length, and its model."""

import logging
import pathlib
from collections.abc import Callable, Sequence

from xformers_lab import config as configs
from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.model import Model
from xformers_lab.record import Record
from xformers_lab.tasks import Split, Task
from xformers_lab.train import checkpoint, evaluation, generated, records, result, scoring, selection, settled
from xformers_lab.train.failures import Diverged
from xformers_lab.train.jobs import Job, prepare
from xformers_lab.train.layout import to_score
from xformers_lab.train.state import TrainState, merge


def evaluate(
    run_dir: pathlib.Path | str,
    *,
    split: Split | None = None,
    batches: evaluation.Wanted | None = None,
    length: int | None = None,
    beams: int | None = None,
    texts: int = generated.TEXTS,
    trust: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict:
    """Score the parameters of a run that count, as its newest good checkpoint has them, on a split (default: the one
    that the run itself is scored on): on all of it, or on so many times 32 examples (default: the run's eval_batches).
    The examples are those that the run itself is scored on, whatever its batch and seed.

    by_position in it holds what the model reports of each token, "computation" where tokens get different numbers of
    layers: a mean for every position of the sequence, None where all are padding. length: tokens per sequence, where
    they are not those of training; UsageError where the model has no such length. beams: have the model generate the
    answers of `texts` examples too, by a search with so many, and the task score them. trust: as in `resume`.
    say(line) is called with what the task says of its data. Raises Diverged where the loss is no number.
    """
    return _evaluated(pathlib.Path(run_dir), [length], split, batches, trust, say, beams, texts)[0]


def evaluate_at(
    run_dir: pathlib.Path | str,
    at: Sequence[int],
    *,
    split: Split | None = None,
    batches: evaluation.Wanted | None = None,
    trust: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[dict]:
    """What `evaluate` gives at each of several lengths; where the loss at one is no number, its `reason` says so.
    Raises before it scores any where the model has no such length."""
    return _evaluated(pathlib.Path(run_dir), at, split, batches, trust, say)


def load(run_dir: pathlib.Path | str, *, trust: bool = False) -> tuple[Config, Task, Model]:
    """The config, task and model of a run, with the parameters that count, as its newest good checkpoint has them;
    trust: as in `resume`."""
    job = _trained(pathlib.Path(run_dir), trust)
    state, _ = _counting(job)
    return job.config, job.task, merge(job.graph, state.params, state.extra, state.memory)


def _evaluated(
    run_dir: pathlib.Path,
    at: Sequence[int | None],
    split: Split | None,
    batches: evaluation.Wanted | None,
    trust: bool,
    say: Callable[[str], None] | None,
    beams: int | None = None,
    texts: int = generated.TEXTS,
) -> list[dict]:
    """A record for each length, None for that of training."""
    job = _trained(run_dir, trust)
    if beams is not None:
        generated.check(job.task, beams, texts)
    if say is not None:
        for line in job.task.reading():
            say(line)
    split = job.config.train.score if split is None else split
    wanted = job.config.train.eval_batches if batches is None else configs.typed("eval_batches", batches)
    places = [None if length is None else scoring.at(job, length) for length in at]
    trained, step = _counting(job)
    rows = []
    for length, place in zip(at, places, strict=True):
        there, state = (job, trained) if place is None else (place[1], scoring.moved(*place, trained))
        row = {} if length is None else {"seq_len": length}
        about: dict = {"id": configs.identity(job.config), "run_dir": str(run_dir), "split": split, "step": step}
        try:
            score = scoring.score(there, state, split, wanted, None, lambda: 0, lambda what: None)
            about |= {**scoring.reported(score), "by_position": score.tokens}
        except Diverged as error:
            if len(at) == 1:
                raise
            about |= {"reason": str(error), "metric": None, "loss": None}
        if beams is not None:
            model = merge(there.graph, state.params, state.extra, state.memory)
            about["generated"] = generated.scores(there.config, there.task, model, split, beams, texts)
        rows.append(records.finite(row | Record(**about, **result.declared(there.task)).to_dict()))
    return rows


def _trained(run_dir: pathlib.Path, trust: bool) -> Job:
    """What the config of a run with a checkpoint stands for."""
    config = settled.config_of(run_dir, trust=trust)
    if not checkpoint.steps(run_dir):
        ended = records.read_json(run_dir / "result.json") is not None
        again = f"xlab resume {run_dir} --from-scratch makes one" if ended else f"train it with xlab resume {run_dir}"
        raise UsageError(f"{run_dir}: holds no checkpoint{'' if ended else ' yet'}; {again}")
    settled.refuse_misnamed(config, run_dir)
    return prepare(config, run_dir, to_score)


def _counting(job: Job) -> tuple[TrainState, int]:
    """The state of the newest good checkpoint with the parameters that count, and their step."""
    kept, step = checkpoint.restore(job.run_dir, job.target(), job.about)
    state, best = selection.parted(kept)
    counting = selection.chosen(state, best)
    if best is not None:
        of = f"the parameters are those of step {int(counting.step)}"
        why = "the best validation" if int(best.step) else "the last one saved, for nothing is validated yet"
        logging.getLogger(__name__).warning("%s: select=best: %s, %s, of %d", job.run_dir, of, why, step)
    return counting, int(counting.step)
