"""Trackers show every step once, and none of them can break a run."""

import io
import json
import pathlib
import shutil
import struct
import sys
import threading
import types
from typing import Any

import pytest

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.compare import cell
from xformers_lab.errors import UsageError
from xformers_lab.supervise.interrupt import Interrupted
from xformers_lab.supervise.worker import Tell
from xformers_lab.train import records, trackers, work

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
WORDS = ["task=copy", "seq_len=8", "steps=6", "batch=2", "dim=8", "heads=1", "layers=1", "eval_batches=1"]
WORDS += ["eval_every=3", "save_every=2"]


class Telling(Tell):
    """A worker's Tell that keeps what it is told, and is alone from some step on."""

    def __init__(self, alone_from: int | None = None):
        super().__init__(io.StringIO())
        self.messages: list[dict] = []
        self.alone_from = alone_from

    def __call__(self, **message: Any) -> None:
        self.messages.append(message)

    def doing(self, words: str, **more: Any) -> None:
        self(doing=words, **more)
        self.alone = self.alone or (self.alone_from is not None and (more.get("step") or 0) >= self.alone_from)

    @property
    def said(self) -> list[str]:
        return [message["said"] for message in self.messages if "said" in message]


def events(folder: pathlib.Path) -> list:
    """Every event of a folder's files: records of a length, its checksum, the bytes and theirs."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def shown(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar by its name, as often as it stands in the files."""
    scalars: dict[str, list] = {}
    for event in events(folder / "events"):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def written(folder: pathlib.Path, name: str) -> list[tuple[int, Any]]:
    """(step, value) of every line of metrics.jsonl that has a number of this name."""
    values = [(line["step"], line.get(name)) for line in records.read(folder)]
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in values if value is not None]


@pytest.fixture
def config(tmp_path):
    return configs.single([*WORDS, f"runs={tmp_path / 'runs'}"])


@pytest.fixture
def fake(monkeypatch):
    """fake(fails=...) puts a wandb into sys.modules that raises there -> what it was told."""

    def install(fails: str = "", step: int = 0):
        told: dict = {"inits": [], "lines": [], "finished": 0}

        def at(place: str):
            if place == fails:
                raise SystemExit("no network") if place == "finish" else RuntimeError("no network")

        class Run:
            def __init__(self):
                self.step = step

            def log(self, values, step):
                at("log")
                told["lines"].append((step, values))

            def finish(self):
                at("finish")
                told["finished"] += 1

        def init(**options):
            at("init")
            told["inits"].append(options)
            return Run()

        module = types.ModuleType("wandb")
        module.__dict__["init"] = init
        monkeypatch.setitem(sys.modules, "wandb", module)
        return told

    return install


def test_event_files_hold_every_step_and_the_config(config):
    tell = Telling()
    record = work.run(tell, configs.to_dict(config), track=["tensorboard"])
    folder = configs.folder(config)
    scalars = shown(folder)
    for name in ("loss", "total", "grad_norm", "seconds", "validation_loss", "validation_metric"):
        assert scalars.get(name, []) == written(folder, name)
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars["validation_loss"]] == [3, 6]
    assert scalars["test_metric"] == [(6, pytest.approx(record["metric"]))]
    values = [value for event in events(folder / "events") for value in event.summary.value]
    (text,) = [value.tensor.string_val[0].decode() for value in values if value.tag.startswith("config")]
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == configs.to_dict(config)
    assert tell.said == []
    before = sorted(folder.glob("events/*"))
    work.run(Telling(), configs.to_dict(config), track=["tensorboard"])
    assert sorted(folder.glob("events/*")) == before, "a run that had ended shows nothing again"


