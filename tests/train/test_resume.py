"""A run that was killed or interrupted ends, once resumed, in the very bits of the one that was not."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from test_train import TASK, losses_of, tiny
from test_train_devices import COUNTING

from xformers_lab import config as configs
from xformers_lab.config import Config
from xformers_lab.errors import IntegrityError, UsageError
from xformers_lab.train import checkpoint, jobs, loop, records

# Sends a signal to its own process while it makes the batch of a step: "9 7" kills at batch 7 of the training split.
STRIKE = """
        strike = os.environ.get("STRIKE", "").split()
        if strike and [split, str(step)] == strike[1:]:
            os.kill(os.getpid(), int(strike[0]))
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> dict:
    """A run with everything that could be lost: dropout, Adam's moments, a counter that changes every output."""
    folder = tmp_path_factory.mktemp("choices")
    (folder / "uneven.py").write_text(TASK.replace("        rng = np", STRIKE + "        rng = np"))
    (folder / "counting.py").write_text(COUNTING)
    return {
        "task": str(folder / "uneven.py"),
        "attention": str(folder / "counting.py"),
        "layers": 2,
        "dropout": 0.1,
        "steps": 12,
        "save_every": 3,
        "eval_every": 4,
    }


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> tuple[dict, dict]:
    """The record and the final arrays of the run that nothing disturbs."""
    config = tiny(**words, runs=tmp_path_factory.mktemp("whole"))
    return loop.run(config), arrays(config)


def arrays(config: Config) -> dict:
    """Every array of the last checkpoint: parameters, optimizer, other variables, counters."""
    folder = configs.folder(config)
    job = jobs.prepare(config, folder)
    state, step = checkpoint.restore(folder, job.target(), job.about)
    assert step == config.train.steps
    return {name: np.asarray(leaf).tobytes() for name, leaf in checkpoint.named_leaves(state).items()}


def train(config: Config, strike: str) -> subprocess.CompletedProcess:
    """`xlab train` in a process of its own, which a signal will hit."""
    arguments = [
        f"{key}={configs.spec.show(value)}" for key in configs.KEYS if (value := configs.get(config, key)) is not None
    ]
    command = [sys.executable, "-m", "xformers_lab", "train", "--json", *arguments]
    environment = os.environ | {"STRIKE": strike}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def same_end(config: Config, record: dict, whole: tuple[dict, dict]) -> None:
    expected, expected_arrays = whole
    for key in ("id", "status", "loss", "metric", "validation", "steps", "skipped", "flops", "parameters"):
        assert record[key] == expected[key], key
    assert losses_of(record) == losses_of(expected)
    saved = arrays(config)
    assert any(name.startswith("extra.") for name in saved) and any(name.startswith("opt.") for name in saved)
    assert [name for name in saved if saved[name] != expected_arrays[name]] == []
    assert [line["step"] for line in records.read(configs.folder(config))] == list(range(1, 13))


def test_killed_and_resumed(words, whole, tmp_path, caplog):
    config = tiny(**words, runs=tmp_path)
    ran = train(config, f"{int(signal.SIGKILL)} train 9")
    assert ran.returncode == 3 and ran.stdout == "" and "killed (signal 9) while training after step" in ran.stderr
    assert f"go on with xlab resume {configs.folder(config)}" in ran.stderr
    saved = checkpoint.steps(configs.folder(config))
    assert len(saved) == 2 and saved[-1] < 12 and not (configs.folder(config) / "result.json").exists()
    # The newest checkpoint rots meanwhile; the one before has to do.
    rotten = max(
        (configs.folder(config) / "checkpoints" / str(saved[-1])).rglob("*"), key=lambda path: path.stat().st_size
    )
    rotten.write_bytes(rotten.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError, match=f"xlab resume {configs.folder(config)}"):
        loop.run(config)
    record = loop.resume(configs.folder(config))
    assert f"going on from step {saved[0]}" in caplog.text
    same_end(config, record, whole)


@pytest.mark.parametrize(
    ("strike", "steps"),
    [(f"{int(signal.SIGINT)} train 6", (5, 6, 7)), (f"{int(signal.SIGTERM)} validation 1", (4, 5))],
    ids=["ctrl-c", "sigterm while validating"],
)
def test_interrupted_saves_and_says_how_to_go_on(words, whole, tmp_path, strike, steps):
    config = tiny(**words, runs=tmp_path)
    ran = train(config, strike)
    folder = configs.folder(config)
    assert ran.returncode == 128 + int(strike.split()[0]), ran.stderr
    assert f"go on with xlab resume {folder}" in ran.stderr and "Traceback" not in ran.stderr
    assert checkpoint.steps(folder)[-1] in steps and ran.stdout == ""
    moved = folder.rename(tmp_path / "moved")  # a folder may be moved in between
    record = loop.resume(moved)
    moved.rename(folder)
    same_end(config, record | {"run_dir": str(folder)}, whole)


@pytest.mark.full
def test_stop_asks_like_a_signal(words, whole, tmp_path):
    config, seen = tiny(**words, runs=tmp_path), []
    progress = lambda step, total, metrics: seen.append(step)
    with pytest.raises(loop.Interrupted) as caught:
        loop.run(config, progress=progress, stop=lambda: len(seen) >= 2)
    assert caught.value.exit_code == 130
    same_end(config, loop.run(config, resume=True, progress=progress), whole)
    assert seen == list(range(1, 13))  # nothing was computed twice


@pytest.mark.full
def test_killed_before_the_first_checkpoint_starts_again(words, whole, tmp_path):
    config = tiny(**words, runs=tmp_path)
    folder = configs.folder(config)
    folder.mkdir(parents=True)
    records.write_json(folder / "config.json", configs.to_dict(config))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n{"step": 2, "lo')
    same_end(config, loop.run(config), whole)


def test_what_cannot_be_resumed_says_why(words, tmp_path):
    with pytest.raises(UsageError, match="no run there"):
        loop.resume(tmp_path)
    config = tiny(**words, runs=tmp_path)
    with pytest.raises(loop.Interrupted):
        loop.run(config, stop=lambda: True)
    folder = configs.folder(config)
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"lr": 0.003', '"lr": 0.01'))
    with pytest.raises(UsageError, match=r"belongs to another config \(lr was 0.003, is 0.01\)"):
        loop.resume(folder)
    path.write_text(text.replace('"lr"', '"learning"'))
    with pytest.raises(UsageError, match="unknown key"):
        loop.resume(folder)
    path.write_text(text)
    for file in folder.glob("checkpoints/*/MANIFEST.json"):
        file.unlink()
    with pytest.raises(IntegrityError, match="no checkpoint verifies"):
        loop.resume(folder)
    assert json.loads(path.read_text()) == configs.to_dict(config)
