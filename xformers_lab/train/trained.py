"""A trained run: its scores on any split, at any length and with other options, and its model."""

import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.model import Model, kind_of
from xformers_lab.record import Record
from xformers_lab.tasks import Split, Task
from xformers_lab.train import (
    checkpoint,
    evaluation,
    generated,
    hosts,
    options,
    records,
    result,
    scoring,
    selection,
    settled,
)
from xformers_lab.train.failures import Diverged
from xformers_lab.train.jobs import Job, prepare
from xformers_lab.train.layout import layout_of, to_score
from xformers_lab.train.state import TrainState, merge


def evaluate(
    run_dir: pathlib.Path | str,
    *,
    split: Split | None = None,
    batches: evaluation.Wanted | None = None,
    length: int | None = None,
    asked: Mapping[str, Any] | None = None,
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
    they are not those of training; asked: options of the run's choices with other values than it was trained with,
    {"depth.threshold": 0.5}, as `train.options` has them; `changed` in the record has both. UsageError where the model
    cannot be so, or has other parameters then. beams: have the model generate the answers of `texts` examples too, by a
    search with so many, and the task score them. trust: as in `resume`. say(line) is called with what the task says of
    its data. Raises Diverged where the loss is no number.
    """
    at, each = [] if length is None else [length], {name: [value] for name, value in (asked or {}).items()}
    how: dict[str, Any] = {"split": split, "batches": batches, "beams": beams, "texts": texts}
    return evaluate_at(run_dir, at, each, **how, trust=trust, say=say)[0]


def evaluate_at(
    run_dir: pathlib.Path | str,
    at: Sequence[int],
    asked: Mapping[str, str | Sequence[Any]] | None = None,
    *,
    split: Split | None = None,
    batches: evaluation.Wanted | None = None,
    beams: int | None = None,
    texts: int = generated.TEXTS,
    trust: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[dict]:
    """What `evaluate` gives for every combination of lengths (none: that of training) and of values of the options that
    are asked for, the lengths varying fastest; a text of values is read as a word of a command is. Of several rows,
    where the loss of one is no number, its `reason` says so. Raises before it scores any where the model of one cannot
    be, and where texts are to be generated of several."""
    run_dir = pathlib.Path(run_dir)
    job = hosts.agreed(lambda: _trained(run_dir, trust))
    told = {"RUN": configs.identity(job.config), "seq_len": list(at), "options": asked or {}}
    hosts.refuse_other_words(told | {"--split": split, "--batches": batches})
    grid = options.grid(job.config, kind_of(job.config, job.task), asked or {})
    cells = [(length, values) for values in grid for length in at or [None]]
    if beams is not None:
        if len(cells) > 1:
            raise UsageError("beams: texts are generated for one row; give one seq_len and one value of an option")
        generated.check(job.task, beams, texts)
    if say is not None:
        for line in job.task.reading():
            say(line)
    split = job.config.train.score if split is None else split
    wanted = job.config.train.eval_batches if batches is None else configs.typed("eval_batches", batches)
    places = [None if length is None and not values else scoring.at(job, length, values) for length, values in cells]
    trained, step = _counting(job)
    rows = []
    for (length, values), place in zip(cells, places, strict=True):
        there, state = (job, trained) if place is None else (place[1], scoring.moved(*place, trained))
        row = values if length is None else values | {"seq_len": length}
        about: dict = {"id": configs.identity(job.config), "run_dir": str(run_dir), "split": split, "step": step}
        if job.config.train.ema is not None:
            about["averaged"] = job.config.train.ema
        if place is not None and place[0].changed:
            about["changed"] = place[0].changed
        try:
            score = scoring.score(there, state, split, wanted, None, lambda: 0, lambda what: None)
            about |= {**scoring.reported(score), "by_position": score.tokens}
        except Diverged as error:
            if len(cells) == 1:
                raise
            about |= {"reason": str(error), "metric": None, "loss": None}
        if beams is not None:
            model = merge(there.graph, state.params, state.extra, state.memory)
            about["generated"] = generated.scores(there.config, there.task, model, split, beams, texts)
        rows.append(records.finite(row | Record(**about, **result.declared(there.task)).to_dict()))
    return rows


def load(run_dir: pathlib.Path | str, *, trust: bool = False) -> tuple[Config, Task, Model]:
    """The config, task and model of a run, with the parameters that count, as its newest good checkpoint has them;
    trust: as in `resume`."""
    job = _trained(pathlib.Path(run_dir), trust)
    state, _ = _counting(job)
    return job.config, job.task, merge(job.graph, state.params, state.extra, state.memory)


def _trained(run_dir: pathlib.Path, trust: bool) -> Job:
    """What the config of a run with a checkpoint stands for."""
    config = settled.config_of(run_dir, trust=trust)
    if not checkpoint.steps(run_dir):
        ended = records.read_json(run_dir / "result.json") is not None
        again = f"xlab resume {run_dir} --from-scratch makes one" if ended else f"train it with xlab resume {run_dir}"
        raise UsageError(f"{run_dir}: holds no checkpoint{'' if ended else ' yet'}; {again}")
    settled.refuse_misnamed(config, run_dir)
    # Of several processes none scores alone what their devices do not divide.
    return prepare(config, run_dir, layout_of if hosts.several() else to_score)


def _counting(job: Job) -> tuple[TrainState, int]:
    """The state of the newest good checkpoint with the parameters that count, and their step."""
    kept, step = checkpoint.restore(job.run_dir, job.target(), job.about)
    state, best = selection.parted(kept)
    counting = selection.chosen(state, best)
    if (rate := job.config.train.ema) is not None:
        words = f"ema={rate:g}: the parameters are their average up to step {int(counting.step)}"
        logging.getLogger(__name__).warning("%s: %s", job.run_dir, words)
    elif state.average is not None:
        words = (
            f"optimizer={job.config.train.optimizer}: the parameters are its average up to step {int(counting.step)}"
        )
        logging.getLogger(__name__).warning("%s: %s", job.run_dir, words)
    if best is not None:
        of = f"the parameters are those of step {int(counting.step)}"
        why = "the best validation" if int(best.step) else "the last one saved, for nothing is validated yet"
        logging.getLogger(__name__).warning("%s: select=best: %s, %s, of %d", job.run_dir, of, why, step)
    return counting, int(counting.step)
