"""An evaluation is one pass: each example once, the same ones whatever the batch and the seed; what it says is true."""

import collections
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import kinds
import numpy as np
import pytest
from flax import nnx
from test_train import tiny

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.tasks import Batch, Setting, Task
from xformers_lab.train import checkpoint, evaluation, failures, loop, records, trained
from xformers_lab.train.evaluation import DRAWN, UNIT, WATCHED

# Only `batch`, like any task of a user's own; a split can be spoilt, and a training loss made to blow up.
OWN = """
import os
import numpy as np
from xformers_lab.tasks import Batch, Task

class Own(Task):
    vocab, outputs, chance, kinds, target = 7, 7, 1 / 7, ("encoder",), "sequence"

    def batch(self, split, step):
        rng = np.random.default_rng([self.setting.seed, len(split), step])
        inputs = rng.integers(0, 7, (self.setting.batch, self.setting.seq_len), dtype=np.int32)
        weights = np.full(len(inputs), {"nan": np.nan, "zero": 0.0}.get(os.environ.get(split.upper()), 1), np.float32)
        return Batch(inputs, inputs[:, 0], weights)
"""

# One of whose answers is rare, and whose test split has 45 examples.
FINITE = """
import numpy as np
from xformers_lab.tasks import Batch, Task

class Finite(Task):
    vocab, outputs, chance, kinds, target = 8, 2, 0.5, ("encoder",), "sequence"

    def examples(self, split):
        return 45 if split == "test" else 2000

    def take(self, split, numbers):
        inputs = np.random.default_rng(len(split)).integers(0, 8, (self.examples(split), self.setting.seq_len))[numbers]
        return Batch(inputs.astype(np.int32), (numbers % 9 == 0).astype(np.int32), np.ones(len(numbers), np.float32))

    def batch(self, split, step):
        rng = np.random.default_rng([self.setting.seed, len(split), step])
        return self.take(split, rng.integers(0, self.examples(split), self.setting.batch))
"""


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> dict[str, str]:
    """Tasks of every kind: with an end, without, a user's own."""
    folder = tmp_path_factory.mktemp("evaluated")
    words = lambda number: " ".join(str(number * word * 7919 % 1009) for word in range(2, 8))
    rows = [{"text": words(number), "label": int(number % 5 == 0)} for number in range(1, 200)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "words.txt").write_text(" ".join(words(number) for number in range(1, 90)))
    for side in ("de", "en"):
        (folder / "pairs").mkdir(exist_ok=True)
        for split, count in (("train", 90), ("valid", 11), ("test", 13)):
            lines = [f"{side}{split[0]}{number}" for number in range(count)]
            (folder / "pairs" / f"{split}.{side}").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (200, 4, 4), np.uint8), np.arange(200) % 3
    np.savez(folder / "images.npz", x=images, y=labels)
    (folder / "own.py").write_text(OWN)
    (folder / "finite.py").write_text(FINITE)
    return {
        "lm": f"lm:path={folder / 'words.txt'}",
        "overlapping": f"lm:path={folder / 'words.txt'}:stride=5",
        "mlm": f"mlm:path={folder / 'rows.jsonl'}",
        "text": f"text:path={folder / 'rows.jsonl'}",
        "translate": f"translate:path={folder / 'pairs'}",
        "pixels": f"pixels:path={folder / 'images.npz'}",
        "masked_pixels": f"masked_pixels:path={folder / 'images.npz'}",
        "own": str(folder / "own.py"),
        "finite": str(folder / "finite.py"),
        **{name: name for name in ("copy", "mqar:pairs=4", "needle", "listops")},
    }


ENDING = ("lm", "overlapping", "mlm", "text", "translate", "pixels", "masked_pixels", "finite")
ENDLESS = ("own", "copy", "mqar:pairs=4", "needle", "listops")


def built(choice: str, batch: int = 8, seed: int = 0) -> Any:
    return build_task(edit(Config(), task=choice, seq_len=16, batch=batch, seed=seed))


def sampled(choice: str, batch: int, wanted, split: Any = "test", *, seed=0, most=None, segments=False) -> Any:
    rebuilt = lambda batch: built(choice, batch)
    return evaluation.sample(built(choice, batch, seed), rebuilt, split, wanted, most, segments)


