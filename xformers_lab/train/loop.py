"""Train one config from its first step, or from its newest checkpoint, to its record.

The record that `run` returns and leaves in result.json is the row that a report prints.
"""

import contextlib
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from xformers_lab import config as configs
from xformers_lab import sources
from xformers_lab.config import Config
from xformers_lab.errors import IntegrityError, RunFailed, UsageError, ran_out_of_memory
from xformers_lab.measure import speed
from xformers_lab.measure.memory import device_peak_bytes
from xformers_lab.supervise.interrupt import Interrupted, listening
from xformers_lab.tasks import Split
from xformers_lab.train import (
    checkpoint,
    decoding,
    evaluation,
    example_maps,
    hosts,
    initial,
    labels,
    prefetch,
    provenance,
    records,
    result,
    scoring,
    selection,
    settled,
)
from xformers_lab.train.failures import MEND, Diverged, OutOfMemory
from xformers_lab.train.jobs import Job, prepare
from xformers_lab.train.log import Log, Progress, due
from xformers_lab.train.state import TrainState, init
from xformers_lab.train.wrong import Wrong

Doing = Callable[[str, int], None]
"""Called as doing(what, step) when something else than a step begins, in words: "preparing ...", "compiling ...",
"saving", each batch of "validating" and "testing", and "training", which steps follow; step is the last completed one.
"""


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
    return _run(
        settled.config_of(run_dir, trust=trust), run_dir, True, progress, stop, doing, not from_scratch, from_scratch
    )


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
    settled.refuse_misnamed(config, run_dir)
    hosts.refuse_other_words(_steering(config) | {"--from-scratch": from_scratch})
    if (record := hosts.of_first(lambda: settled.finished(config, run_dir, from_scratch))) is not None:
        labels.write(config, run_dir)
        return record
    with hosts.held_by_first(records.locked(run_dir)), contextlib.ExitStack() as stack:
        hosts.refuse_other_folder(run_dir)
        if (record := hosts.of_first(lambda: settled.finished(config, run_dir, from_scratch))) is not None:
            return record
        hosts.of_first(lambda: checkpoint.check_place(run_dir, config.train.steps, config.train.save_every))
        saved = hosts.of_first(lambda: checkpoint.steps(run_dir))
        if saved and not resume:
            raise UsageError(
                f"{run_dir} holds this run, saved at step {saved[-1]} of {config.train.steps}: "
                f"go on with xlab resume {run_dir}, or delete that folder to start again"
            )
        config = labels.kept(config, run_dir)
        try:
            job = hosts.agreed(lambda: prepare(config, run_dir))
            state, best, step = _start(job, strict, from_scratch)
            if outside := sources.of(configs.to_dict(config)):
                records.write_json(run_dir / "sources.json", outside)
            records.write_json(run_dir / "config.json", configs.to_dict(config))
            records.write_json(run_dir / "env.json", records.environment() | provenance.beginning(run_dir, step))
            lines = hosts.of_first(lambda: records.cut(run_dir, step))
            log = Log(run_dir, lines, config.train.steps, progress)
            training = _Training(job, state, best, step, log, doing)
            # Only now: while it compiles there is nothing to save, and a signal may end the process at once.
            training.stop_signal = hosts.Stopping(stack.enter_context(listening(stop)))
            return training.to_record()
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            raise OutOfMemory(f"out of memory: {str(error).strip().splitlines()[0][:300]}") from error


def _steering(config: Config) -> dict[str, Any]:
    """Everything that decides which steps a run takes, and what it does between them."""
    apart = ("runs", "name", "tags", "stall")
    return {key: configs.get(config, key) for key in configs.KEYS if key not in apart}


def _start(job: Job, strict: bool, from_scratch: bool) -> tuple[TrainState, selection.Best | None, int]:
    """The state to go on from, the best so far with select=best, and the step: those of the newest good checkpoint, or
    those before the first step."""
    run_dir = job.run_dir
    try:
        if hosts.of_first(lambda: checkpoint.steps(run_dir)):
            kept, step = checkpoint.restore(run_dir, job.target(), job.about)
            state, best = selection.parted(kept)
            if int(state.step) != step:
                raise IntegrityError(f"{run_dir}: the checkpoint of step {step} holds the state of step {state.step}")
            if lost := hosts.of_first(lambda: records.missing(run_dir, step)):
                raise IntegrityError(
                    f"{run_dir / 'metrics.jsonl'}: the lines of steps {lost} are missing or damaged, though the "
                    f"checkpoint is of step {step}; give them back, or start again with xlab resume {run_dir} "
                    "--from-scratch"
                )
            return state, best, step
        if lines := hosts.of_first(lambda: records.read(run_dir)):
            lost = f"{run_dir}: trained to step {lines[-1]['step']} and holds no checkpoint (deleted, or not yet saved)"
            if strict:
                raise IntegrityError(f"{lost}; start again with xlab resume {run_dir} --from-scratch")
            logging.getLogger(__name__).warning("%s: it starts again at step 1", lost)
    except IntegrityError as error:
        if not from_scratch:
            raise
        logging.getLogger(__name__).warning("%s: --from-scratch starts again at step 1", str(error).split("; ")[0])
    state = init(job.config, job.task, job.tx)
    hosts.refuse_unequal(state)
    if job.config.init is not None:
        matched = initial.match(job.config, job.task)
        state = initial.take(matched, state, job.tx)
        logging.getLogger(__name__).warning("%s", matched.said())
        records.write_json(run_dir / initial.INITIALISED, matched.record())
    state = job.layout.place_state(state)
    return state, selection.best_of(state) if job.config.train.select == "best" else None, 0


