"""Tuning: the grid, what may be chosen by, the choice, and a study that tunes with a worker that only pretends."""

import contextlib
import json
import math
from typing import Any

import pytest

from xformers_lab import config as configs
from xformers_lab.compare import study, tune
from xformers_lab.compare.conduct import Conductor, Options
from xformers_lab.compare.tune import Point, Tuning
from xformers_lab.config import Config, Study, edit
from xformers_lab.errors import IntegrityError, UsageError
from xformers_lab.progress import Cells
from xformers_lab.supervise.limits import Clock
from xformers_lab.supervise.process import Ended


def record(metric: float | None = 0.5, loss: float | None = 1.0, split: str | None = "validation", status="ok", **more):
    return {"status": status, "metric": metric, "loss": loss, "split": split, "metric_name": "accuracy"} | more


def points(metrics, losses=None, higher=True):
    losses = losses or [1.0] * len(metrics)
    known = [record(metric, loss, higher_is_better=higher) for metric, loss in zip(metrics, losses, strict=True)]
    return [tune.point(at, {"lr": at}, [one]) for at, one in enumerate(known)]


def test_the_grid_is_half_a_decade_apart_with_the_shared_value_in_its_middle():
    assert tune.spaced("lr", 3e-3, 5) == [3e-4, 9.49e-4, 3e-3, 9.49e-3, 3e-2]
    assert tune.beyond("lr", 3e-3, 5, True, False) == [3e-5, 9.49e-5]
    assert tune.beyond("lr", 3e-3, 5, False, True) == [9.49e-2, 3e-1]
    assert len(tune.spaced("weight_decay", 0.01, 7)) == 7
    assert all(value < 1 for value in [*tune.spaced("dropout", 0.3, 5), *tune.beyond("dropout", 0.3, 5, True, True)])
    with pytest.raises(UsageError, match=r"weight_decay=0.0, which must be above 0"):
        tune.spaced("weight_decay", 0.0, 5)


def test_words_of_tuning():
    assert Tuning.read("lr,weight_decay") == Tuning.read("lr+weight_decay") == Tuning(("lr", "weight_decay"))
    assert Tuning.read("lr:points=7:share=0.5:seeds=2") == Tuning(("lr",), 7, 0.5, 2)
    assert Tuning.read("none") is None
    for text, said in [("lr:share=2", "at most 1"), ("lr:point=5", "points"), ("lr,lr", "twice"), ("batch", "lr")]:
        with pytest.raises(UsageError, match=said):
            Tuning.read(text)


def test_the_best_follows_the_direction_then_the_loss_then_the_middle():
    assert tune.best(points([0.1, 0.9, 0.5, 0.9, 0.2], [1, 2, 1, 1, 1])).value == 3
    assert tune.best(points([3.0, 2.0, 1.0, 2.0, 4.0], higher=False)).value == 2
    assert tune.best(points([0.5] * 5)).value == 2
    assert tune.best(points([math.nan, 0.1, 0.0, 0.0, 0.0])).value == 1
    failed = [tune.point(at, {}, [record(None, None, None, "nan")]) for at in range(5)]
    assert tune.best(failed).value == 2 and tune.edges(failed) == (False, False)
    assert tune.edges(points([1, 0.5, 0.2, 0.1, 0])) == (True, False)


@pytest.mark.parametrize("split", ["test", "train", None])
def test_a_record_of_another_split_is_refused(split):
    with pytest.raises(IntegrityError, match="not on validation"):
        tune.point(1e-3, {"lr": 1e-3}, [record(), record(split=split)])


def test_a_trial_is_scored_on_validation_with_a_seed_that_no_reported_run_has():
    config = edit(Config(), seed=2, steps=10, init_seed=1)
    trial = tune.trial(config, Tuning(("lr",), share=0.5), {"lr": 0.1}, 0, greatest=4)
    assert trial.train.score == "validation" and trial.seed == 1004 and trial.train.steps == 5
    assert trial.init_seed is None and trial.train.lr == 0.1
    assert configs.identity(trial) != configs.identity(edit(trial, score="test"))


