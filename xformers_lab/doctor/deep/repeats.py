"""The same config and seed in another process, with other hashes and one thread: the same bits."""

import random
from collections.abc import Iterator

from xformers_lab.doctor.deep._trial import Trial

WHAT = "repeated in another process"
TIMES = 1


def disturb(trial: Trial, rng: random.Random, times: int) -> Iterator[str]:
    for _ in range(times):
        seed = str(rng.randrange(1_000))
        trial.same(trial.finish(trial.runs("again"), PYTHONHASHSEED=seed, OMP_NUM_THREADS="1"))
        yield f"PYTHONHASHSEED={seed} changes nothing"
