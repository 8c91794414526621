"""Train one config from its first step, or from its newest checkpoint, to its record.

The record that `run` returns and leaves in result.json is the row that a report prints.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import optax
from flax import nnx

from xformers_lab import config as configs
from xformers_lab import sources
from xformers_lab.config import Config, edit
from xformers_lab.errors import IntegrityError, RunFailed, UsageError, ran_out_of_memory
from xformers_lab.measure import speed
from xformers_lab.measure.memory import device_peak_bytes
from xformers_lab.model import Model, build_task
from xformers_lab.model._transformer import Transformer
from xformers_lab.record import ABSENT, SETTLED, Record, broken, sealed
from xformers_lab.supervise.interrupt import Interrupted, listening
from xformers_lab.tasks import Batch, Split, Task
from xformers_lab.train import (
    checkpoint,
    decoding,
    evaluation,
    example_maps,
    generated,
    initial,
    lengths,
    optimizer,
    prefetch,
    programs,
    records,
    selection,
)
from xformers_lab.train.layout import Compiled, Layout, compile_train_step, layout_of, sharing
from xformers_lab.train.state import TrainState, abstract, init, merge, shapes
from xformers_lab.train.wrong import Wrong

__all__ = ["Diverged", "Interrupted", "OutOfMemory", "evaluate", "evaluate_at", "load", "prepare", "resume", "run"]

PATIENCE = 10  # non-finite steps in a row that end a run
WARM = 2  # steps of a process that are not timed
POINTS = 100  # of the curve in a record
INITIALISED = "initialised.json"  # of the folder of a run that began with another's parameters: which these were
_HOW_READ = "reading"  # of what a task says of its data
_MEND = "try a smaller lr, clip=1, or dtype=float32"

Progress = Callable[[int, int, dict], None]
"""Called as progress(step, total, metrics) after each step; metrics holds floats, `loss` among them."""

Doing = Callable[[str, int], None]
"""Called as doing(what, step) when something else than a step begins, in words: "preparing ...", "compiling ...",
"saving", each batch of "validating" and "testing", and "training", which steps follow; step is the last completed one.
"""


class Diverged(RunFailed):
    """The loss of training stayed non-finite, or that of an evaluation was; `status` is what the run's row says,
    `record` that row."""

    status = "nan"
    record: dict


class OutOfMemory(RunFailed):
    """The device had no room for a step."""

    status = "oom"


class _Stopped(Exception):
    """A signal came in the middle of an evaluation."""


def run(
    config: Config,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    doing: Doing | None = None,
) -> dict:
    """Train `config` in its folder; a finished run gives its stored record at once.

    Raises UsageError where the folder holds an unfinished run with checkpoints and `resume` is False, or one that was
    trained on other data, or where another process runs it; RunFailed where it diverges (the record says so too) or
    memory or disk run out; Interrupted, after saving, on Ctrl-C, SIGTERM, or when `stop()` is true (before the first
    step a signal does what it does elsewhere); IntegrityError where what it left cannot be trusted.
    """
    return _run(config, configs.folder(config), resume, progress, stop, doing)


def resume(
    run_dir: pathlib.Path | str,
    *,
    trust: bool = False,
    from_scratch: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    doing: Doing | None = None,
) -> dict:
    """Continue the run in a folder from its newest good checkpoint, bit for bit on CPU; raises as `run` does.

    trust: run code outside the package that its config names, though it is not what the run was trained with.
    Raises IntegrityError where checkpoints or lines of metrics.jsonl that were there are lost or damaged;
    with `from_scratch` it begins at step 1 again there.
    """
    run_dir = pathlib.Path(run_dir)
    return _run(_stored_config(run_dir, trust), run_dir, True, progress, stop, doing, not from_scratch, from_scratch)


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
    places = [None if length is None else _at(job, length) for length in at]
    trained, step = _counting(job)
    rows = []
    for length, place in zip(at, places, strict=True):
        there, state = (job, trained) if place is None else (place[1], _moved(*place, trained))
        row = {} if length is None else {"seq_len": length}
        about: dict = {"id": configs.identity(job.config), "run_dir": str(run_dir), "split": split, "step": step}
        try:
            score = _score(there, state, split, wanted, None, lambda: 0, lambda what: None)
            about |= {**_reported(score), "by_position": score.tokens}
        except Diverged as error:
            if len(at) == 1:
                raise
            about |= {"reason": str(error), "metric": None, "loss": None}
        if beams is not None:
            model = merge(there.graph, state.params, state.extra, state.memory)
            about["generated"] = generated.scores(there.config, there.task, model, split, beams, texts)
        rows.append(records.finite(row | Record(**about, **_declared(there.task)).to_dict()))
    return rows


def load(run_dir: pathlib.Path | str, *, trust: bool = False) -> tuple[Config, Task, Model]:
    """The config, task and model of a run, with the parameters that count, as its newest good checkpoint has them;
    trust: as in `resume`."""
    job = _trained(pathlib.Path(run_dir), trust)
    state, _ = _counting(job)
    return job.config, job.task, merge(job.graph, state.params, state.extra, state.memory)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a config stands for: everything that does not change while it trains.

    segments: whether batches follow one another, for what the model remembers to carry over; rebuilt: the task with
    another size of batch, and data_seed=0.
    """

    config: Config
    run_dir: pathlib.Path
    task: Task
    graph: nnx.GraphDef
    tx: optax.GradientTransformation
    layout: Layout
    about: dict
    segments: bool
    rebuilt: Callable[[int], Task]

    @functools.cached_property
    def first_batch(self) -> Batch:
        """That of the first step, on the host."""
        return prefetch.checked(self.task, "train", 0, self.segments)

    @functools.cached_property
    def program(self) -> programs.Program:
        return programs.of(self.config, self.task, self.graph, self.layout, self.first_batch)

    def compiled(self, state: TrainState) -> Compiled:
        """The step of training, for states like this one."""
        step = (self.config, self.task, self.graph, self.tx, self.layout, state, self.first_batch)
        return self.program.trained(lambda: compile_train_step(*step))

    def target(self) -> TrainState | selection.Kept:
        """What a checkpoint holds, in shapes."""
        state = self.layout.abstract_state(abstract(self.config, self.task, self.tx))
        best = selection.Best(state.params, state.extra, state.step)
        return selection.kept(state, best if self.config.train.select == "best" else None)

    def training_batch(self, step: int) -> Batch:
        return self.layout.place_batch(prefetch.checked(self.task, "train", step, self.segments))


