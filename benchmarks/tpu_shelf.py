"""Which mechanisms compile for a TPU, and how much of its memory a step of training takes: nothing runs, and no TPU is
needed, only its compiler (`pip install 'xformers_lab[plan]'`).

A language model of 4 layers, width 512 and 8 heads, bfloat16, two sequences, on one chip. A mechanism that cannot be
causal stands in a masked language model instead, and its row says so. Compiling takes minutes a row: rows that
results/ has already are not made again, so that a run that was stopped goes on; `--anew` makes all.
"""

import argparse
import importlib.metadata
import json
import sys

from _duel import keep, place

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.plan import devices, rows
from xformers_lab.plan.target import targets
from xformers_lab.supervise.process import ENDS, Worker

NAME = "tpu_shelf"
MODEL = ["layers=4", "dim=512", "heads=8", "dtype=bfloat16", "batch=2"]
TASKS = ("lm", "mlm:of=lm")
SHOWN = ("parameters", "optimizer", "activations", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--attention", default="all")
    parser.add_argument("--anew", action="store_true")
    chosen = parser.parse_args()
    (target,) = targets([chosen.topology], [])
    mechanisms = spec.names("attention") if chosen.attention == "all" else chosen.attention.split(",")
    lengths = [int(length) for length in chosen.lengths.split(",")]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    path = place(NAME, target.name)
    kept = [] if chosen.anew or not path.is_file() else json.loads(path.read_text())["rows"]
    made = {(row["attention"], row["N"]): row for row in kept}
    with Worker(notice=ENDS, environment=devices.environment(1)) as worker:
        for length in lengths:
            for mechanism in mechanisms:
                if (mechanism, length) in made:
                    continue
                row = _row(planned(target, mechanism, length, worker))
                if worker.stopped:
                    sys.exit(128 + worker.stopped)
                made[mechanism, length] = row
                print(row, file=sys.stderr, flush=True)
                keep(NAME, [made[key] for key in sorted(made)], planned={"target": target.name, **versions})


def planned(target, mechanism: str, length: int, worker: Worker) -> dict:
    """The row of a plan, of the first task that the mechanism can be in."""
    row: dict = {}
    for task in TASKS:
        words = [f"task={task}", f"attention={mechanism}", f"seq_len={length}", *MODEL]
        cells, varied = configs.sweep(words)
        (row,) = rows.plan([target], cells, [*varied, "task"], worker, skip_impossible=True)
        if row["status"] != "refused":
            break
    return row


def _row(row: dict) -> dict:
    size = lambda name: None if (found := row.get("bytes", {}).get(name)) is None else round(found / 2**20, 1)
    task = spec.parse(row["task"]).name
    compiled = "yes" if row["status"] == "ok" else row["reason"]
    fits = {True: "yes", False: "no", None: None}[row.get("fits")]
    shown = {"attention": row["attention"], "N": row["seq_len"], "task": task, "compiles": compiled, "fits": fits}
    shown |= {f"{name}_MiB": size(name) for name in SHOWN}
    flops = row.get("flops_per_token")
    return shown | {"MFLOP_per_token": flops and round(flops / 1e6, 1)}


if __name__ == "__main__":
    main()
