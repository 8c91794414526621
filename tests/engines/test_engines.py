"""What engines are to a sweep: named by files, given JSON, and whatever they lose is tried again or a row."""

import importlib.util
import json
import pathlib
import sys
import threading
from typing import Any

import pytest

from xformers_lab import config as configs
from xformers_lab import engines
from xformers_lab.cli import main
from xformers_lab.compare import sweep
from xformers_lab.config import Config, edit
from xformers_lab.engines import Outcome, Setting, _host, _job
from xformers_lab.errors import RunFailed, UsageError
from xformers_lab.record import sealed
from xformers_lab.supervise.process import Worker

TINY = ["task=copy", "seq_len=16", "dim=16", "layers=1", "batch=4", "steps=3", "eval_batches=1", "--no-baselines"]

# An engine as a user would write it: here a job is done as it is submitted.
OWN = """
import json

from xformers_lab.engines import Outcome, _job


class Engine:
    where, remote = "at home", True

    def __init__(self, setting, *, note: str = "none"):
        self.setting, self.note, self.done, self.count = setting, note, [], 0

    def room(self):
        return 2 - len(self.done)

    def submit(self, payload):
        text = json.dumps(payload)
        with open(self.note, "a") as file:
            file.write(text + chr(10))
        self.count += 1
        self.done.append(_job.outcome(str(self.count), _job.perform(text)))
        return self.done[-1].handle

    def ended(self, seconds, told):
        done, self.done = self.done, []
        return done

    def cancel(self, *, insisted=False):
        pass

    def close(self):
        pass
"""


class Scripted:
    """An engine that answers a job by its seed and its turn: script(seed, turn) gives an Outcome without its handle."""

    where, remote = "", False

    def __init__(self, script):
        self.setting, self.script = Setting(Worker(), 2), script
        self.turns: dict[int, int] = {}
        self.waiting: list[tuple[str, int]] = []
        self.most = 0

    def room(self) -> int:
        return 2 - len(self.waiting)

    def submit(self, payload) -> str:
        seed = payload["with"]["config"]["seed"]
        self.turns[seed] = self.turns.get(seed, 0) + 1
        self.waiting.append((f"{seed}.{self.turns[seed]}", seed))
        self.most = max(self.most, len(self.waiting))
        return self.waiting[-1][0]

    def ended(self, seconds, told):
        handle, seed = self.waiting.pop()  # the last one first: outcomes come in any order
        told(handle, {"step": 1, "total": 3, "loss": 0.5})
        return [Outcome(handle, **self.script(seed, self.turns[seed]))]

    def cancel(self, *, insisted=False) -> None:
        pass

    def close(self) -> None:
        pass


class Heard:
    """What progress hears."""

    def __init__(self):
        self.said: list[tuple] = []

    def started(self, index, cell):
        self.said.append(("started", index))

    def stepped(self, index, step, total, loss):
        self.said.append(("stepped", index))

    def finished(self, index, count, record):
        self.said.append(("finished", index, count))


def ok(seed: int) -> dict[str, Any]:
    return {"answer": {"status": "ok", "metric": seed / 10}}


@pytest.fixture
def swept(tmp_path):
    """swept(script, seeds) -> the records, the engine, what progress heard, what was announced."""

    def run(script, seeds=3):
        cells = [edit(Config(), task="copy", seed=seed, runs=str(tmp_path)) for seed in range(seeds)]
        engine, heard, words = Scripted(script), Heard(), []
        going = sweep.Sweep(cells, engine.setting.worker, engine, heard, words.append, [])
        return going.records({}), engine, heard.said, words

    return run


def test_records_stand_in_the_order_of_cells_however_they_end(swept):
    records, engine, said, _ = swept(lambda seed, turn: ok(seed))
    assert [record["metric"] for record in records] == [0.0, 0.1, 0.2] and engine.most == 2
    assert [each[2] for each in said if each[0] == "finished"] == [0, 1, 2]
    assert [each[1] for each in said if each[0] == "finished"] == [1, 2, 0] and ("stepped", 1) in said