def prepare(config: Config, run_dir: pathlib.Path) -> _Job:
    """All that a run needs but its state; raises UsageError where its layout over the devices cannot be."""
    configs.refuse_selection(config)
    layout, task = layout_of(config), build_task(config)
    layout = sharing(layout, config, task)
    parts = shapes(config, task)
    graph, *_, memory = parts
    segments = bool(jax.tree.leaves(memory))
    if segments and config.train.layout == "pmap":
        raise UsageError(
            "layout=pmap keeps the whole state on every device, what it remembers of texts too: layout=jit"
        )
    details = {"config": configs.decisive(config), "data": json.loads(json.dumps(_identifying(task), default=str))}
    about = {"config": configs.identity(config), "data": _fingerprint(task), "details": details}
    return _Job(
        config,
        run_dir,
        task,
        graph,
        optimizer.build(config.train, optimizer.decays(merge(*parts))),
        layout,
        about,
        segments,
        functools.cache(lambda batch: build_task(edit(config, batch=batch, data_seed=0))),
    )


def _at(job: _Job, length: int) -> tuple[lengths.Other, _Job]:
    """A job at another length, where nothing is compiled yet; what becomes otherwise is said."""
    other = lengths.at(job.config, job.task, length)
    if words := other.said():
        logging.getLogger(__name__).warning("%s", words)
    return other, prepare(other.config, job.run_dir)


def _moved(other: lengths.Other, there: _Job, state: TrainState) -> TrainState:
    """The state of training on the devices, as a job at another length takes it."""
    target, _ = selection.parted(there.target())
    return there.layout.place_state(other.state(state, target))


