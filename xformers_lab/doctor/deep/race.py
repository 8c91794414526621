"""Two processes on one run: one trains, the other is refused and says who trains."""

import random
import signal
from collections.abc import Iterator

from xformers_lab.doctor.deep._trial import RUN, Lost, Trial, ending, last_line, strike, wait_for_steps

WHAT = "second process refused"
TIMES = 1


def disturb(trial: Trial, rng: random.Random, times: int) -> Iterator[str]:
    for _ in range(times):
        runs = trial.runs("race")
        first = trial.go_on(runs)
        wait_for_steps(first, runs, 0)
        strike(first, signal.SIGSTOP)  # it would be done before the second has begun
        second = ending(trial.start(["train", *RUN, f"runs={runs}", "--json"]))
        strike(first, signal.SIGCONT)
        ended = ending(first)
        if ended.returncode:
            raise Lost(f"the first process ended with exit code {ended.returncode}: {last_line(ended.stderr)}")
        if second.returncode != 2 or "is running this" not in second.stderr:
            raise Lost(f"the second process ended with exit code {second.returncode}: {last_line(second.stderr)}")
        trial.same(trial.finish(runs))
        yield f"exit code 2: {last_line(second.stderr).rpartition(': ')[2]}"
