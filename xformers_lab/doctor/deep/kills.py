"""SIGKILL at any moment, as when the machine is switched off: the run goes on from its last checkpoint."""

import random
import time
from collections.abc import Iterator

from xformers_lab.doctor.deep._trial import SAVE_EVERY, STEPS, Lost, Trial, ending, last_step, run_in, switch_off
from xformers_lab.doctor.deep._trial import wait_for_steps as stepping
from xformers_lab.train import checkpoint

WHAT = "killed and resumed"
TIMES = 2


def disturb(trial: Trial, rng: random.Random, times: int) -> Iterator[str]:
    runs, kills, finished = trial.runs("killed"), 0, 0
    while kills < times:
        process = trial.go_on(runs)
        run_dir = run_in(runs)
        stepping(process, runs, last_step(run_dir) if run_dir else 0)
        time.sleep(rng.uniform(0, 0.5))  # amid steps, a checkpoint, a validation, or the record
        struck = process.poll() is None
        switch_off(process, runs)
        ended = ending(process)
        run_dir = run_in(runs)
        if not struck and ended.returncode == 0 and run_dir is not None:
            trial.same(run_dir)
            runs, finished = trial.runs("killed"), finished + 1
            continue
        if run_dir is None:
            raise Lost(f"it did not begin (exit code {ended.returncode})")
        step, saved = last_step(run_dir), max(checkpoint.steps(run_dir), default=0)
        if step - saved > SAVE_EVERY:
            raise Lost(f"killed after step {step}, it has no checkpoint since step {saved}")
        kills += 1
        if kills == times:
            trial.same(trial.finish(runs))
            finished += 1
        yield f"killed after step {step} of {STEPS}, at most {SAVE_EVERY} lost; ended {finished} x in the same bits"