def _by_length(job: _Job, state: TrainState, score: Callable[[_Job, TrainState], evaluation.Score]) -> list[dict]:
    """The scores at each length of test_len. One that is no number, or that the device has no room for, says so."""
    rows = []
    for length in configs.lengths(job.config.test_len):
        other, there = _at(job, length)
        row: dict = {"seq_len": length} | ({"changed": other.changed} if other.changed else {})
        try:
            reported = _reported(score(there, _moved(other, there, state)))
            rows.append(row | {key: reported[key] for key in lengths.FIGURES})
        except Diverged as error:
            rows.append(row | dict.fromkeys(lengths.FIGURES) | {"reason": str(error)})
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            rows.append(row | dict.fromkeys(lengths.FIGURES) | {"reason": "out of memory"})
    return rows


def _run(
    config: Config,
    run_dir: pathlib.Path,
    resume: bool,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
    doing: Doing | None,
    strict: bool = False,
    from_scratch: bool = False,
) -> dict:
    """strict: what was lost of the run is an error, where there is nothing to go on from too; from_scratch: it begins
    at step 1 again."""
    progress, doing = progress or (lambda step, total, metrics: None), doing or (lambda what, step: None)
    doing("preparing", 0)
    _named_rightly(config, run_dir)
    if (record := _finished(config, run_dir, from_scratch)) is not None:
        return record
    with records.locked(run_dir), contextlib.ExitStack() as stack:
        if (record := _finished(config, run_dir, from_scratch)) is not None:
            return record
        checkpoint.check_place(run_dir, config.train.steps, config.train.save_every)
        saved = checkpoint.steps(run_dir)
        if saved and not resume:
            raise UsageError(
                f"{run_dir} holds this run, saved at step {saved[-1]} of {config.train.steps}: "
                f"go on with xlab resume {run_dir}, or delete that folder to start again"
            )
        try:
            job = prepare(config, run_dir)
            began = _start(job, strict, from_scratch)
            if outside := sources.of(configs.to_dict(config)):
                records.write_json(run_dir / "sources.json", outside)
            records.write_json(run_dir / "config.json", configs.to_dict(config))
            records.write_json(run_dir / "env.json", records.environment())
            return _train(job, *began, lambda: stack.enter_context(listening(stop)), progress, doing)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            raise OutOfMemory(f"out of memory: {str(error).strip().splitlines()[0][:300]}") from error


def _start(job: _Job, strict: bool, from_scratch: bool) -> tuple[TrainState, selection.Best | None, int]:
    """The state to go on from, the best so far with select=best, and the step: those of the newest good checkpoint, or
    those before the first step."""
    run_dir = job.run_dir
    try:
        if checkpoint.steps(run_dir):
            kept, step = checkpoint.restore(run_dir, job.target(), job.about)
            state, best = selection.parted(kept)
            if int(state.step) != step:
                raise IntegrityError(f"{run_dir}: the checkpoint of step {step} holds the state of step {state.step}")
            if lost := records.missing(run_dir, step):
                raise IntegrityError(
                    f"{run_dir / 'metrics.jsonl'}: the lines of steps {lost} are missing or damaged, though the "
                    f"checkpoint is of step {step}; give them back, or start again with xlab resume {run_dir} "
                    "--from-scratch"
                )
            return state, best, step
        if lines := records.read(run_dir):
            lost = f"{run_dir}: trained to step {lines[-1]['step']} and holds no checkpoint (deleted, or not yet saved)"
            if strict:
                raise IntegrityError(f"{lost}; start again with xlab resume {run_dir} --from-scratch")
            logging.getLogger(__name__).warning("%s: it starts again at step 1", lost)
    except IntegrityError as error:
        if not from_scratch:
            raise
        logging.getLogger(__name__).warning("%s: --from-scratch starts again at step 1", str(error).split("; ")[0])
    state = init(job.config, job.task, job.tx)
    if job.config.init is not None:
        matched = initial.match(job.config, job.task)
        state = initial.take(matched, state)
        logging.getLogger(__name__).warning("%s", matched.said())
        records.write_json(run_dir / INITIALISED, matched.record())
    state = job.layout.place_state(state)
    return state, selection.best_of(state) if job.config.train.select == "best" else None, 0