class Pretender:
    """A worker that answers by formulas, and remembers what it was asked to train."""

    def __init__(self, best, split="validation", until=None):
        self.stopped, self.trained, self.best, self.split, self.until = 0, [], best, split, until

    def ask(self, what, heard=lambda message: None, *, stall=None, config=None, **more):
        if what == "compare.cell.check":
            return {"status": "ok"}
        if what == "compare.probe.measure":
            return [self.probe(configs.from_dict(one)) for one in more["cells"]]
        assert what == "compare.cell.train"
        chosen = configs.from_dict(config or {})
        if self.until is not None and len(self.trained) >= self.until:
            self.stopped = 2
            raise Ended("interrupted", "stopped", Clock(), 130)
        self.trained.append(chosen)
        tuning = chosen.train.score == "validation"
        # Closer to the best rate is better on validation; on test, where nobody may look, the other way round.
        away = abs(math.log(chosen.train.lr / self.best[chosen.model.attention]))
        return {
            "status": "ok", "metric": 1 - away / 100 if tuning else away, "loss": away,
            "split": self.split if tuning else "test", "metric_name": "accuracy", "higher_is_better": True,
            "id": configs.identity(chosen),
        }  # fmt: skip

    def probe(self, config):
        slow = 2 if config.model.attention == "linear" else 1
        return {"compile_seconds": 5.0, "step_seconds": 0.1 * slow, "examples": 256}


@contextlib.contextmanager
def bar(what, total):
    yield Cells(total, None, True, (), what)


def conduct(folder, worker, words=(), **changes: Any):
    grid, varied, asked = configs.study(["attention=full,linear", "seeds=2", "steps=20", f"runs={folder}/runs", *words])
    said = []
    changes = {"baselines": False} | changes
    options = Options(**changes)
    conductor = Conductor(
        study.cells(grid), varied, asked, options, worker, bar=bar, announce=said.append
    )  # fmt: skip
    return conductor.rows(), conductor, said


def test_each_variant_gets_its_own_best_from_the_same_grid_and_the_shared_recipe_beside_it(tmp_path):
    worker = Pretender({"full": 3e-3, "linear": 9.49e-3})
    rows, *_ = conduct(tmp_path, worker, ["tune=lr:share=0.5"])
    trials = [one for one in worker.trained if one.train.score == "validation"]
    assert (
        len(trials) == 2 * 5 and {one.train.steps for one in trials} == {10} and {one.seed for one in trials} == {1001}
    )
    grids = [[one.train.lr for one in trials if one.model.attention == name] for name in ("full", "linear")]
    assert grids[0] == grids[1]
    assert [row["tuning"]["best"] for row in rows] == [{"lr": 3e-3}] * 2 + [{"lr": 9.49e-3}] * 2
    assert [row["config"]["train"]["lr"] for row in rows] == [3e-3] * 2 + [9.49e-3] * 2
    assert all(row["shared"]["knobs"] == {"lr": 3e-3} for row in rows)
    assert rows[0]["shared"]["run_dir"] == rows[0]["run_dir"] and rows[2]["shared"]["run_dir"] != rows[2]["run_dir"]
    assert not rows[2]["tuning"]["edge"] and not rows[2]["tuning"]["widened"] and len(rows[2]["tuning"]["points"]) == 5
    assert len(worker.trained) - len(trials) == 2 + 4  # equal values are one run
    again = Pretender({"full": 1.0, "linear": 1.0})
    assert conduct(tmp_path, again, ["tune=lr:share=0.5"])[0][2]["tuning"] == rows[2]["tuning"]  # as it was decided
    assert all(one.train.score == "test" for one in again.trained)


def test_a_best_at_the_end_widens_the_grid_once_for_all(tmp_path):
    worker = Pretender({"full": 3e-3, "linear": 1.0})
    rows, *_ = conduct(tmp_path, worker, ["tune=lr"])
    full, linear = rows[0]["tuning"], rows[2]["tuning"]
    assert len(full["points"]) == len(linear["points"]) == 7 and full["widened"] and linear["widened"]
    assert linear["edge"] and linear["best"] == {"lr": 0.3} and not full["edge"]
    assert [one["lr"] for one in full["points"]] == [one["lr"] for one in linear["points"]]


def test_knobs_are_tuned_one_after_the_other(tmp_path):
    rows, *_ = conduct(tmp_path, Pretender({"full": 3e-3, "linear": 9.49e-3}), ["tune=lr,weight_decay"])
    tuning = rows[2]["tuning"]
    assert tuning["knobs"] == ["lr", "weight_decay"] and len(tuning["points"]) == 10
    assert {one["lr"] for one in tuning["points"][5:]} == {9.49e-3} and set(tuning["best"]) == {"lr", "weight_decay"}


