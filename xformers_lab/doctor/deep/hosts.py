"""Two processes train one run, and one of them is killed: the other ends too, with a message, and the run goes on."""

import random
import socket
import time
from collections.abc import Iterator

from xformers_lab.doctor.deep._trial import RUN, STEPS, Lost, Trial, end_of, ending, last_line, last_step, switch_off
from xformers_lab.doctor.deep._trial import wait_for_steps as stepping

WHAT = "one of two processes killed"
TIMES = 1
# Seconds without a sign of life of a process before the other ends, and those that ending may take.
SILENCE, ENDING = 20, 20


def disturb(trial: Trial, rng: random.Random, times: int) -> Iterator[str]:
    for _ in range(times):
        runs = trial.runs("hosts")
        place = [f"coordinator=127.0.0.1:{_port()}", "processes=2", f"wait={SILENCE}"]
        words = ["train", *RUN, f"runs={runs}", "--json", *place]
        first, second = (trial.start([*words, f"process={number}"]) for number in range(2))
        if not stepping(first, runs, rng.randrange(10, 30)):
            ended = ending(second)
            raise Lost(f"they took no step together (exit code {ended.returncode}): {last_line(ended.stderr)}")
        switch_off(first, runs)
        killed = time.monotonic()
        ended, seconds = ending(second), time.monotonic() - killed
        ending(first)
        if ended.returncode != 3 or "Traceback" in ended.stderr or seconds > SILENCE + ENDING:
            how = f"exit code {ended.returncode} after {seconds:.0f} s: {last_line(ended.stderr)}"
            raise Lost(f"the one that was left ended with {how}")
        run_dir = trial.finish(runs)
        steps = [step for step, _ in end_of(run_dir).losses]
        if steps != list(range(1, last_step(run_dir) + 1)) or steps[-1] != STEPS:
            raise Lost(f"the run went on alone, but not through every step once: it has {len(steps)} lines")
        yield f"the other ended in {seconds:.0f} s with exit code 3, and one process finished the run"


def _port() -> int:
    """A port that nothing uses now."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]
