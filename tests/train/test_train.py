"""The trainer: what a step computes, what a run records, what it refuses."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from xformers_lab import config as configs
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.train import checkpoint, failures, loop, optimizer, prefetch, records, trained
from xformers_lab.train.layout import layout_of
from xformers_lab.train.state import init, structure
from xformers_lab.train.step import make_train_step

# Unequal weights, so that a mean of means is wrong; batch 3 can be spoilt to see what a bad one does.
TASK = """
import os
import numpy as np
from xformers_lab.tasks import Batch, Task

class Uneven(Task):
    vocab, outputs, chance, kinds = 11, 11, 1 / 11, ("decoder", "encoder")

    def batch(self, split, step):
        rng = np.random.default_rng([self.setting.seed, len(split), step])
        shape = (self.setting.batch, self.setting.seq_len)
        inputs = rng.integers(0, 11, shape, dtype=np.int32)
        weights = (rng.random(shape) * rng.integers(0, 2, (shape[0], 1))).astype(np.float32)
        if split == "train" and str(step) in os.environ.get("SPOIL", "").split(","):
            weights[0, 0] = np.nan
        return Batch(inputs, (3 * inputs + 1) % 11, weights)
"""


# One step moves the parameters by the gradient itself.
PLAIN = {"optimizer": "sgd", "lr": 1.0, "schedule": "constant", "warmup": 0, "weight_decay": 0, "clip": 0}


@pytest.fixture(scope="module")
def task_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "uneven.py"
    path.write_text(TASK)
    return str(path)


def tiny(task: str, runs: pathlib.Path | str = "runs", **changes) -> Config:
    small = edit(Config(), task=task, runs=str(runs), seq_len=16, dim=16, layers=1, batch=8, steps=6, eval_batches=2)
    return edit(small, **changes)


def tiny_task(task: str, **changes) -> tuple:
    """A config, and its task."""
    config = tiny(task, **changes)
    return config, build_task(config)


def losses_of(record: dict) -> list:
    """The curve of a record without its seconds."""
    return [point[:2] for point in record["curve"]]


def digest_of(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def stepped(task_file):
    """A function: config changes -> the state before and after one step on batch 0, and its metrics."""

    def one(**changes):
        config = tiny(task_file, **changes)
        task = build_task(config)
        tx = optimizer.of(config, task)
        state = init(config, task, tx)
        step = jax.jit(make_train_step(config, task, structure(config, task), tx))
        return state, *step(state, prefetch.checked(task, "train", 0))

    return one


def test_accumulation_changes_nothing(stepped):
    (_, whole, metrics), (_, parts, of_parts) = stepped(**PLAIN), stepped(**PLAIN, accumulate=4)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=2e-6)
    assert float(metrics["loss"]) == pytest.approx(float(of_parts["loss"]), abs=1e-6)


def test_the_step_is_the_gradient_of_the_mean_loss(stepped, task_file):
    before, after, metrics = stepped(**PLAIN)
    config = tiny(task_file)
    task, model = build_task(config), build_model(config, build_task(config))
    batch = task.batch("train", 0)

    def mean_loss(params):
        logits, _ = nnx.merge(nnx.split(model)[0], params)(jax.numpy.asarray(batch.inputs))
        chosen = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
        return -(chosen * batch.weights).sum() / batch.weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(before.params)
    assert float(metrics["loss"]) == pytest.approx(float(loss), abs=1e-6)
    for old, new, grad in zip(*map(jax.tree.leaves, (before.params, after.params, grads)), strict=True):
        np.testing.assert_allclose(old - new, grad, atol=1e-6)


def test_clipping_bounds_the_update(stepped):
    before, after, metrics = stepped(**(PLAIN | {"clip": 0.01}))
    squares = [((a - b) ** 2).sum() for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)]
    assert float(metrics["grad_norm"]) > 0.1
    assert math.sqrt(sum(map(float, squares))) == pytest.approx(0.01, rel=1e-3)


def test_what_scales_an_update_is_data(task_file):
    """A step that takes the rates of another config from its state does what that config's own step does."""
    one = tiny(task_file, weight_decay=0.3, clip=0.5, warmup=0.5)
    other = edit(one, lr=0.1, weight_decay=0.0, clip=0.0, warmup=0.0, steps=3)
    task = build_task(one)
    batch, graph = task.batch("train", 0), structure(one, task)
    own, borrowed = (
        jax.jit(make_train_step(config, task, graph, optimizer.of(config, task)))(
            init(other, task, optimizer.of(other, task)), batch
        )
        for config in (other, one)
    )
    assert digest_of(own) == digest_of(borrowed)
    before = init(other, task, optimizer.of(other, task))
    assert all(map(np.any, (a - b for a, b in zip(*map(jax.tree.leaves, (own[0].params, before.params)), strict=True))))