def test_a_planted_test_score_ends_the_study(tmp_path):
    with pytest.raises(IntegrityError, match="may not be chosen by"):
        conduct(tmp_path, Pretender({"full": 3e-3, "linear": 3e-3}, split="test"), ["tune=lr"])


def test_an_interrupted_tuning_leaves_rows_and_goes_on(tmp_path):
    worker = Pretender({"full": 3e-3, "linear": 3e-3}, until=7)
    rows, *_ = conduct(tmp_path, worker, ["tune=lr"])
    assert [row["status"] for row in rows] == ["interrupted"] * 4 and worker.stopped
    worker = Pretender({"full": 3e-3, "linear": 3e-3})
    assert [row["status"] for row in conduct(tmp_path, worker, ["tune=lr"])[0]] == ["ok"] * 4


def test_wallclock_gives_every_variant_the_same_time(tmp_path):
    rows, conductor, _ = conduct(tmp_path, Pretender({"full": 3e-3, "linear": 3e-3}), ["match=wallclock"])
    assert [row["config"]["train"]["steps"] for row in rows] == [20, 20, 10, 10]
    assert rows[2]["matched"] == {
        "budget": "wallclock", "target": 2.0, "reached": 2.0, "ok": True, "changed": {"steps": [20, 10]},
    }  # fmt: skip
    assert "changed" in rows[0]["matched"] and rows[0]["matched"]["changed"] == {}
    assert conductor.kept.path.parent == tmp_path / "runs" / "studies"


def test_a_budget_cuts_the_steps_of_all_alike_and_says_so(tmp_path):
    worker = Pretender({"full": 3e-3, "linear": 3e-3})
    rows, conductor, _ = conduct(tmp_path, worker, ["steps=1000"], budget=250.0)
    (steps,) = {row["config"]["train"]["steps"] for row in rows}
    assert 100 < steps < 1000 and any(f"{steps:,} in place of 1,000" in note for note in conductor.notes)
    estimated = 2 * steps * 0.1 + 2 * steps * 0.2
    assert estimated < 250
    assert {row["config"]["train"]["steps"] for row in conduct(tmp_path, worker, ["steps=1000"], budget=250.0)[0]} == {
        steps
    }
    roomy = conduct(tmp_path / "other", worker, budget=1000.0)[0]
    assert {row["config"]["train"]["steps"] for row in roomy} == {20}
    with pytest.raises(UsageError, match="alone take about"):
        conduct(tmp_path / "third", worker, budget=3.0)


def test_a_budget_cuts_equal_time_and_it_stays_equal(tmp_path):
    worker = Pretender({"full": 3e-3, "linear": 3e-3})
    rows, *_ = conduct(tmp_path, worker, ["steps=1000", "match=wallclock"], budget=200.0)
    full, linear = rows[0]["config"]["train"]["steps"], rows[2]["config"]["train"]["steps"]
    assert full < 1000 and linear == pytest.approx(full / 2, abs=1) and rows[2]["matched"]["ok"]
    assert rows[2]["matched"]["target"] == pytest.approx(full * 0.1)
    with pytest.raises(UsageError, match="must be above 0"):
        conduct(tmp_path, worker, ["tune=weight_decay", "weight_decay=0"])


def test_how_much_there_is_is_said_before_it_begins(tmp_path):
    *_, said = conduct(tmp_path, Pretender({"full": 3e-3, "linear": 3e-3}), ["tune=lr"])
    assert any(line.startswith("4 cells, 0 already done, and 10 tuning runs, about") for line in said)


def test_the_kept_plan_is_json(tmp_path):
    _, conductor, _ = conduct(tmp_path, Pretender({"full": 3e-3, "linear": 3e-3}), ["tune=lr"])
    assert set(json.loads(conductor.kept.path.read_text())) >= {"tuned"}
    conductor.kept.path.write_text("cut o")
    _, conductor, said = conduct(tmp_path, Pretender({"full": 3e-3, "linear": 3e-3}), ["tune=lr"])
    assert conductor.kept.values and not any("as planned" in line for line in said)


def test_a_point_is_kept_with_all_its_knobs():
    assert Point(0.1, {"lr": 0.1}, "ok", 0.5, 1.0).shown() == {"lr": 0.1, "metric": 0.5, "loss": 1.0, "status": "ok"}
    assert Study().tune == "none"
