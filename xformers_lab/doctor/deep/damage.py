"""A newest checkpoint that is damaged on the disk: that is found, said, and the one before is used."""

import logging
import pathlib
import random
import shutil
import signal
from collections.abc import Iterator

from xformers_lab.doctor.deep._trial import SAVE_EVERY, Lost, Trial, ending, last_line, run_in, strike, wait_for_steps
from xformers_lab.train import checkpoint, jobs, settled

WHAT = "damaged checkpoint found"
TIMES = 10
# Bits are what a disk loses most.
WAYS = ("flip", "flip", "flip", "truncate", "delete", "zero")


def disturb(trial: Trial, rng: random.Random, times: int) -> Iterator[str]:
    runs, run_dir = _unfinished(trial)
    newest = checkpoint.steps(run_dir)[-1]
    job = jobs.prepare(settled.config_of(run_dir, trust=False), run_dir)
    for number in range(1, times + 1):
        copy = runs if number == times else trial.runs("damaged")
        if number < times:
            shutil.copytree(runs, copy, dirs_exist_ok=True)
        damaged = copy / run_dir.relative_to(runs)
        way, path = _damage(damaged / "checkpoints" / str(newest), rng)
        with _Warnings() as said:
            _, step = checkpoint.restore(damaged, job.target(), job.about)
        if step == newest or not any(path.name in text for text in said.texts):
            raise Lost(f"{way} of {path.name} in the checkpoint of step {newest} passed unseen")
        if number < times:
            shutil.rmtree(copy)
            yield f"{way} of {path.name} at step {newest}: step {step} is used"
        else:
            trial.same(trial.finish(runs))
            yield f"{way} of {path.name} at step {newest}: step {step} was used, and ended in the same bits"


def _unfinished(trial: Trial) -> tuple[pathlib.Path, pathlib.Path]:
    """A run that was stopped once it had two checkpoints -> the folder of runs, its own folder."""
    while True:
        runs = trial.runs("damaged")
        process = trial.go_on(runs)
        wait_for_steps(process, runs, 2 * SAVE_EVERY)
        strike(process, signal.SIGTERM)
        ended, run_dir = ending(process), run_in(runs)
        if run_dir is None:
            raise Lost(f"it did not begin (exit code {ended.returncode}): {last_line(ended.stderr)}")
        if ended.returncode:
            return runs, run_dir


def _damage(folder: pathlib.Path, rng: random.Random) -> tuple[str, pathlib.Path]:
    """Larger files are hit more often, as on a real disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choices(files, [file.stat().st_size for file in files])[0]
    way, content = rng.choice(WAYS), bytearray(path.read_bytes())
    if way == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if way == "truncate":
        del content[rng.randrange(len(content)) :]
    if way == "zero":
        content = bytearray(len(content))
    path.unlink() if way == "delete" else path.write_bytes(content)
    return way, path


class _Warnings(logging.Handler):
    """What is warned of meanwhile, which is not shown."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> "_Warnings":
        checkpoint.log.addHandler(self)
        checkpoint.log.propagate = False
        return self

    def __exit__(self, *_) -> None:
        checkpoint.log.propagate = True
        checkpoint.log.removeHandler(self)