def test_learning_rate_warms_up_and_falls():
    rate = optimizer.learning_rate(edit(Config(), steps=100, lr=1.0, warmup=0.1).train)
    assert [np.asarray(rate(n)).item() for n in (0, 4, 9, 10, 55)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5])
    assert 0 < np.asarray(rate(99)).item() < 0.001
    flat = optimizer.learning_rate(edit(Config(), steps=100, lr=1.0, warmup=0, schedule="constant").train)
    assert [np.asarray(flat(n)).item() for n in (0, 99)] == [1.0, 1.0]


def test_non_finite_gradients_change_nothing(task_file, monkeypatch):
    monkeypatch.setenv("SPOIL", "0")
    config = tiny(task_file)
    task = build_task(config)
    tx = optimizer.of(config, task)
    state = init(config, task, tx)
    step = jax.jit(make_train_step(config, task, structure(config, task), tx))
    after, metrics = step(state, prefetch.checked(task, "train", 0))
    assert not math.isfinite(float(metrics["loss"]))
    assert digest_of((after.params, after.opt, after.extra)) == digest_of((state.params, state.opt, state.extra))
    assert (int(after.step), int(after.skipped)) == (1, 1)
    after, metrics = step(after, prefetch.checked(task, "train", 1))
    assert digest_of(after.params) != digest_of(state.params)
    assert (int(after.step), int(after.skipped)) == (2, 1)


def test_a_run_leaves_its_record(task_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-secret")
    monkeypatch.setenv("SPOIL", "2")
    seen = []
    config = tiny(task_file, tmp_path, eval_every=2, save_every=2)
    record = loop.run(config, progress=lambda step, total, metrics: seen.append((step, total)))
    folder = configs.folder(config)
    assert seen == [(step, 6) for step in range(1, 7)]
    assert record == json.loads((folder / "result.json").read_text())
    assert record["status"] == "ok" and record["skipped"] == 1 and record["steps"] == 6
    assert 0 <= record["metric"] <= 1 and record["loss"] > 0 and record["metric_name"] == "accuracy"
    assert record["tokens_per_second"] == pytest.approx(8 * 16 / record["seconds_median"])
    assert record["seconds_min"] <= record["seconds_median"]
    assert record["flops"] > 0 and record["temp_bytes"] > 0 and record["compile_seconds"] > 0
    assert record["kernel"] == "blocks"
    assert record["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(_model(config), nnx.Param)))
    assert [step for step, _, _ in record["curve"]] == [1, 2, 4, 5, 6]  # the spoilt third has no loss
    assert [step for step, _, _ in record["validation"]] == [2, 4, 6]
    assert [line["step"] for line in records.read(folder)] == [1, 2, 3, 4, 5, 6]
    assert configs.from_dict(json.loads((folder / "config.json").read_text())) == config
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl")]
    assert len(files) >= 4 and not any("canary-secret" in path.read_text() for path in files)
    assert json.loads((folder / "env.json").read_text())["packages"]["jax"] == jax.__version__

    # A second call computes nothing; scoring the checkpoint again gives the record's own figures.
    assert loop.run(config, progress=lambda *_: pytest.fail("trained again")) == record
    scored = trained.evaluate(folder)
    assert (scored["loss"], scored["metric"], scored["step"]) == (record["loss"], record["metric"], 6)
    assert trained.evaluate(folder, split="train", batches=1)["loss"] != record["loss"]


def _model(config: Config):
    return build_model(config, build_task(config))


def test_same_config_same_bits(task_file, tmp_path):
    first, second = (loop.run(tiny(task_file, tmp_path / name, dropout=0.2)) for name in "ab")
    result = lambda record: (record["loss"], record["metric"], losses_of(record))
    assert result(first) == result(second)
    assert (other := loop.run(tiny(task_file, tmp_path, dropout=0.2, seed=1)))["loss"] != first["loss"], other


def test_a_run_that_stays_non_finite_fails(task_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SPOIL", ",".join(map(str, range(3, 40))))
    flat = {"schedule": "constant", "warmup": 0}
    config = tiny(task_file, tmp_path, steps=40, **flat)
    with pytest.raises(failures.Diverged, match="non-finite at step 4 ") as caught:
        loop.run(config)
    assert caught.value.exit_code == 3
    record = json.loads((configs.folder(config) / "result.json").read_text())
    assert record["status"] == "nan" and record["metric"] is None and "step 4" in record["reason"]
    assert [step for step, _, _ in record["curve"]] == [1, 2, 3]
    # Nothing was saved on the way: the parameters before the fault are.
    (step,) = checkpoint.steps(configs.folder(config))
    assert f"kept as the checkpoint of step {step}" in record["reason"]
    before = loop.run(tiny(task_file, tmp_path, steps=3, **flat))
    assert trained.evaluate(configs.folder(config))["loss"] == pytest.approx(before["loss"])
    with pytest.raises(failures.Diverged, match="as stored"):
        loop.run(config, progress=lambda *_: pytest.fail("trained again"))


LOCKING = """
import pathlib, sys
from xformers_lab.train import records
with records.locked(pathlib.Path(sys.argv[1])):
    exec(sys.argv[2])
"""


def test_a_second_process_is_refused(task_file, tmp_path):
    config = tiny(task_file, tmp_path)
    folder = configs.folder(config)
    with records.locked(folder):
        command = [sys.executable, "-c", LOCKING, str(folder), "print('ran')"]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} on" in other.stderr and other.stdout == ""
        with pytest.raises(UsageError, match=f"process {os.getpid()} on"):
            loop.run(config)
    with records.locked(folder):
        pass


def test_a_lock_left_by_a_dead_process_is_no_obstacle(tmp_path):
    die = "import os; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", LOCKING, str(tmp_path), die], check=False).returncode == -9
    assert (tmp_path / "owner.json").exists()
    with records.locked(tmp_path):
        pass


