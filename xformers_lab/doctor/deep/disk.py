"""A disk that is full at a checkpoint: one message, what was saved stays, and with space again the run goes on.

A limit on the size of files stands in for the disk, which cannot be filled on a machine that is in use.
"""

import random
from collections.abc import Iterator

from xformers_lab.doctor.deep._trial import Lost, Trial, ending, last_line, run_in
from xformers_lab.train import checkpoint

WHAT = "full disk survived"
TIMES = 1


def disturb(trial: Trial, rng: random.Random, times: int) -> Iterator[str]:
    for _ in range(times):
        runs = trial.runs("full")
        # Enough for a config, too little for the arrays.
        limit = rng.randrange(4_000, 9_000)
        ended = ending(trial.go_on(runs, limit=limit))
        run_dir = run_in(runs)
        if ended.returncode != 3 or run_dir is None or "Traceback" in ended.stderr:
            raise Lost(
                f"with files of at most {limit} bytes it ended with {ended.returncode}: {last_line(ended.stderr)}"
            )
        for step in checkpoint.steps(run_dir):
            checkpoint.verify(run_dir / "checkpoints" / str(step))
        trial.same(trial.finish(runs))
        yield f"with files of at most {limit} bytes it ended with exit code 3, and later in the same bits"