def test_what_is_lost_is_tried_again_a_few_times(swept):
    lost = lambda seed, turn: {"lost": "its node died"} if seed == 1 and turn < 3 else ok(seed)
    records, engine, _, words = swept(lost)
    assert [record["status"] for record in records] == ["ok"] * 3 and engine.turns == {0: 1, 1: 3, 2: 1}
    assert len(words) == 2 and words[1].endswith("lost, since its node died; it is tried again (2 of 3 times)")
    records, engine, _, _ = swept(lambda seed, turn: {"lost": "it froze"} if seed == 1 else ok(seed))
    assert [record["status"] for record in records] == ["ok", "failed", "ok"]
    assert records[1]["reason"] == "lost 4 times, the last time since it froze" and engine.turns[1] == 4


def test_a_job_that_its_host_interrupts_is_lost_and_one_that_crashes_is_not(swept):
    preempted = {"ended": {"status": "interrupted", "reason": "saved at step 2 of 3"}}
    crashed = {"ended": {"status": "oom", "reason": "no room"}, "host": "far"}
    script = lambda seed, turn: crashed if seed == 2 else preempted if seed == 1 and turn == 1 else ok(seed)
    records, engine, _, _ = swept(script)
    assert [record["status"] for record in records] == ["ok", "ok", "oom"]
    assert engine.turns == {0: 1, 1: 2, 2: 1} and records[2]["host"] == "far"