def test_metrics_are_cut_back_and_a_torn_line_is_left_out(tmp_path):
    for step in (1, 2, 3, 3, 4):
        records.append(tmp_path, {"step": step, "loss": float("nan") if step == 2 else 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [line["step"] for line in records.read(tmp_path)] == [1, 2, 3, 3, 4]
    assert records.read(tmp_path)[1]["loss"] is None
    assert [line["step"] for line in records.cut(tmp_path, 3)] == [1, 2, 3]
    assert [line["step"] for line in records.read(tmp_path)] == [1, 2, 3]


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    records.write_json(path, {"a": [1.5, float("inf")]})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert list(tmp_path.iterdir()) == [path]


def test_bad_batches_are_named(tmp_path):
    for wrong, message in (
        ("inputs.fill(11)", "inputs of train batch 0 hold 11, but vocab=11"),
        ("inputs[0, 0] = -1", "hold -1"),
        ("weights = weights[:, 1:]", r"weights of train batch 0 is \(8, 15\), not \(8, 16\)"),
    ):
        path = tmp_path / f"bad{len(wrong)}" / "uneven.py"
        path.parent.mkdir()
        path.write_text(
            TASK.replace(
                "        return Batch",
                f"        targets = (3 * inputs + 1) % 11\n        {wrong}\n        return Batch",
            ).replace("(3 * inputs + 1) % 11, weights", "targets, weights")
        )
        with pytest.raises(UsageError, match=message):
            loop.run(tiny(str(path), tmp_path))


def test_batch_must_be_shared_out_equally(task_file, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [object()] * 8)
    with pytest.raises(
        UsageError, match=r"batch=12 cannot be shared out over 8 devices: .* divisible by 8, such as batch=16"
    ):
        layout_of(*tiny_task(task_file, batch=12))
    with pytest.raises(UsageError, match=r"accumulate=2 parts: .* divisible by 16"):
        layout_of(*tiny_task(task_file, batch=24, accumulate=2))


@pytest.mark.parametrize("ffn, message", [
    ("mlp", "ffn=mlp has none: use ffn=moe or layout=data"),
    ("moe:experts=7", "cannot share out 7 experts over 8 devices"),
])  # fmt: skip
def test_experts_must_be_shared_out_equally(task_file, monkeypatch, ffn, message):
    devices = jax.devices() * 8
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UsageError, match=message):
        layout_of(*tiny_task(task_file, layout="experts", ffn=ffn))