def _train(
    job: _Job,
    state: TrainState,
    best: selection.Best | None,
    start: int,
    listen: Callable[[], Callable[[], int]],
    progress: Progress,
    doing: Doing,
) -> dict:
    """From the state after step `start` to the last one, then the record; `listen` begins to hear signals. best: the
    best validated so far, None with select=last."""
    train, step = job.config.train, start
    log = _Log(job.run_dir, records.cut(job.run_dir, start), train.steps, progress)
    peak = device_peak_bytes()
    validated = {line["step"]: line["validation_metric"] for line in log.lines if "validation_metric" in line}
    best_metric = None if best is None else validated.get(int(best.step))
    doing("compiling", start)
    compiled = job.compiled(state)
    stop_signal = listen()  # before, while it compiles, there is nothing to save: a signal may end the process at once
    due = lambda every, at: at == train.steps or (every > 0 and at % every == 0)

    def save() -> None:
        doing("saving", step)
        checkpoint.save(job.run_dir, step, selection.kept(state, best), job.about)

    def stopped() -> Interrupted:
        save()
        how = f"saved at step {step} of {train.steps}; go on with xlab resume {job.run_dir}"
        return Interrupted(f"interrupted: {how}", stop_signal())

    def score(
        state: TrainState, split: Split, most: int | None = None, wrong: Wrong | None = None, there: _Job = job
    ) -> evaluation.Score:
        return _score(there, state, split, train.eval_batches, most, stop_signal, lambda what: doing(what, step), wrong)

    def validate(line: dict) -> dict:
        nonlocal best, best_metric
        valued = score(state, "validation", evaluation.WATCHED)
        if best is not None and selection.improves(
            valued.metric, best_metric, higher_is_better=job.task.higher_is_better
        ):
            best, best_metric = selection.best_of(state), valued.metric
        return line | {"validation_loss": valued.loss, "validation_metric": valued.metric}

    try:
        # The last process was stopped while it validated.
        if log.lines and due(train.eval_every, start) and "validation_loss" not in log.lines[-1]:
            log.replace_last(validate(log.lines[-1]))
        doing("training", start)
        batches = prefetch.ahead(job.training_batch, range(start, train.steps))
        pending = None  # the last step and its metrics, which the device may still be computing
        with contextlib.closing(batches):
            for step, batch in enumerate(batches, start + 1):
                log.dispatched(idle=pending is None)
                state, metrics = compiled.step(state, batch)
                if pending is not None:
                    log.write(log.line(*pending))
                pending = step, metrics
                evaluating, saving = due(train.eval_every, step), due(train.save_every, step)
                if not (evaluating or saving or stop_signal()):
                    continue
                line, pending = log.line(*pending), None
                try:
                    line = validate(line) if evaluating else line
                finally:
                    log.write(line)
                if saving and not stop_signal():
                    save()
                    doing("training", step)
                if stop_signal():
                    raise stopped()
        if int(state.skipped) == train.steps:
            raise Diverged(f"no step of {train.steps} had a finite loss and gradient, so nothing was learned; {_MEND}")
        counting, wrong = selection.chosen(state, best), Wrong(job.task)
        scored = score(counting, train.score, wrong=wrong)
        more: dict = {"wrong": wrong.rows} if job.task.metric_name == "accuracy" else {}
        if job.config.test_len is not None:
            more["by_length"] = _by_length(job, counting, lambda there, state: score(state, train.score, there=there))
        if train.score == "test":  # a run that only chooses among recipes is looked at by its score alone
            if found := _maps(job, counting, lambda what: doing(what, step)):
                more["maps"] = found
            decoder = lambda: job.program.decoding(job.config, job.graph, counting)
            more |= decoding.figures(decoder, counting, lambda what: doing(what, step))
        doing("finishing", step)
    except _Stopped:
        raise stopped() from None
    except Diverged as diverged:
        error = Diverged(f"{diverged}; {_kept(job, state, best, doing)}")
        error.record = _finish(job, state, compiled, log, peak, status=error.status, reason=str(error))
        raise error from None
    outcome = {"status": "ok", "split": train.score, "step": int(counting.step)} | _reported(scored) | more
    rate = train.batch * job.config.seq_len / scored.seconds
    return _finish(job, state, compiled, log, peak, **outcome, eval_tokens_per_second=rate)