def rows(sample) -> collections.Counter:
    """The examples that a sample scores, each by its inputs, targets and weights."""
    seen = collections.Counter()
    for number in range(sample.batches):
        batch = sample.batch(number)
        assert np.asarray(batch.weights)[~batch.counted].sum() == 0
        for row in np.flatnonzero(batch.counted):
            seen[
                b"|".join(np.asarray(part[row]).tobytes() for part in (batch.inputs, batch.targets, batch.weights))
            ] += 1
    assert sum(seen.values()) == sample.examples
    return seen


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_with_an_end_is_scored_once(choices, name, split):
    task = built(choices[name])
    whole = task.take(split, np.arange(task.examples(split)))
    expected = collections.Counter(
        b"|".join(np.asarray(part[row]).tobytes() for part in (whole.inputs, whole.targets, whole.weights))
        for row in range(task.examples(split))
    )
    for batch in (1, 8, 64):
        sample = sampled(choices[name], batch, "all", split, seed=batch)
        assert (sample.examples, sample.of) == (task.examples(split),) * 2
        assert sample.batches == math.ceil(sample.of / batch)
        assert rows(sample) == expected


@pytest.mark.parametrize("name", ENDING + ENDLESS)
def test_neither_batch_nor_seed_chooses_what_is_scored(choices, name):
    one, other = (sampled(choices[name], batch, 1, "train", seed=seed) for batch, seed in ((8, 0), (12, 7)))
    assert one.examples == other.examples == UNIT
    assert rows(one) == rows(other)
    more = sampled(choices[name], 40, 2, "train")
    assert more.examples == 2 * UNIT and rows(one) <= rows(more)


@pytest.mark.parametrize("name", ENDLESS)
def test_all_of_what_has_no_end_is_a_number(choices, name):
    sample = sampled(choices[name], 100, "all")
    assert (sample.examples, sample.of, sample.batches) == (DRAWN, None, 3)


def test_a_sample_is_no_first_part_of_sorted_rows(choices):
    sample = sampled(choices["finite"], 10, 3, "train")
    assert (sample.examples, sample.of) == (3 * UNIT, 2000)
    task = built(choices["finite"])
    first = {task.take("train", np.array([number])).inputs.tobytes() for number in range(3 * UNIT)}
    scored = {sample.batch(at).inputs[row].tobytes() for at in range(9) for row in range(10)}
    assert len(first & scored) < UNIT


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_every_byte_of_a_text_is_predicted_once(choices, segments, batch):
    content = built(choices["lm"]).bytes["test"]
    sample = sampled(choices["lm"], batch, "all", segments=segments)
    answers = np.zeros(256)
    for number in range(sample.batches):
        one = sample.batch(number)
        answers += np.bincount(one.targets.ravel(), one.weights.ravel(), 256)
        if segments:
            assert one.fresh.tolist() == [number == 0] * batch
            goes_on = one.counted & (number > 0)
            assert np.array_equal(one.inputs[goes_on, 0], sample.batch(max(number - 1, 0)).targets[goes_on, -1])
    assert np.array_equal(answers, np.bincount(content[1:], minlength=256))


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_a_sample_for_a_memory_is_of_runs_from_all_over_the_split(choices, batch):
    """The first windows of a text are of one author, or of one file. Whatever the batch, a row goes on where it ended,
    or says that it begins anew."""
    task = built(choices["lm"])
    every = {task.take("train", np.array([at])).inputs.tobytes(): at for at in range(task.examples("train"))}
    sample = sampled(choices["lm"], batch, 2, "train", segments=True)
    assert sample.examples == 2 * UNIT < sample.of and sample.consecutive
    scored, last = set(), {}
    for number in range(sample.batches):
        one = sample.batch(number)
        for row in np.flatnonzero(one.counted):
            at = every[one.inputs[row].tobytes()]
            assert one.fresh[row] or at == last[row] + 1
            scored, last = scored | {at}, last | {row: at}
    assert len(scored) == 2 * UNIT
    assert min(scored) == 0 and sample.of // 2 in scored  # two runs: from the beginning, and from the middle
    assert all(at in scored for at in range(UNIT))


def test_segments_without_an_end_are_read_on(choices):
    """A task with `segment` alone: its rows cannot be dealt out anew, so the sample is of whole batches."""

    class Reading(Task):
        vocab = outputs = 1000

        def segment(self, split, step):
            starts = np.arange(self.setting.batch)[:, None] * 100 + step * 4
            inputs = (starts + np.arange(4) + 500 * (self.setting.seed > 0)).astype(np.int32)
            fresh = np.full(len(inputs), step == 0)
            return Batch(inputs, inputs + 1, np.ones(inputs.shape, np.float32), fresh=fresh)

    rebuilt = lambda batch: Reading(Setting(4, batch))
    sample = evaluation.sample(Reading(Setting(4, 5, seed=3)), rebuilt, "test", 1, None, True)
    assert (sample.examples, sample.of, sample.batches) == (35, None, 7)
    assert [sample.batch(step).inputs[2, 0] for step in range(7)] == list(range(200, 228, 4))


