"""What the trainer costs beside the bare compiled step: batches, logging, the loop around them.

    python benchmarks/trainer_overhead.py [--rounds 7] [--steps 20] [KEY=VALUE ...]

A decoder on copy, 4 layers, width 256, 4 heads, 512 positions, batch 8; words change it. One compiled program serves
both sides: a run of `xlab train`, whose lines say when each step completed, and the same number of calls on one batch
that lies on the device already, waited for at the end. They take turns, and each round's mean time of a step counts
once; ratio of minima. Steps should take 50 ms or more, so that what is measured is worth a share. Results go to
benchmarks/results/.
"""

import argparse
import pathlib
import random
import statistics
import sys
import tempfile
import time

import jax
from _duel import save

from xformers_lab import config as configs
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.train import jobs, loop, records
from xformers_lab.train.log import WARM
from xformers_lab.train.state import init

WORDS = ("task=copy", "layers=4", "dim=256", "heads=4", "seq_len=512", "batch=8", "eval_batches=1", "score=validation")
CASES = {"plain": {}, "with an average": {"ema": 0.999}}
SHORTEST = 0.05  # seconds of a step
TARGET = 1.03


def trainer(config: Config, steps: int, number: int) -> float:
    """Seconds of a step of a run: those that its lines have from the completion of one to that of the next."""
    config = edit(config, steps=steps + WARM, seed=number)
    loop.run(config)
    timed = [line["seconds"] for line in records.read(configs.folder(config)) if line["seconds"] is not None]
    return statistics.fmean(timed)


def bare(config: Config, steps: int) -> float:
    """Seconds of a call of the step that the trainer compiled."""
    job = jobs.prepare(edit(config, steps=steps + WARM), configs.folder(config))
    state = job.layout.place_state(init(job.config, job.task, job.tx))
    step, batch = job.compiled(state).step, job.training_batch(0)
    for _ in range(WARM):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    began = time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / steps


def row(case: str, config: Config, steps: int, rounds: int) -> dict:
    seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
    order = random.Random(0)
    for number in range(-1, rounds):  # the first one compiles, and counts for nothing
        for side in order.sample(list(seconds), 2):
            taken = trainer(config, steps, number + 1) if side == "trainer" else bare(config, steps)
            if number >= 0:
                seconds[side].append(taken)
    least = {side: min(taken) for side, taken in seconds.items()}
    if least["bare"] < SHORTEST:
        print(f"{case}: a step of {1e3 * least['bare']:.1f} ms is too short to say much", file=sys.stderr)
    return {
        "case": case,
        "trainer_ms": round(1e3 * least["trainer"], 3),
        "bare_ms": round(1e3 * least["bare"], 3),
        "ratio": round(least["trainer"] / least["bare"], 4),
        "target": TARGET,
        "spread": round(max(max(taken) / min(taken) for taken in seconds.values()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="what the trainer costs beside the bare compiled step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of each side in each round")
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="write to results/")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            base = configs.single([*WORDS, *chosen.words, f"runs={pathlib.Path(folder)}"])
        except UsageError as error:
            raise SystemExit(f"trainer_overhead: {error}") from None
        lines = [row(case, edit(base, **more), chosen.steps, chosen.rounds) for case, more in CASES.items()]
    if chosen.keep:
        save("trainer_overhead", lines, chosen.rounds)
    else:
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
