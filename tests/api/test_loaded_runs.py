"""A run from Python is the run of the command, and has what the commands say of it."""

import io
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import xformers_lab as xl
from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.errors import LabError, RunFailed, UsageError
from xformers_lab.supervise.limits import Clock
from xformers_lab.supervise.process import Ended, Worker

TINY = {"task": "copy", "seq_len": 16, "dim": 16, "layers": 1, "batch": 4, "steps": 3, "eval_batches": 1}
WORDS = [f"{key}={value}" for key, value in TINY.items()]
# What two runs of the same config differ in: how long things took, and where they are.
SAME = ("id", "status", "metric", "loss", "validation", "parameters", "flops", "steps")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from xformers_lab.supervise.worker import Tell, perform

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        tell = Tell(io.StringIO())
        ask = lambda self, what, heard=None, stall=None, limit=None, **given: perform(what, tell, **given)
        patch.setattr(Worker, "ask", ask)
        return xl.train(TINY, attention="linear", runs=folder)


def test_it_is_the_run_of_the_command(trained, runs, capsys, inline):
    assert main(["train", *WORDS, "attention=linear", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert trained.id == record["id"] == trained.folder.name and trained.status == "ok"
    assert {key: trained.record[key] for key in SAME} == {key: record[key] for key in SAME}
    owned = configs.single([*WORDS, "attention=linear", f"runs={trained.folder.parents[1]}"])
    assert trained.config == owned
    again = xl.train(*WORDS, {"model": {"attention": "linear"}})  # which the command has trained
    assert again.record == record and again.folder == configs.folder(configs.single([*WORDS, "attention=linear"]))


def test_what_it_measured(trained):
    frame = trained.metrics
    assert list(frame.step) == [1, 2, 3] and frame.loss.notna().all() and frame.validation_loss.notna().sum() == 1
    assert repr(trained).startswith(f"{trained.folder}: ok") and "accuracy" in repr(trained)
    assert "<pre" in trained._repr_html_() and trained.id in trained._repr_html_()


@pytest.mark.full
def test_its_model_scores_and_writes(trained):
    inputs = trained.task.batch("test", 0).inputs
    logits, _ = trained.model(np.asarray(inputs))
    assert logits.shape == (4, 16, trained.task.outputs)
    assert trained.evaluate()["metric"] == trained.record["metric"]
    two = trained.evaluate(seq_len=[16, 8], batches=1)
    assert [row["seq_len"] for row in two] == [16, 8] and two[0]["metric"] == trained.record["metric"]
    plain = trained.evaluate(options={"attention.features": "elu", "dtype": "float32"})
    assert plain["metric"] == trained.record["metric"] and "changed" not in plain
    rows = trained.evaluate(seq_len=16, options={"attention.features": ["elu", "relu"], "dtype": "float32"})
    assert [(row["attention.features"], row["dtype"], row["seq_len"]) for row in rows] == [
        ("elu", "float32", 16),
        ("relu", "float32", 16),
    ]
    assert rows[0]["loss"] == plain["loss"] != rows[1]["loss"]
    assert rows[1]["changed"] == {"attention.features": ["elu", "relu"]}
    with pytest.raises(UsageError, match='without an option "feature": did you mean "features"'):
        trained.evaluate(options={"attention.feature": "relu"})
    with pytest.raises(UsageError, match="texts are generated for one row"):
        trained.evaluate(options={"attention.features": ["elu", "relu"]}, beams=2)
    one = trained.generate("1 2 3", new=2, temperature=0)
    assert trained.generate(["1 2 3", "4 5"], new=2, temperature=0)[0] == one and len(one.split()) == 2
    for wrong, message in (
        ({"beams": 2, "top_k": 3}, "top_k: beam search draws nothing; leave it out, or leave out beams"),
        ({"length_penalty": 1.0}, "length_penalty: it is of beam search; give beams"),
        ({"stop": ["1 2"]}, "stop 1 2: it is 2 tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            trained.generate("1", **wrong)
    with pytest.raises(UsageError, match="texts=3: it is of texts that are generated"):
        trained.evaluate(texts=3)


def test_runs_are_found_by_what_the_command_calls_them(trained, tmp_path):
    folder = trained.folder.parents[1]
    for word in ("last", trained.id, trained.id[:6], str(trained.folder), trained.folder, trained):
        assert xl.load(word, runs=folder).folder == trained.folder
    with pytest.raises(UsageError, match=r"no run in .* has this name or id"):
        xl.load("fff", runs=folder)
    with pytest.raises(UsageError, match=r"a run's folder holds config\.json"):
        xl.load(tmp_path)
    found = xl.runs(runs=folder, task=["copy", "sort"], attention="linear", sort="metric")
    assert [run.id for run in found] == [trained.id] and not xl.runs("attention=full", runs=folder)
    frame = found.to_pandas()
    assert frame.metric[0] == trained.record["metric"] and frame.lr[0] == 3e-3
    assert trained.id in repr(found) and "<pre" in found._repr_html_()
    with pytest.raises(UsageError, match='unknown key "metrik": did you mean "metric"'):
        xl.runs(runs=folder, sort="metrik")


def test_tags_are_given_and_taken(trained):
    assert trained.tag("paper+draft").tag(remove="draft").config.tags == "paper"
    assert [run.id for run in xl.runs(runs=trained.folder.parents[1], tags="paper")] == [trained.id]
    with pytest.raises(UsageError, match="no run has the tag draft; there is paper"):
        trained.tag(remove="draft")
    assert xl.load(trained.folder).tag(remove="paper").config.tags is None


def test_what_goes_wrong_is_an_exception_of_ours(runs, monkeypatch, inline):
    with pytest.raises(UsageError, match="attention has several values"):
        xl.train(TINY, attention=["full", "linear"])
    with pytest.raises(UsageError, match="seeds= is a word of a study"):
        xl.train(TINY, seeds=2)
    assert not list(runs.iterdir())

    def ends(status, code):
        def ask(self, what, heard=None, **arguments):
            raise Ended(status, "it stopped", Clock(), code)

        monkeypatch.setattr(Worker, "ask", ask)

    ends("stalled", RunFailed.exit_code)
    with pytest.raises(RunFailed, match="it stopped") as failed:
        xl.train(TINY)
    assert isinstance(failed.value, LabError)
    ends("interrupted", 130)
    with pytest.raises(KeyboardInterrupt, match="interrupted: it stopped"):
        xl.train(TINY)


@pytest.mark.full
def test_a_stopped_run_goes_on(runs, monkeypatch, inline):
    from xformers_lab.train import work

    watched = work.watched
    with monkeypatch.context() as patch:
        steps: list[int] = []

        def until(tell, config, followers=None):
            told = watched(tell, config, followers)
            seen = lambda step, total, metrics: (steps.append(step), told["progress"](step, total, metrics))
            return told | {"progress": seen, "stop": lambda: bool(steps)}

        patch.setattr(work, "watched", until)
        with pytest.raises(LabError, match="xlab resume"):  # the worker's own; its driver makes it a KeyboardInterrupt
            xl.train(TINY, attention="linear")
    stopped = xl.load("last")
    assert stopped.status == "unfinished" and 1 <= len(stopped.metrics) < 3 and not stopped.record
    with pytest.raises(UsageError, match=r"go on with xlab resume"):
        xl.train(TINY, attention="linear")
    whole = stopped.resume()
    assert whole.status == "ok" and list(whole.metrics.step) == [1, 2, 3]


def test_an_untrained_model_and_the_catalogue():
    built = xl.build(TINY, attention="linear")
    model: Any = built.model
    inputs = built.task.batch("train", 0).inputs
    np.testing.assert_array_equal(model(inputs)[0], model(jnp.asarray(inputs))[0])
    with pytest.raises(UsageError, match="not divisible"):
        xl.build(TINY, dim=15)
    assert set(xl.catalogue().shelf) >= {"attention", "task"}
    assert "linear" in set(xl.catalogue("attention").name)
    with pytest.raises(UsageError, match='no shelf "atention": did you mean "attention"'):
        xl.catalogue("atention")