@pytest.mark.full
def test_the_figures_of_a_run_are_those_of_the_whole_split(choices, tmp_path):
    """With lr=0 the model is the same whatever the batch, and so is every figure; by hand, too."""
    records_of = [
        loop.run(tiny(choices["finite"], tmp_path, batch=batch, lr=0.0, eval_batches="all")) for batch in (8, 7)
    ]
    for record in records_of:
        assert (record["examples"], record["examples_of"], record["metric_interval"]) == (45, 45, None)
        assert record["majority"] == pytest.approx(40 / 45) and record["step"] == record["steps"] == 6
    assert records_of[0]["metric"] == records_of[1]["metric"]
    assert records_of[0]["loss"] == pytest.approx(records_of[1]["loss"], rel=1e-6)
    config = tiny(choices["finite"], tmp_path)
    task = build_task(config)
    batch: Any = task.take("test", np.arange(45))
    model: Any = build_model(config, task)
    logits, _ = model(batch.inputs)
    assert records_of[0]["metric"] == pytest.approx(float(np.mean(np.argmax(logits, -1) == batch.targets)))
    assert records_of[0]["loss"] == pytest.approx(float(task.loss(logits, batch)[0]) / 45, rel=1e-5)
    # The same again from the checkpoint, and a part of another split.
    folder = records_of[0]["run_dir"]
    again = trained.evaluate(folder)
    assert all(
        again[key] == records_of[0][key] for key in ("loss", "metric", "examples", "examples_of", "majority", "step")
    )
    part = trained.evaluate(folder, split="train", batches=2)
    assert (part["examples"], part["examples_of"]) == (64, 2000)
    low, high = part["metric_interval"]
    assert low < part["metric"] < high


@pytest.mark.full
@pytest.mark.parametrize("changes", kinds.every_third([
    {"task": "lm", "memory": "xl:length=8", "position": "rope"}, {"task": "lm", "attention": "linear"},
    {"task": "translate", "model": "encoder_decoder"}, {"task": "copy"}, {"task": "translate"},
]), ids=str)  # fmt: skip
def test_every_kind_of_model_is_scored(choices, tmp_path, changes):
    """Bits per byte of all batches together: without memory, those of one large batch."""
    scores = []
    for batch in (4, 6):
        record = loop.run(
            tiny(
                **{**changes, "task": choices[changes["task"]]},
                runs=tmp_path,
                batch=batch,
                lr=0.0,
                steps=1,
                eval_batches="all",
            )
        )
        scores.append(record["metric"])
        endless = changes["task"] == "copy"
        assert record["examples"] == (DRAWN if endless else record["examples_of"])
        assert (record["metric_interval"] is not None) == endless
    assert scores[0] == pytest.approx(scores[1], rel=1e-2 if "memory" in changes else 1e-5)


ON_DEVICES = """
import json, sys
import jax
from xformers_lab.config import Config, edit
from xformers_lab.train import failures, loop, trained

task, runs = sys.argv[1:]
small = edit(Config(), task=task, seq_len=16, dim=16, layers=1, batch=16, lr=0.0, steps=1, ffn="hash:experts=8")
FIGURES = ("devices", "examples", "metric", "majority", "loss", "validation")
for layout in ("data", "pmap", "experts", "data:2+fsdp:2+tensor:2", "fsdp+sequence:4"):
    config = edit(small, layout=layout, runs=f"{runs}/{layout.replace(':', '')}", eval_every=1)
    record = loop.run(config)
    print(json.dumps([record[key] for key in FIGURES]))
copy = edit(small, task="copy", ffn="mlp", layout="fsdp+sequence:2+tensor:2", runs=f"{runs}/copy", eval_batches=1)
assert loop.run(copy)["token_seconds"] > 0, "one device decodes what eight have trained"
# On devices that its layout is not for, the run is scored on one of them.
here = jax.devices()
jax.devices = lambda *backend: here[:3]
print(json.dumps([trained.evaluate(record["run_dir"])[key] for key in ("examples", "metric", "loss")]))
"""