@pytest.mark.parametrize("method", ["submit", "ended"])
def test_where_an_engine_is_gone_the_rest_are_rows_with_the_reason(swept, monkeypatch, method):
    whole = getattr(Scripted, method)

    def going(self, *given):
        if self.turns.get(2) or (method == "submit" and given[0]["with"]["config"]["seed"] == 2):
            raise RunFailed("the cluster is gone")
        return whole(self, *given)

    monkeypatch.setattr(Scripted, method, going)
    records, *_ = swept(lambda seed, turn: ok(seed), 4)
    assert [record["status"] for record in records] == ["failed", "ok", "failed", "failed"]
    said = {record["reason"] for record in records if "reason" in record}
    assert said == {"the cluster is gone; the same command goes on from there"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "rays"], 'no engine "rays": did you mean "ray"?'),
        (["--engine", "nowhere.py"], 'no file "nowhere.py"'),
        (["--engine", "local:fast=true"], 'local has no option "fast": it has no options'),
        (["--engine", "local", "--address", "here:1"], "--engine local has no address"),
        (["-j", "0"], "-j 0: at least 1"),
        (["-j", "2", "--budget", "1m"], "--budget counts seconds of steps that are timed here"),
        (["-j", "2", "match=wallclock"], "match=wallclock counts seconds of steps that are timed here"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *TINY, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_an_extra_that_is_missing_is_named(capsys, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    for package in ("ray", "submitit"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    assert main(["compare", *TINY, "--engine", name]) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"pip install 'xformers_lab[{name}]'")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "--engine ray wants --address HOST:PORT"),
        ("somewhere", "--address somewhere: want HOST:PORT"),
        ("ray://127.0.0.1:10001", "want HOST:PORT"),
        ("127.0.0.1:9", "--address 127.0.0.1:9: nothing answers there"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_said_before_anything_is_checked(monkeypatch, address, message):
    monkeypatch.setattr(engines, "_require", lambda module, name: None)
    chosen = engines.chosen("ray", address)
    with Worker() as worker, pytest.raises(UsageError, match=message):
        chosen.open(worker)
    assert worker.process is None


def test_an_engine_is_a_file_and_what_it_gets_is_json(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.py").write_text(OWN)
    monkeypatch.setattr(
        Worker, "ask", lambda self, do, *_, **given: {"status": "ok", "metric": 0.5, "metric_name": "x"}
    )
    assert main(["compare", *TINY, "seed=0,1", "--engine", "./mine.py:note=jobs", "--json"]) == 0
    told = capsys.readouterr()
    rows = json.loads(told.out)
    assert [row["status"] for row in rows] == ["ok", "ok"] and "2 cells, 0 already done, at home" in told.err
    jobs = [json.loads(line) for line in pathlib.Path("jobs").read_text().splitlines()]
    assert [job["do"] for job in jobs] == ["compare.cell.train"] * 2
    assert [job["with"]["config"]["seed"] for job in jobs] == [0, 1]
    assert jobs[0]["token"] == pathlib.Path("runs", _job.MARK).read_text()
    assert jobs[0]["runs"] == str(tmp_path / "runs") and jobs[0]["folder"] == str(tmp_path)


@pytest.mark.parametrize("what", ["runs", "folder", "version"])
def test_a_host_that_shares_no_folder_ends_the_sweep_before_any_cell_trains(capsys, tmp_path, monkeypatch, what):
    """As another host would see it, where the folder has another file in it, or none."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.py").write_text(OWN)
    there = {"runs": str(tmp_path / "other"), "folder": str(tmp_path / "none"), "version": "0.0"}
    sent = _job.sent
    monkeypatch.setattr(_job, "sent", lambda *job, **how: {**sent(*job, **how), what: there[what]})
    monkeypatch.setattr(Worker, "ask", lambda self, do, *_, **given: {"status": "ok"})
    assert main(["compare", *TINY, "seed=0,1", "--engine", "./mine.py:note=jobs"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    said = {"runs": "name one that all hosts share with runs=", "folder": "start it in one", "version": "the same one"}
    assert said[what] in line and not list(tmp_path.glob("runs/copy/*"))


def test_a_job_that_is_no_job_is_a_row():
    outcome = _job.outcome("1", _job.perform('{"do": "nothing"}'))
    assert outcome.ended is not None and outcome.ended["status"] == "failed" and "KeyError" in outcome.ended["reason"]


def test_a_timed_job_is_alone_on_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(_host.tempfile, "gettempdir", lambda: str(tmp_path))
    entered = threading.Event()

    def work(alone):
        with _host.held(alone=alone):
            entered.set()

    for first, second, waits in ((False, False, False), (False, True, True), (True, False, True), (True, True, True)):
        entered.clear()
        with _host.held(alone=first):
            other = threading.Thread(target=work, args=(second,), daemon=True)
            other.start()
            assert entered.wait(0.3 if waits else 30.0) is not waits
        other.join(30.0)
        assert entered.is_set()


def test_a_dry_run_says_what_would_train_and_makes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Worker, "_start", None)
    words = ["compare", *TINY, "attention=full,linear", "seeds=2", "--dry-run"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    cells = [
        configs.single([*TINY[:-1], f"attention={name}", f"seed={seed}"])
        for name in ("full", "linear")
        for seed in (0, 1)
    ]
    assert all(configs.identity(cell) in shown for cell in cells)
    assert "4 cells, 0 already done" in shown and "no stored run tells how long they take" in shown
    assert not list(tmp_path.iterdir())
    figures = {"compile_seconds": 2.0, "seconds_median": 10.0, "examples": 0, "status": "ok"}
    record = {"id": configs.identity(cells[0]), "config": configs.to_dict(cells[0]), **figures}
    configs.folder(cells[0]).mkdir(parents=True)
    (configs.folder(cells[0]) / "result.json").write_text(json.dumps(sealed(record)))
    (configs.folder(cells[2]) / "checkpoints" / "2").mkdir(parents=True)
    (configs.folder(cells[2]) / "checkpoints" / "2" / "MANIFEST.json").touch()
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in plan["rows"]] == ["there (ok)", "to train", "goes on from step 2 of 3", "to train"]
    # Three steps of 10 s, a second aside, one of timing the decoding, and the compiler's time for scorer and decoder.
    assert "3 to train: about 34 s one after the other" in plan["lines"][1]
    assert "of which 2 have none" in plan["lines"][1]
    assert main([*words, "tune=lr"]) == 0
    assert capsys.readouterr().out.count("decided when it runs") == 4


def test_every_engine_is_found_by_its_file():
    assert engines.names() == ["local", "ray", "slurm"]
    for name in engines.names():
        module = engines._module(name, name)
        assert all(
            callable(getattr(module.Engine, method)) for method in ("room", "submit", "ended", "cancel", "close")
        )
