"""A few steps of each program before a study begins: what it will take, and how many steps fit into equal time."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.config import Config
from xformers_lab.errors import LabError, UsageError, in_words
from xformers_lab.progress import spoken
from xformers_lab.supervise.worker import Tell

ROUNDS = 5  # of steps that equal time is taken from
APART = 1.0  # seconds of a run beside its steps, its evaluations and its compiler: first weights, files
SCORING = 1 / 3  # of the time of a training step for as many examples: the forward pass alone
SCORER = 0.5  # of the compile time of a training step: the compile time of an evaluation, and that of decoding
SHARED = 32  # programs that a worker keeps, so that what the probe compiled need not be compiled again
DECODING = 1.0  # seconds of timing the decoding, which runs that are scored on the test split have
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """`30s`, `10m`, `2h`, `1.5h` in seconds; raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip().lower())
    if found is None or not float(found[1]):
        raise UsageError(f"--budget {text}: a time is a number and its unit, such as 30s, 10m or 2h")
    return float(found[1]) * _UNITS[found[2]]


def measure(tell: Tell, cells: list[dict], rounds: int) -> list[dict[str, Any]]:
    """For each config {"compile_seconds", "step_seconds" (the median over rounds, in which the configs take turns),
    "examples" (that a run scores at its end)}, or {"reason"} where it does not run."""
    from xformers_lab.measure import speed

    chosen = [configs.from_dict(config) for config in cells]
    probes: list[dict[str, Any]] = [{} for _ in chosen]
    calls = {}
    for at, config in enumerate(chosen):
        tell.doing(f"compiling {config.model.attention} at {config.seq_len} tokens, for the probe")
        try:
            calls[at], about = _step(config)
        except LabError as error:
            probes[at] = {"reason": str(error)}
        except Exception as error:  # out of memory, or a choice of the user's own: its cells will say so
            probes[at] = {"reason": in_words(error)[:500]}
        else:
            probes[at] = about

    def begun(round: int | None, at: int) -> None:
        tell.doing(f"timing steps of the probe, {'first calls' if round is None else f'round {round + 1}'}", cell=at)

    for at, timing in speed.interleaved(calls, rounds=rounds, begun=begun).items():
        if isinstance(timing, Exception):
            probes[at] = {"reason": in_words(timing)[:500]}
        else:
            probes[at] |= {"step_seconds": timing.seconds_median}
    return probes


def _step(config: Config):
    """A call that takes one step, and what is known of the program."""
    from xformers_lab.train import evaluation, jobs
    from xformers_lab.train.state import init

    job = jobs.prepare(config, configs.folder(config))
    state = init(config, job.task, job.tx)
    compiled = job.compiled(state)
    held = [job.layout.place_state(state)]
    placed = job.layout.place_batch(job.first_batch)

    def call():
        held[0], metrics = compiled.step(held[0], placed)
        return metrics

    examples = evaluation.amount(job.task.examples("test"), config.train.eval_batches, None)
    return call, {"compile_seconds": compiled.compile_seconds, "examples": examples}


def estimate(
    runs: Sequence[Config], probes: Mapping[Any, Mapping], program: Callable[[Config], Any]
) -> tuple[float, float]:
    """(seconds that the steps of all runs take, seconds of all else) from the probe of each program, where
    program(run) is its key; a program that did not run counts as nothing."""
    stepping, apart, compiling = 0.0, 0.0, 0.0
    compiled = set()
    for run in runs:
        probe = probes.get(program(run), {})
        if "step_seconds" not in probe:
            continue
        stepping += run.train.steps * probe["step_seconds"]
        scorings = 1 + (run.train.steps // run.train.eval_every if run.train.eval_every else 0)
        batches = math.ceil(probe["examples"] / run.train.batch)
        decoding = run.train.score == "test"
        apart += APART + decoding * DECODING + scorings * batches * probe["step_seconds"] * SCORING
        if program(run) not in compiled:
            compiled.add(program(run))
            compiling += probe["compile_seconds"]
    kept = len(compiled) <= SHARED
    return stepping, apart + compiling * (2 * SCORER + (not kept))


def cut(budget: float, spent: float, stepping: float, apart: float) -> float:
    """The share of its steps that every run keeps so that all fits into a budget, of which some seconds are spent, 1
    where it fits as it is; raises UsageError where not even what is no step fits."""
    fixed = spent + apart
    if stepping + fixed <= budget:
        return 1.0
    if fixed >= budget:
        raise UsageError(
            f"--budget {spoken(budget)}: checking, compiling and scoring alone take about {spoken(fixed)}; name fewer "
            "cells, or a longer time"
        )
    return (budget - fixed) / stepping