@pytest.mark.full
def test_eight_devices_score_the_same_pass(choices, tmp_path):
    """The last of the batches, 13 of 16 rows, is shared out as well."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    words = [sys.executable, "-c", ON_DEVICES, choices["finite"], str(tmp_path)]
    ran = subprocess.run(words, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    alone = loop.run(
        tiny(
            choices["finite"],
            tmp_path,
            batch=9,
            lr=0.0,
            steps=1,
            ffn="hash:experts=8",
            eval_every=1,
            eval_batches="all",
        )
    )
    *layouts, elsewhere = map(json.loads, ran.stdout.splitlines()[-6:])
    assert "scored on one device: layout=fsdp+sequence:4" in ran.stderr
    assert elsewhere == [45, alone["metric"], pytest.approx(alone["loss"], rel=1e-5)]
    for line in layouts:
        devices, examples, metric, majority, loss, ((_, *validation),) = line
        assert (devices, examples, metric, majority) == (8, 45, alone["metric"], alone["majority"])
        assert [loss, *validation] == pytest.approx([alone["loss"], *alone["validation"][0][1:]], rel=1e-5)


@pytest.mark.full
def test_validation_on_the_way_is_a_bounded_sample(choices, tmp_path):
    record = loop.run(tiny(choices["finite"], tmp_path, batch=64, steps=2, eval_every=1, eval_batches="all"))
    assert record["validation_examples"] == WATCHED < 2000
    lines = records.read(pathlib.Path(record["run_dir"]))
    assert record["validation"] == [
        [line["step"], line["validation_loss"], line["validation_metric"]] for line in lines
    ]


def wilson(right: int, count: int) -> list[float]:
    share, z = right / count, 1.959964**2 / count
    half = math.sqrt(z * share * (1 - share) + z**2 / 4)
    return [(share + z / 2 - half) / (1 + z), (share + z / 2 + half) / (1 + z)]


class Scored(Task):
    metric_name = "accuracy"


class Bits(Scored):
    metric_name = "bits_per_byte"

    def finish(self, mean: float) -> float:
        return mean / math.log(2)


def moments(sums, weights) -> np.ndarray:
    s, w = np.asarray(sums, float) / 3, np.asarray(weights, float) / 3
    return np.array([(w != 0).sum(), s.sum(), w.sum(), (s * s).sum(), (s * w).sum(), (w * w).sum()])


def part_of(examples: int, of: int | None) -> Any:
    nothing: Any = None
    return evaluation.Sample(examples, of, 1, nothing)


@pytest.mark.parametrize("name", ["accuracy", "exact_match"])
@pytest.mark.parametrize("right", [0, 1, 20, 40])
def test_the_interval_of_a_share_is_wilsons(right, name):
    task, each = Scored(Setting(4, 4)), [1.0] * right + [0.0] * (40 - right)
    task.metric_name = name
    assert evaluation.interval(task, moments(each, [1.0] * 40), part_of(40, None)) == pytest.approx(wilson(right, 40))
    # Eight answers of each example that are all alike tell no more than one.
    many = moments([8 * one for one in each], [8.0] * 40)
    assert evaluation.interval(task, many, part_of(40, None)) == pytest.approx(wilson(right, 40))
    half = evaluation.interval(task, moments(each, [1.0] * 40), part_of(40, 80))
    assert half == pytest.approx(wilson(2 * right, 80)), "half of the split leaves half of the variance"
    assert evaluation.interval(task, moments(each, [1.0] * 40), part_of(40, 40)) is None


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    task, rng, held = Bits(Setting(4, 4)), np.random.default_rng(0), 0
    for _ in range(400):
        weights = rng.integers(1, 9, 50).astype(float)
        sums = weights * (2 + rng.standard_normal(50))
        ends: Any = evaluation.interval(task, moments(sums, weights), part_of(50, None))
        held += ends[0] < 2 / math.log(2) < ends[1]
    assert 0.91 < held / 400 < 0.98
    assert evaluation.interval(task, moments([1.0], [1.0]), part_of(1, None)) is None


@pytest.mark.full
def test_the_training_loss_is_the_tasks(choices, tmp_path):
    """What else is minimised stands beside it, by name; the curve is of the loss."""
    changes = {"attention": "adaptive_span", "depth": "early_exit", "layers": 2, "eval_every": 6}
    record = loop.run(tiny(choices["copy"], tmp_path, lr=0.0, **changes))
    lines = records.read(pathlib.Path(record["run_dir"]))
    for line in lines:
        parts = {name: value for name, value in line.items() if name.startswith("loss/")}
        assert len(parts) >= 2 and line["total"] == pytest.approx(line["loss"] + sum(parts.values()), rel=1e-5)
        assert line["loss"] == pytest.approx(record["loss"], rel=0.1) and line["total"] > 1.3 * line["loss"]
    assert [point[:2] for point in record["curve"]] == [[line["step"], line["loss"]] for line in lines]
    assert "total" not in records.read(pathlib.Path(loop.run(tiny(choices["copy"], tmp_path))["run_dir"]))[0]


@pytest.mark.full
@pytest.mark.parametrize("split, spoilt, message", [
    ("TEST", "zero", "no answer of the test split counts"),
    ("VALIDATION", "nan", "validation split is non-finite after step 2"),
    ("TEST", "nan", "test split is non-finite after step 6"),
    ("VALIDATION", "zero", "no answer of the validation split counts"),
    ("TRAIN", "nan", "no step of 6 had a finite loss"),
])  # fmt: skip
def test_what_is_no_number_is_not_ok(choices, tmp_path, monkeypatch, split, spoilt, message):
    monkeypatch.setenv(split, spoilt)
    config = tiny(choices["own"], tmp_path, eval_every=2)
    with pytest.raises(failures.Diverged, match=message):
        loop.run(config)
    record: Any = records.read_json(configs.folder(config) / "result.json")
    assert record["status"] == "nan" and message in record["reason"] and record["metric"] is None
    assert f"kept as the checkpoint of step {record['step']}" in record["reason"]
    assert checkpoint.steps(configs.folder(config)) == [record["step"]]
    with pytest.raises(failures.Diverged, match="as stored"):
        loop.resume(configs.folder(config))
    if split != "TRAIN":
        with pytest.raises(failures.Diverged, match=message.partition(" after")[0]):
            trained.evaluate(configs.folder(config), split=split.lower())


@pytest.mark.full
@pytest.mark.parametrize("changes", [{"save_every": 1}, {}, {"steps": 3}, {"optimizer": "adamw"}], ids=str)
def test_parameters_stay_finite_where_the_loss_was(choices, tmp_path, changes):
    """The first loss and gradient are finite, the update is not: no such parameters are kept, and the run has a row."""
    huge = {"lr": 1e39, "weight_decay": 1e30, "schedule": "constant", "warmup": 0, "optimizer": "sgd", "steps": 30}
    config = tiny(choices["own"], tmp_path, **(huge | changes))
    with pytest.raises(failures.Diverged, match=r"non-finite at step 1 |no step of 3") as caught:
        loop.run(config)
    folder = configs.folder(config)
    assert caught.value.record == records.read_json(folder / "result.json") and caught.value.record["status"] == "nan"
    assert records.read(folder)[0]["loss"] is not None and records.read(folder)[0]["skipped"]
    _, task, model = trained.load(folder)
    begun = build_model(config, task)
    for one, other in zip(*(jax.tree.leaves(nnx.state(each, nnx.Param)) for each in (model, begun)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_name_that_metrics_have_is_refused(choices, tmp_path):
    (tmp_path / "clashing.py").write_text(
        "from xformers_lab.attention.full import Full\nfrom xformers_lab.nn.aux_results import Aux\n"
        "class Clashing(Full):\n    def attend_heads(self, call):\n"
        "        out, carry, aux = super().attend_heads(call)\n"
        "        return out, carry, aux | Aux(scalars={'loss': 1.0})\n"
    )
    with pytest.raises(UsageError, match='reports "loss"'):
        loop.run(tiny(choices["own"], tmp_path, attention=str(tmp_path / "clashing.py")))


@pytest.mark.parametrize("value", ["all", "ALL", "3", 3])
def test_eval_batches_is_a_number_or_all(value):
    assert edit(Config(), eval_batches=value).train.eval_batches == ("all" if str(value).lower() == "all" else 3)


def test_what_eval_batches_cannot_be(capsys):
    for value in ("most", "0", "-1", "1.5"):
        with pytest.raises(UsageError, match="eval_batches"):
            edit(Config(), eval_batches=value)
    assert [c.train.eval_batches for c in configs.sweep(["eval_batches=all,1..2"])[0]] == ["all", 1, 2]


def test_eval_from_the_command_line(choices, tmp_path, capsys):
    config = tiny(choices["finite"], tmp_path, steps=1, eval_batches="all")
    folder = loop.run(config)["run_dir"]
    for words, examples in (([], 45), (["--batches", "1"], 32), (["--batches", "all"], 45)):
        assert main(["eval", folder, "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["examples"] == examples
    assert main(["eval", folder, "--batches", "none"]) == 2 and "a whole number or all" in capsys.readouterr().err