def _counting(job: _Job) -> tuple[TrainState, int]:
    """The state of the newest good checkpoint with the parameters that count, and their step."""
    kept, step = checkpoint.restore(job.run_dir, job.target(), job.about)
    state, best = selection.parted(kept)
    counting = selection.chosen(state, best)
    if best is not None:
        of = f"the parameters are those of step {int(counting.step)}"
        why = "the best validation" if int(best.step) else "the last one saved, for nothing is validated yet"
        logging.getLogger(__name__).warning("%s: select=best: %s, %s, of %d", job.run_dir, of, why, step)
    return counting, int(counting.step)


def _kept(job: _Job, state: TrainState, best: selection.Best | None, doing: Doing) -> str:
    """Save the parameters of a run that diverged, which are the last finite ones -> where they are, in words."""
    step = int(state.step)
    doing("saving", step)
    try:
        if step not in checkpoint.steps(job.run_dir):
            checkpoint.save(job.run_dir, step, selection.kept(state, best), job.about)
    except RunFailed as error:
        return f"its last parameters could not be kept ({error})"
    return f"its last finite parameters are kept as the checkpoint of step {step}"


def _maps(job: _Job, state: TrainState, doing: Callable[[str], None]) -> dict | None:
    """The attention maps of the first example that a run is scored on, where a record has room for them."""
    size = job.config.model
    if jax.tree.leaves(state.memory) or not example_maps.small(job.config.seq_len, size.layers, size.heads):
        return None
    params, extra = example_maps.on_host((state.params, state.extra))
    model = merge(job.graph, params, extra, state.memory)
    if not isinstance(model, Transformer) or model.source:
        return None
    doing("drawing attention maps")
    sample = evaluation.sample(job.task, job.rebuilt, job.config.train.score, 1, None, job.segments)
    return example_maps.of_example(model, job.task, sample.batch(0))


def _score(
    job: _Job,
    state: TrainState,
    split: Split,
    wanted: evaluation.Wanted,
    most: int | None,
    stop_signal: Callable[[], int],
    doing: Callable[[str], None],
    wrong: Wrong | None = None,
) -> evaluation.Score:
    """Score a split as `evaluation` has it; raises _Stopped when `stop_signal()` is not 0, and Diverged where the loss
    or the metric is no number."""
    doing(f"preparing the {split} split")

    def evaluate(state: TrainState, batch: Batch) -> tuple:
        doing(("testing" if split == "test" else "validating") if job.program.scored else "compiling the evaluation")
        scored = job.program.score(state, batch)
        job.program.scored = True
        if stop_signal():
            raise _Stopped
        return scored

    sample = evaluation.sample(job.task, job.rebuilt, split, wanted, most, job.segments)
    compiled = job.program.scored
    score = evaluation.score(job.task, sample, evaluate, job.layout.place_batch, state, wrong, compiled=compiled)
    if score.answers == 0:
        raise Diverged(f"no answer of the {split} split counts: all weights in it are 0")
    if not (math.isfinite(score.loss) and math.isfinite(score.metric)):
        raise Diverged(f"the loss on the {split} split is non-finite after step {int(state.step)}; {_MEND}")
    return score


def _reported(score: evaluation.Score) -> dict:
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
    }


