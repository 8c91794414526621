"""Ctrl-C and SIGTERM: the run saves its step, ends with the signal's code, and goes on in the same bits."""

import random
import signal
import time
from collections.abc import Iterator

from xformers_lab.doctor.deep._trial import Lost, Trial, ending, last_line, last_step, run_in, strike, wait_for_steps
from xformers_lab.train import checkpoint

WHAT = "interrupted and resumed"
TIMES = 2


def disturb(trial: Trial, rng: random.Random, times: int) -> Iterator[str]:
    done = 0
    while done < times:
        runs, number = trial.runs("interrupted"), (signal.SIGINT, signal.SIGTERM)[done % 2]
        process = trial.go_on(runs)
        wait_for_steps(process, runs, rng.randrange(20))
        struck = time.monotonic()
        strike(process, number)
        ended, seconds = ending(process), time.monotonic() - struck
        run_dir = run_in(runs)
        if ended.returncode == 0:  # it was done before
            continue
        if ended.returncode != 128 + number or run_dir is None:
            raise Lost(f"{number.name} ended it with exit code {ended.returncode}: {last_line(ended.stderr)}")
        step, saved = last_step(run_dir), max(checkpoint.steps(run_dir), default=0)
        if saved != step:
            raise Lost(f"{number.name} after step {step} left a checkpoint of step {saved}")
        trial.same(trial.finish(runs))
        done += 1
        yield f"{number.name} saved step {step} and ended in {seconds:.1f} s with exit code {ended.returncode}"
