"""Folders of runs as training leaves them, made without training."""

import json
import os
import pathlib

from xformers_lab import record

BEGAN = 1_700_000_000


def stored(
    runs: pathlib.Path, name: str = "", *, task="copy", attention="full", seq_len=64, seed=0, labels=None, **more
) -> pathlib.Path:
    """The folder of one run, whose record is `more` with a seal; status=None leaves it unfinished, at step 3.
    labels: its `name` and `tags`."""
    count = len(list(runs.glob("*/*")))
    name = name or f"{count:012x}"
    folder = runs / task.partition(":")[0] / name
    folder.mkdir(parents=True)
    model = {"attention": attention, "dim": more.pop("dim", 64)}
    config = {"task": task, "seq_len": seq_len, "seed": seed, "model": model, "train": {"steps": more.pop("steps", 5)}}
    config |= labels or {}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": step, "loss": 2.0 / step, "seconds": 0.1, "grad_norm": 1.0} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if more.get("status", "ok") is not None:
        measured = {"metric": 0.5, "metric_name": "accuracy", "higher_is_better": True, "chance": 0.1}
        row = {"id": name, "status": "ok", "step": 5, "tokens_per_second": 1000.0, "loss": 1.0, "config": config}
        (folder / "result.json").write_text(json.dumps(record.sealed({**row, **measured, **more})))
    os.utime(folder / "config.json", (BEGAN + 60 * count, BEGAN + 60 * count))
    return folder