class _Log:
    """The lines of metrics.jsonl, as they are in the file."""

    def __init__(self, run_dir: pathlib.Path, lines: list[dict], total: int, progress: Progress):
        self.run_dir, self.lines, self.total, self.progress = run_dir, lines, total, progress
        self.began = self.read = 0
        self.since = 0.0

    def dispatched(self, *, idle: bool) -> None:
        """A step is about to be handed to the device, which is `idle` or still busy with the one before."""
        if idle:
            self.since = time.perf_counter()

    def line(self, step: int, metrics: dict) -> dict:
        """Waits for a step to complete. Its seconds count from the completion of the step before."""
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        self.read += 1
        seconds = now - self.since if self.read > WARM else None
        self.since = now
        ok = bool(metrics.pop("ok"))
        return {"step": step, **{name: float(value) for name, value in metrics.items()}, "seconds": seconds} | (
            {} if ok else {"skipped": True}
        )

    def write(self, line: dict) -> None:
        """Raises Diverged at the last of PATIENCE skipped steps in a row."""
        line = records.finite(line)
        self.lines.append(line)
        records.append(self.run_dir, line)
        self.progress(line["step"], self.total, line)
        if all(recent.get("skipped") for recent in self.lines[-PATIENCE:]) and len(self.lines) >= PATIENCE:
            first = self.lines[-PATIENCE]["step"]
            raise Diverged(
                f"loss, gradient or parameters became non-finite at step {first} and stayed so for {PATIENCE} steps; "
                f"{_MEND}"
            )

    def replace_last(self, line: dict) -> None:
        records.cut(self.run_dir, self.lines.pop()["step"] - 1)
        self.write(line)


def _finish(job: _Job, state: TrainState, compiled: Compiled, log: _Log, peak: int | None, **outcome) -> dict:
    """Write result.json -> the record."""
    config = job.config
    seconds = [line["seconds"] for line in log.lines if line.get("seconds")]
    median = statistics.median(seconds) if seconds else None
    validated = [line for line in log.lines if "validation_loss" in line]
    of, wanted = job.task.examples("validation"), config.train.eval_batches
    record = Record(
        id=configs.identity(config),
        run_dir=str(job.run_dir),
        kind="compare",
        **(
            dict.fromkeys(("loss", "metric", "metric_interval", "examples", "examples_of", "majority"))
            | {"step": int(state.step)}
            | outcome
        ),
        **_declared(job.task),
        tokens_per_second=config.train.batch * config.seq_len / median if median else None,
        seconds_min=min(seconds, default=None),
        seconds_median=median,
        **speed.disturbance(seconds),
        compile_seconds=compiled.compile_seconds,
        flops=compiled.flops,
        flops_per_token=compiled.flops / (config.train.batch * config.seq_len) if compiled.flops else None,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        temp_bytes=compiled.temp_bytes,
        **_peak(compiled, peak),
        steps=int(state.step),
        skipped=int(state.skipped),
        curve=_curve(log.lines),
        validation=[[line["step"], line["validation_loss"], line["validation_metric"]] for line in validated],
        validation_examples=evaluation.amount(of, wanted, evaluation.WATCHED) if validated else None,
        initialised=ABSENT if config.init is None else records.read_json(job.run_dir / INITIALISED) or {},
        data=job.task.describe(),
        devices=job.layout.mesh.size,
        machine=speed.machine(),
        config=configs.to_dict(config),
    ).to_dict()
    record = sealed(records.finite(json.loads(json.dumps(record))))
    records.write_json(job.run_dir / "result.json", record)
    return record


def _declared(task: Task) -> dict:
    names = {"metric_name": task.metric_name, "higher_is_better": task.higher_is_better}
    return names | {"chance": task.chance, "plane": task.image}


def _curve(lines: list[dict]) -> list[list]:
    """[step, mean training loss since the last point, seconds of all steps so far], at most POINTS of them, without
    skipped steps. A step that was not timed counts as the median does; seconds are None where none was."""
    timed = [line["seconds"] for line in lines if line.get("seconds")]
    usual = statistics.median(timed) if timed else 0.0
    spent = itertools.accumulate(line.get("seconds") or usual for line in lines)
    losses = [
        (line["step"], line["loss"], seconds if timed else None)
        for line, seconds in zip(lines, spent, strict=True)
        if line["loss"] is not None and not line.get("skipped")
    ]
    width = max(1, math.ceil(len(losses) / POINTS))
    groups = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [[group[-1][0], statistics.fmean(loss for _, loss, _ in group), group[-1][2]] for group in groups]


def _peak(compiled: Compiled, before: int | None) -> dict:
    """The device's own peak, where it is this run's; a process that held more before only has the compiled figure."""
    after = device_peak_bytes()
    if before is None or after is None:
        return {}
    return {"peak_bytes": after if after > before else compiled.peak_bytes}


