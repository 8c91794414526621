"""Training on one GPU: tokens a second and the share of its matrix peak, and whether runs repeat, killed or not.

    python benchmarks/gpu_train.py [--minutes 7.5] [--out DIR]
    python benchmarks/gpu_train.py --tiny        # whether the script works, on a CPU

A decoder of 150 million parameters (12 layers, width 1024, 16 heads of 64, rope) in bfloat16, 65,536 tokens a step, at
several lengths. At the first of them the run is trained again, killed with SIGKILL behind a checkpoint and resumed: its
losses beside those of the run that nothing stopped, to the bit; then both again with XLA's flag for deterministic
operations, whose price is the ratio of their speeds. Compiled programs are shared. Results are written as they come,
and what does not fit into the time is left out and said.

FLOPs are those of the model, 6 for each parameter and token and 6 T D for each token and layer of causal attention, not
those of what is computed: so no kernel looks better for computing more.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from _duel import keep

from xformers_lab.doctor import peaks

MODEL = {"layers": 12, "dim": 1024, "heads": 16, "position": "rope", "dtype": "bfloat16"}
TINY = {"layers": 2, "dim": 32, "heads": 2, "position": "rope", "dtype": "bfloat16"}
RUN = {"task": "lm", "schedule": "constant", "warmup": 0, "lr": 3e-4, "eval_batches": 1}
LENGTHS, TOKENS = (1024, 8192, 4096, 2048), 65536
STEPS, SAVE_EVERY, KILLED_AFTER = 40, 10, 25
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
LONGEST = 240  # seconds that one command may take


class Bench:
    def __init__(self, chosen: argparse.Namespace, folder: pathlib.Path):
        self.began, self.chosen, self.folder, self.rows = time.monotonic(), chosen, folder, []
        self.model, self.tokens = (TINY, 512) if chosen.tiny else (MODEL, TOKENS)
        self.lengths = (64, 128) if chosen.tiny else LENGTHS
        self.about: dict[str, str] = {}

    def left(self) -> float:
        """Seconds."""
        return 60 * self.chosen.minutes - (time.monotonic() - self.began)

    def add(self, **row) -> None:
        self.rows.append(row)
        print(f"{time.monotonic() - self.began:5.0f} s", *(f"{key}={value}" for key, value in row.items()), flush=True)
        label = "-".join(self.about.get("gpu", "no device").lower().split())
        keep(f"gpu_train-{label}", self.rows, about=self.about, folder=self.chosen.out)

    # ---- runs ------------------------------------------------------------------------------------------------------

    def words(self, T: int, runs: pathlib.Path, **more) -> list[str]:
        keys = RUN | self.model | {"seq_len": T, "tokens": self.tokens, "steps": STEPS, "runs": runs} | more
        return [f"{key}={value}" for key, value in keys.items()]

    def start(self, *words: str, flag: bool = False) -> subprocess.Popen:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs")}
        if self.chosen.tiny:
            environment["JAX_PLATFORMS"] = "cpu"
        elif flag:
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
        log = (self.folder / "log").open("a")
        return subprocess.Popen([sys.executable, "-m", "xformers_lab", *words], env=environment, stdout=log, stderr=log)

    def finish(self, process: subprocess.Popen) -> None:
        """Raises RuntimeError where a command fails."""
        try:
            code = process.wait(max(1, min(LONGEST, self.left())))
        except subprocess.TimeoutExpired:
            end(process)
            raise RuntimeError("no time was left") from None
        if code:
            raise RuntimeError((self.folder / "log").read_text().strip().splitlines()[-1][:300])

    def train(self, T: int, name: str, flag: bool = False, **more) -> pathlib.Path:
        """The folder of a run that is trained from first to last."""
        runs = self.folder / name
        self.finish(self.start("train", *self.words(T, runs, **more), flag=flag))
        return folder_of(runs)

    def killed(self, T: int, name: str, flag: bool) -> pathlib.Path:
        """Likewise, killed between two checkpoints and resumed."""
        runs, words = self.folder / name, self.words(T, self.folder / name, save_every=SAVE_EVERY)
        process = self.start("train", *words, flag=flag)
        while process.poll() is None and self.left() > 0 and steps_of(runs) < KILLED_AFTER:
            time.sleep(0.02)
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode} before it was killed")
        end(process)
        self.finish(self.start("resume", str(folder_of(runs)), flag=flag))
        return folder_of(runs)

    # ---- what is measured ------------------------------------------------------------------------------------------

    def speed(self, folder: pathlib.Path, T: int, **more) -> None:
        record = json.loads((folder / "result.json").read_text())
        parameters, rate = record["parameters"], record["tokens_per_second"]
        flops = 6 * parameters + 6 * T * self.model["dim"] * self.model["layers"]
        self.about |= {"gpu": record["device"], "jax": record["machine"]["jax"]}
        known = peaks.published(record["device"])
        peak = None if known is None else known.flops.get("bfloat16")
        share = None if peak is None else rate * flops / peak
        row = {"part": "speed", "T": T, "parameters": parameters, "tokens_per_second": rate, "share_of_peak": share}
        row |= {"step_ms": record["seconds_median"] * 1e3, "compile_s": record["compile_seconds"]}
        self.add(**row, peak_bytes=record.get("peak_bytes"), **more)

    def again(self, T: int, flag: bool) -> None:
        """A run, and the same one killed and resumed: from which step on their losses or norms differ, if ever."""
        name = "flag" if flag else "plain"
        whole = self.train(T, f"{name}-whole", flag, save_every=SAVE_EVERY)
        self.speed(whole, T, deterministic=flag)
        stopped = self.killed(T, f"{name}-killed", flag)
        pairs = list(zip(metrics(whole), metrics(stopped), strict=True))
        keys = ("step", "loss", "grad_norm")
        differ = [one["step"] for one, other in pairs if any(one[key] != other[key] for key in keys)]
        largest = max(abs(one["loss"] - other["loss"]) for one, other in pairs)
        row = {"part": "killed and resumed", "T": T, "deterministic": flag, "steps": len(pairs)}
        self.add(**row, first_that_differs=differ[0] if differ else None, largest_difference_of_loss=largest)

    def run(self) -> None:
        first, *others = self.lengths
        parts = [lambda: self.again(first, False), lambda: self.again(first, True)]
        parts[1:1] = [lambda T=others[0]: self.speed(self.train(T, f"speed-{T}"), T)]
        parts += [lambda T=T: self.speed(self.train(T, f"speed-{T}"), T) for T in others[1:]]
        names = [f"T={first}", f"T={others[0]}", f"T={first}, deterministic", *(f"T={T}" for T in others[1:])]
        for name, part in zip(names, parts, strict=True):
            try:
                part()
            except RuntimeError as error:
                self.add(part=name, failed=str(error))


def end(process: subprocess.Popen) -> None:
    """At once, and the workers that it started, which train and have sessions of their own."""
    workers = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for each in (process.pid, *map(int, workers)):
        os.kill(each, signal.SIGKILL)
    process.wait()
    while any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.05)


def folder_of(runs: pathlib.Path) -> pathlib.Path:
    """The only run's."""
    return next(path.parent for path in runs.glob("*/*/config.json"))


def steps_of(runs: pathlib.Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in runs.glob("*/*/metrics.jsonl"))


def metrics(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="training on one GPU: speed, kill and resume, determinism")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results; by default benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="try the script itself, without a GPU")
    with tempfile.TemporaryDirectory() as folder:
        Bench(parser.parse_args(), pathlib.Path(folder)).run()


if __name__ == "__main__":
    main()