class _Training:
    """A run between its first step and its record.

    step: the last one that is completed, or, while its metrics are still computed, dispatched; best: the best validated
    so far, None with select=last; stop_signal: the number of the signal that came, 0 before.
    """

    def __init__(self, job: Job, state: TrainState, best: selection.Best | None, step: int, log: Log, doing: Doing):
        self.job, self.train, self.state, self.best, self.step, self.log = job, job.config.train, state, best, step, log
        self.doing = lambda what: doing(what, self.step)
        self.stop_signal: Callable[[], int] = lambda: 0
        self.peak = device_peak_bytes()
        validated = {line["step"]: line["validation_metric"] for line in log.lines if "validation_metric" in line}
        self.best_metric = None if best is None else validated.get(int(best.step))
        self.doing("compiling")
        self.compiled = job.compiled(state)

    def to_record(self) -> dict:
        """The remaining steps, then the record."""
        try:
            self.steps()
            return self.finished(status="ok", split=self.train.score, **self.outcome())
        except scoring.Stopped:
            raise self.stopped() from None
        except Diverged as diverged:
            error = Diverged(f"{diverged}; {self.kept()}")
            error.record = self.finished(status=error.status, reason=str(error))
            raise error from None

    def steps(self) -> None:
        """Raises Interrupted, after saving, where a signal came."""
        lines = self.log.lines
        if lines and self.due(self.train.eval_every) and "validation_loss" not in lines[-1]:
            self.log.replace_last(self.validated(lines[-1]))  # the last process was stopped while it validated
        self.doing("training")
        batches = prefetch.ahead(self.job.training_batch, range(self.step, self.train.steps))
        pending = None  # the last step and its metrics, which the device may still be computing
        with contextlib.closing(batches):
            for batch in batches:
                self.step += 1
                self.log.dispatched(idle=pending is None)
                self.state, metrics = self.compiled.step(self.state, batch)
                if pending is not None:
                    self.log.write(self.log.line(*pending))
                pending = self.step, metrics
                evaluating, saving = self.due(self.train.eval_every), self.due(self.train.save_every)
                if not (evaluating or saving or self.stop_signal()):
                    continue
                line, pending = self.log.line(*pending), None
                try:
                    line = self.validated(line) if evaluating else line
                finally:
                    self.log.write(line)
                if saving and not self.stop_signal():
                    self.save()
                    self.doing("training")
                if self.stop_signal():
                    raise self.stopped()
        if int(self.state.skipped) == self.train.steps:
            steps = self.train.steps
            raise Diverged(f"no step of {steps} had a finite loss and gradient, so nothing was learned; {MEND}")

    def outcome(self) -> dict:
        """What the record has of the trained parameters."""
        job, config = self.job, self.job.config
        state, wrong = selection.chosen(self.state, self.best), Wrong(job.task)
        score = self.score(state, self.train.score, wrong=wrong)
        outcome = {"step": int(state.step)} | scoring.reported(score)
        if not speed.shared():
            outcome["eval_tokens_per_second"] = self.train.batch * config.seq_len / score.seconds
        if job.task.metric_name == "accuracy":
            outcome["wrong"] = wrong.rows
        if config.test_len is not None:
            there = lambda other, state: self.score(state, self.train.score, job=other)
            outcome["by_length"] = scoring.by_length(job, state, there)
        if self.train.score == "test":  # a run that only chooses among recipes is looked at by its score alone
            if maps := example_maps.of_run(job, state, self.doing):
                outcome["maps"] = maps
            decoder = lambda: job.program.decoding(config, job.graph, state)
            outcome |= decoding.figures(decoder, state, self.doing)
        self.doing("finishing")
        return outcome

    def finished(self, **outcome) -> dict:
        return result.write(self.job, self.state, self.compiled, self.log, self.peak, **outcome)

    def due(self, every: int) -> bool:
        return due(self.step, every, self.train.steps)

    def score(
        self,
        state: TrainState,
        split: Split,
        *,
        most: int | None = None,
        wrong: Wrong | None = None,
        job: Job | None = None,
    ) -> evaluation.Score:
        wanted, heard = self.train.eval_batches, (self.stop_signal, self.doing)
        return scoring.score(job or self.job, state, split, wanted, most, *heard, wrong)

    def validated(self, line: dict) -> dict:
        """The line of a step with its score on validation data, which may be the best so far."""
        score = self.score(selection.scored(self.state), "validation", most=evaluation.WATCHED)
        up = self.job.task.higher_is_better
        if self.best is not None and selection.improves(score.metric, self.best_metric, higher_is_better=up):
            self.best, self.best_metric = selection.best_of(self.state), score.metric
        return line | {"validation_loss": score.loss, "validation_metric": score.metric}

    def save(self) -> None:
        self.doing("saving")
        checkpoint.save(self.job.run_dir, self.step, selection.kept(self.state, self.best), self.job.about)

    def stopped(self) -> Interrupted:
        self.save()
        how = f"saved at step {self.step} of {self.train.steps}; go on with xlab resume {self.job.run_dir}"
        return Interrupted(f"interrupted: {how}", self.stop_signal())

    def kept(self) -> str:
        """Save the parameters of a run that diverged, which are the last finite ones -> where they are, in words."""
        self.step = int(self.state.step)
        try:
            if self.step not in hosts.of_first(lambda: checkpoint.steps(self.job.run_dir)):
                self.save()
        except RunFailed as error:
            return f"its last parameters could not be kept ({error})"
        return f"its last finite parameters are kept as the checkpoint of step {self.step}"