def settled(run_dir: pathlib.Path, task: Callable[[], Task], config: Config | None = None) -> dict | None:
    """The record of a run that came to its end, a non-finite loss too; raises UsageError where it is of other data than
    those of task() now, IntegrityError where it is not the run's own: that of `config`, by default that of the id that
    the folder has for a name."""
    record = records.read_json(run_dir / "result.json")
    if record is None and (run_dir / "result.json").exists():
        logging.getLogger(__name__).warning("%s: cannot be read, so it is made again", run_dir / "result.json")
    record = record or {}
    if record.get("status") not in SETTLED:
        return None
    identity = run_dir.name if config is None else configs.identity(config)
    if wrong := broken(record, identity):
        raise IntegrityError(
            f"{run_dir / 'result.json'}: {wrong}; delete that file, and the run makes it again from its last checkpoint"
        )
    was, now = record.get("data"), records.finite(json.loads(json.dumps(_identifying(task()), default=str)))
    was = {key: value for key, value in was.items() if key != _HOW_READ} if isinstance(was, dict) else was
    if isinstance(was, dict) and was != now:
        key = next(key for key in {**now, **was} if was.get(key) != now.get(key))
        raise UsageError(
            f"{run_dir}: its result is of other data ({key} was {was.get(key)}, is {now.get(key)}): give these back, "
            "delete that folder to train again, or choose another one with runs="
        )
    return record


def _named_rightly(config: Config, run_dir: pathlib.Path) -> None:
    """Raises IntegrityError where a folder has the id of another run for its name, and UsageError where its checkpoint
    tells what changed; any other name is free."""
    identity = configs.identity(config)
    if run_dir.name == identity or not re.fullmatch("[0-9a-f]{12}", run_dir.name):
        return
    if changed := checkpoint.differences(checkpoint.details(run_dir, "config"), configs.decisive(config)):
        raise UsageError(f"{run_dir}: belongs to another config ({changed}); give the old one back")
    raise IntegrityError(
        f"{run_dir}: has the id of another run for its name, since its config is that of {identity}: one of them was "
        "changed, the source of a choice outside the package, or the version of the laboratory; give it back, or the "
        "folder a name of its own"
    )


def _finished(config: Config, run_dir: pathlib.Path, from_scratch: bool = False) -> dict | None:
    """The record of a run that came to its end; raises Diverged where that end was a non-finite loss, IntegrityError
    where the record cannot be this run's."""
    if from_scratch and not checkpoint.steps(run_dir):
        return None
    record = settled(run_dir, lambda: build_task(config), config)
    if record is not None and record["status"] == Diverged.status:
        error = Diverged(f"{record.get('reason')} (as stored in {run_dir / 'result.json'})")
        error.record = record
        raise error
    if record is not None:
        logging.getLogger(__name__).warning("%s: already finished; this is its record", run_dir)
    return record


def _fingerprint(task: Task) -> str:
    return hashlib.sha256(json.dumps(_identifying(task), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _identifying(task: Task) -> dict:
    """What tells data from others: all that is said of them but how they were read."""
    return {key: value for key, value in task.describe().items() if key != _HOW_READ}


def _stored_config(run_dir: pathlib.Path, trust: bool) -> Config:
    path = run_dir / "config.json"
    if not path.is_file():
        raise UsageError(f"{run_dir}: no run there (a run's folder holds config.json)")
    return configs.stored(path, trust=trust)


def _trained(run_dir: pathlib.Path, trust: bool) -> _Job:
    """What the config of a run with a checkpoint stands for."""
    config = _stored_config(run_dir, trust)
    if not checkpoint.steps(run_dir):
        ended = records.read_json(run_dir / "result.json") is not None
        again = f"xlab resume {run_dir} --from-scratch makes one" if ended else f"train it with xlab resume {run_dir}"
        raise UsageError(f"{run_dir}: holds no checkpoint{'' if ended else ' yet'}; {again}")
    _named_rightly(config, run_dir)
    return prepare(config, run_dir)
