"""Sweeps of tiny cells by the command itself, and what they leave."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

TINY = ["task=copy", "seq_len=16", "dim=16", "layers=1", "batch=4", "eval_batches=1", "--no-baselines"]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "xformers_lab", "compare", *TINY, *map(str, words)]


def start(*words: object, environment=os.environ, cwd: pathlib.Path | None = None) -> subprocess.Popen:
    """The command under way, in a session of its own."""
    return subprocess.Popen(
        command(*words),
        env=environment,
        cwd=cwd,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def rows(*words: object, environment=os.environ, cwd: pathlib.Path | None = None, code: int = 0) -> list[dict]:
    """The rows of the command, which ends with that code."""
    running = start(*words, "--json", environment=environment, cwd=cwd)
    return finished(running, code)


def finished(running: subprocess.Popen, code: int = 0) -> list[dict]:
    out, err = running.communicate(timeout=900)
    assert running.returncode == code and "Traceback" not in err, err
    return json.loads(out)


def results(runs: pathlib.Path) -> dict[str, str]:
    """Id -> the sha256 of its result, of every cell that is settled."""
    found = {}
    for path in runs.glob("copy/*/result.json"):
        text = path.read_bytes()
        if json.loads(text)["status"] == "ok":
            found[path.parent.name] = hashlib.sha256(text).hexdigest()
    return found


def parameters(runs: pathlib.Path) -> dict[str, str]:
    """Id -> a hash of the parameters that a run ended with, and of its optimizer's moments."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found = {}
    for folder in sorted(runs.glob("copy/*")):
        newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        state = ocp.StandardCheckpointer().restore((newest / "state").absolute())
        digest = hashlib.sha256(newest.name.encode())
        for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(state), key=lambda pair: str(pair[0])):
            digest.update(str(path).encode() + np.asarray(leaf).tobytes())
        found[folder.name] = digest.hexdigest()
    return found


def steps(runs: pathlib.Path) -> int:
    """How many steps all cells have taken."""
    return sum(len(path.read_text().splitlines()) for path in runs.glob("copy/*/metrics.jsonl"))


def until(holds, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.1)


def once(runs: pathlib.Path, count: int) -> None:
    """Every cell of so many is whole, and each of its steps stands in its metrics once."""
    folders = [path.parent for path in runs.glob("copy/*/result.json")]
    assert len(folders) == count
    for folder in folders:
        taken = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert taken == list(range(1, len(taken) + 1)), folder
