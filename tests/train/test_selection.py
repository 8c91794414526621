"""select=best: what counts are the parameters of the best validation, whatever interrupts the run."""

import json
import pathlib

import jax
import kinds
import numpy as np
import pytest
from flax import nnx
from test_train import TASK, tiny

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_task, check_config
from xformers_lab.train import checkpoint, initial, jobs, loop, optimizer, selection, trained
from xformers_lab.train.state import init

# So fast that it overshoots: the best of its validations is not the last.
FAST = {
    "select": "best",
    "score": "validation",
    "lr": 0.3,
    "steps": 8,
    "eval_every": 1,
    "save_every": 3,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def task_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "uneven.py"
    path.write_text(TASK)
    return str(path)


@pytest.fixture(scope="module")
def whole(task_file, tmp_path_factory) -> dict:
    return loop.run(tiny(task_file, tmp_path_factory.mktemp("whole"), **FAST))


def saved(folder) -> dict:
    """Every array of the last checkpoint."""
    config = configs.stored(pathlib.Path(folder) / "config.json", trust=True)
    job = jobs.prepare(config, pathlib.Path(folder))
    kept, _ = checkpoint.restore(pathlib.Path(folder), job.target(), job.about)
    return {name: np.asarray(leaf).tobytes() for name, leaf in checkpoint.named_leaves(kept).items()}


def test_the_record_is_of_the_best_validation(whole):
    best = max(whole["validation"], key=lambda point: point[2])  # of equals the first
    assert whole["step"] == best[0] < 8 and whole["steps"] == 8
    assert [whole["loss"], whole["metric"]] == best[1:], "both are of the same examples"
    assert whole["metric"] >= whole["validation"][-1][2]
    assert whole["config"]["train"]["select"] == "best"


@pytest.mark.full
def test_whoever_uses_the_run_gets_these_parameters(whole, caplog, capsys):
    folder = whole["run_dir"]
    scored = trained.evaluate(folder)
    assert (scored["metric"], scored["loss"], scored["step"]) == (whole["metric"], whole["loss"], whole["step"])
    words = f"select=best: the parameters are those of step {whole['step']}, the best validation, of 8"
    assert words in caplog.text
    arrays = saved(folder)
    _, _, model = trained.load(folder)
    of = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for name, leaf in checkpoint.named_leaves(of).items():
        assert np.asarray(leaf).tobytes() == arrays[f"best.params.{name}"]
    assert any(arrays[f"best.params.{name}"] != arrays[f"state.params.{name}"] for name in checkpoint.named_leaves(of))
    assert main(["eval", folder, "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["step"] == whole["step"]


@pytest.mark.full
@pytest.mark.parametrize("after", kinds.every_third([4, 1, 2, 7]))
def test_interrupted_and_resumed_it_is_the_same(task_file, whole, tmp_path, after):
    config, seen = tiny(task_file, tmp_path, **FAST), []
    progress = lambda step, total, metrics: seen.append(step)
    with pytest.raises(loop.Interrupted):
        loop.run(config, progress=progress, stop=lambda: len(seen) >= after)
    record = loop.run(config, resume=True)
    for key in ("loss", "metric", "step", "steps", "validation", "id"):
        assert record[key] == whole[key], key
    assert saved(record["run_dir"]) == saved(whole["run_dir"])


@pytest.mark.full
def test_before_a_validation_the_last_saved_counts(task_file, tmp_path, caplog):
    config, seen = tiny(task_file, tmp_path, **(FAST | {"eval_every": 8})), []
    progress = lambda step, total, metrics: seen.append(step)
    with pytest.raises(loop.Interrupted):
        loop.run(config, progress=progress, stop=lambda: len(seen) >= 2)
    step = checkpoint.steps(configs.folder(config))[-1]
    assert trained.evaluate(configs.folder(config))["step"] == step
    assert "the last one saved, for nothing is validated yet" in caplog.text


@pytest.mark.full
def test_a_run_that_begins_with_it_takes_the_best(task_file, whole, tmp_path):
    config = tiny(task_file, tmp_path, init=whole["run_dir"])
    task, arrays = build_task(config), saved(whole["run_dir"])
    matched = initial.match(config, task)
    assert matched.fresh == [] and not matched.cut
    tx = optimizer.of(config, task)
    taken = initial.take(matched, init(config, task, tx), tx)
    leaves = checkpoint.named_leaves(taken.params)
    for name, leaf in leaves.items():
        assert np.asarray(leaf).tobytes() == arrays[f"best.params.{name}"]
    assert any(arrays[f"best.params.{name}"] != arrays[f"state.params.{name}"] for name in leaves)


@pytest.mark.full
def test_other_lengths_are_scored_with_the_best(tmp_path):
    config = tiny("copy", tmp_path, **(FAST | {"score": "test", "position": "alibi", "test_len": "8+32"}))
    record = loop.run(config)
    assert record["step"] < 8
    for row in record["by_length"]:
        again = trained.evaluate(configs.folder(config), length=row["seq_len"])
        assert again["step"] == record["step"] and {key: again[key] for key in row} == row
    last = loop.run(edit(config, select="last"))
    assert [row["loss"] for row in last["by_length"]] != [row["loss"] for row in record["by_length"]]


def test_the_last_step_counts_by_default(task_file, whole, tmp_path):
    last = loop.run(edit(tiny(task_file, tmp_path, **FAST), select="last"))
    assert last["validation"] == whole["validation"] and last["id"] != whole["id"]
    assert (last["step"], last["metric"]) == (8, last["validation"][-1][2])


def test_the_best_of_no_validations_is_refused(task_file, tmp_path):
    config = tiny(task_file, tmp_path, select="best", steps=50)
    for refused in (check_config, loop.run):
        with pytest.raises(UsageError, match=r"select=best chooses among validations.*eval_every=5"):
            refused(config)


def test_better_has_a_direction_and_the_earlier_of_equals_stays():
    assert selection.improves(0.1, None, higher_is_better=True) and selection.improves(
        0.1, None, higher_is_better=False
    )
    assert selection.improves(0.3, 0.2, higher_is_better=True) and not selection.improves(
        0.3, 0.2, higher_is_better=False
    )
    assert selection.improves(0.1, 0.2, higher_is_better=False) and not selection.improves(
        0.1, 0.2, higher_is_better=True
    )
    assert not any(selection.improves(0.2, 0.2, higher_is_better=higher) for higher in (True, False))


def test_the_best_outlives_the_state_that_it_was(task_file, tmp_path):
    """A step uses up its state, so what is kept of it are copies."""
    config = tiny(task_file, tmp_path)
    task = build_task(config)
    state = init(config, task, optimizer.of(config, task))
    best = selection.best_of(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(best))