@pytest.mark.full
def test_a_resumed_run_has_each_step_once(config):
    folder = configs.folder(config)
    with pytest.raises(Interrupted):
        work.run(Telling(alone_from=4), configs.to_dict(config), track=["tensorboard"])
    stopped = [step for step, _ in shown(folder)["loss"]]
    assert stopped == list(range(1, len(stopped) + 1)) and 4 <= len(stopped) < 6
    # As a crash leaves it: steps behind the last checkpoint, which are taken again.
    older, newer = sorted(folder.glob("checkpoints/*"), key=lambda path: int(path.name))
    assert int(older.name) < stopped[-1]
    shutil.rmtree(newer)
    work.resume(Telling(), str(folder), track=["tensorboard"])
    scalars = shown(folder)
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4, 5, 6] and scalars["loss"] == written(folder, "loss")
    assert scalars["validation_loss"] == written(folder, "validation_loss")


@pytest.mark.full
def test_a_run_that_was_not_tracked_before_is_shown_whole(config):
    with pytest.raises(Interrupted):
        work.run(Telling(alone_from=3), configs.to_dict(config))
    assert not (configs.folder(config) / "events").exists()
    work.resume(Telling(), str(configs.folder(config)), track=["tensorboard"])
    assert [step for step, _ in shown(configs.folder(config))["loss"]] == [1, 2, 3, 4, 5, 6]


def test_wandb_is_told_every_step_under_the_id_of_the_run(config, fake):
    told = fake()
    work.run(Telling(), configs.to_dict(config), track=["wandb"])
    (options,) = told["inits"]
    assert options["id"] == configs.identity(config) and options["resume"] == "allow"
    assert options["config"] == configs.to_dict(config) and options["dir"] == str(configs.folder(config))
    assert [step for step, _ in told["lines"]] == [1, 2, 3, 4, 5, 6, 6] and told["finished"] == 1
    assert "loss" in told["lines"][0][1] and "test_metric" in told["lines"][-1][1]


def test_wandb_is_not_told_again_what_it_knows(config, fake):
    told = fake(step=4)
    work.run(Telling(), configs.to_dict(config), track=["wandb"])
    assert [step for step, _ in told["lines"]] == [4, 5, 6, 6]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_does_not_break_the_run(config, fake, fails):
    fake(fails)
    tell = Telling()
    record = cell.train(tell, configs.to_dict(config), track=["wandb", "tensorboard"])
    assert record["status"] == "ok" and len(records.read(configs.folder(config))) == 6
    (line,) = tell.said
    assert line.startswith("--track wandb stopped, the run goes on without it: ") and line.endswith(": no network")
    assert len(shown(configs.folder(config))["loss"]) == 6, "the other one goes on"


def test_a_tracker_that_hangs_is_left(tmp_path, fake, monkeypatch):
    fake()
    forever = threading.Event()
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **options: forever.wait())
    monkeypatch.setattr(trackers, "PATIENCE", 0.05)
    said: list[str] = []
    with trackers.following(["wandb"], tmp_path, "id", {}, said.append) as followers:
        followers.observe({"step": 1, "loss": 1.0})
    forever.set()
    assert len(said) == 1 and "did not end within 0.05 s" in said[0]


def test_what_is_no_number_is_not_shown():
    line = {"step": 3, "loss": None, "seconds": 0.5, "skipped": True, "note": "x", "loss/aux": 2}
    assert trackers.numbers(line) == {"seconds": 0.5, "skipped": 1.0, "loss/aux": 2.0}


def test_a_missing_package_is_said_before_anything_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for command in ("train", "compare"):
        assert main([command, *WORDS, f"runs={tmp_path / 'runs'}", "--track", "wandb"]) == 2
        assert "--track wandb needs wandb: pip install 'xformers_lab[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UsageError, match="xformers_lab\\[tensorboard\\]"):
        monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
        trackers.require(["tensorboard"])


def test_the_folder_is_the_list(capsys):
    assert trackers.names() == ["tensorboard", "wandb"]
    with pytest.raises(SystemExit):
        main(["train", "--track", "tensorbored"])
    assert "tensorboard" in capsys.readouterr().err
