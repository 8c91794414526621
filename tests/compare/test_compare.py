"""The driver of a comparison and its worker: what a signal, a crash, a broken choice or a full disk leaves behind."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from xformers_lab import config as configs
from xformers_lab import model
from xformers_lab.check import cache
from xformers_lab.cli import main
from xformers_lab.compare import cell, run, sweep
from xformers_lab.config import Config, edit
from xformers_lab.errors import IntegrityError, UsageError
from xformers_lab.model import check_config
from xformers_lab.record import HELD
from xformers_lab.supervise import interrupt
from xformers_lab.supervise.process import Worker
from xformers_lab.supervise.worker import Tell
from xformers_lab.tasks import lm
from xformers_lab.train import loop, records

TINY = {"task": "copy", "seq_len": 16, "dim": 16, "layers": 1, "batch": 4, "steps": 3, "eval_batches": 1}
WORDS = [f"{key}={value}" for key, value in TINY.items() if key != "task"]
PROMISED = {"status", "metric", "metric_name", "tokens_per_second", "seconds_min", "seconds_median", "compile_seconds"}
PROMISED |= {"flops", "parameters", "temp_bytes", "reason", "attention", "seq_len", "seed", "task"}

# Sends signals to the driver, the worker's parent: STRIKE holds when and which, "import 2", "train 15", "train 2 2".
STRIKING = """
import os, sys, time

STRIKE = os.environ["STRIKE"].split() if "worker" in "".join(sys.argv) else [""]

def strike():
    for number in STRIKE[1:]:
        os.kill(os.getppid(), int(number))
        time.sleep(1.5 * (len(STRIKE) > 2))  # a second one that comes at once would be the same
    if STRIKE[0] == "import" or len(STRIKE) > 2:
        time.sleep(60)  # the process is ended before

if STRIKE[0] == "import":
    strike()

from xformers_lab.tasks.copy import Copy as Whole

class Copy(Whole):
    def batch(self, split, step):
        if STRIKE[0] == split and step == 4:
            strike()
        return super().batch(split, step)
"""

# Takes its process down while it is traced for training (a check has one sequence), or only says something there.
DYING = """
import os, sys
from xformers_lab.ffn.mlp import Mlp

class Dying(Mlp):
    def __init__(self, size, *, way: str = "say", rngs):
        super().__init__(size, rngs=rngs)
        self.way = way

    def __call__(self, x, *, valid=None, key=None):
        if "worker" in "".join(sys.argv) and len(x) > 1:
            if self.way == "say":
                print("the first cell's words", file=sys.stderr, flush=True)
            else:
                os.kill(os.getpid(), 9) if self.way == "kill" else os._exit(7)
        return super().__call__(x, valid=valid, key=key)
"""

MECHANISM = """
from xformers_lab.attention.full import Full

class {name}(Full):
    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias){end}
"""


class Quiet:
    """Progress that nobody looks at."""

    def started(self, index, cell):
        pass

    def stepped(self, index, step, total, loss):
        pass

    def finished(self, index, count, record):
        pass


def tiny(folder, **changes) -> Config:
    return edit(Config(), **(TINY | {"runs": str(folder / "runs")} | changes))


def checked(config: Config) -> dict:
    return cell.check(Tell(io.StringIO()), configs.to_dict(config), True)


def test_the_seeds_of_a_variant_are_checked_by_one_trace(tmp_path, monkeypatch):
    """And each variant by its own; what cannot be is refused at every seed."""
    traced, trace = [], model._traced
    monkeypatch.setattr(model, "_traced", lambda config, task: traced.append(config) or trace(config, task))
    for seed in (0, 1, 2):
        assert checked(tiny(tmp_path, seed=seed, data_seed=seed + 1))["status"] == "ok"
    assert len(traced) == 1
    assert checked(tiny(tmp_path, layers=2))["status"] == "ok" and len(traced) == 2
    for seed in (0, 1):
        assert checked(tiny(tmp_path, attention="linear", position="alibi", seed=seed))["status"] == "impossible"


@pytest.mark.parametrize(
    "strike, code, reason",
    [
        ("import 2", 130, "not reached|stopped at once"),
        ("train 15", 143, r"saved at step \d+ of 5000"),
        ("train 2 2", 130, "stopped at once"),
    ],
)
@pytest.mark.full
def test_a_signal_ends_the_grid_and_the_table_says_so(tmp_path, strike, code, reason):
    (tmp_path / "copy.py").write_text(STRIKING)  # where Python's own is not to be hidden by it
    words = ["task=./copy.py", "seed=0,1", *WORDS, "steps=5000", "runs=runs"]
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "xformers_lab", "compare", *words, "--no-baselines", "--json"],
        env=os.environ | {"STRIKE": strike, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr and "stopping" in ran.stderr
    rows = json.loads(ran.stdout)
    assert [row["status"] for row in rows] == ["interrupted", "interrupted"]
    assert re.search(reason, rows[0]["reason"]) and "not reached" in rows[1]["reason"]
    assert all(row.keys() >= PROMISED for row in rows)
    assert list(tmp_path.glob("runs/*/*/result.json")) == []
    saved = len(list(tmp_path.glob("runs/*/*/checkpoints/*/MANIFEST.json")))
    assert saved == 1 if strike == "train 15" else saved <= 1  # the second signal may come after it was saved
    assert (tmp_path / "runs" / "report.html").is_file()


def test_signals_that_come_together_are_one_wish(monkeypatch):
    """Ctrl-C under a wrapper that passes it on is no second Ctrl-C."""
    with interrupt.listening() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop() == signal.SIGINT
        monkeypatch.setattr(interrupt, "REPEATED", -1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.full
def test_a_dead_worker_tells_its_own_reason_and_the_driver_touches_no_device(tmp_path):
    """Not the words of the cell before it, nor those of an older attempt; and the next cell runs."""
    (tmp_path / "dying.py").write_text(DYING)
    cells = [tiny(tmp_path, ffn=f"{tmp_path}/dying.py:way={way}") for way in ("say", "exit", "kill")]
    stale = configs.folder(cells[1])
    stale.mkdir(parents=True)
    (stale / "result.json").write_text('{"status": "failed", "reason": "older"}')
    script = """
import json, sys
from jax._src import xla_bridge
from xformers_lab import config as configs
from xformers_lab.compare import run
from xformers_lab.supervise.process import Worker
cells = [configs.from_dict(tree) for tree in json.loads(sys.argv[1])]
with Worker() as worker:
    ended = run.check_cells(cells, worker)
    class Quiet:
        started = stepped = finished = lambda *_: None
    records = run.train_cells(cells, worker, ended=ended, progress=Quiet())
rows = [run.row(cell, record, []) for cell, record in zip(cells, records, strict=True)]
print(json.dumps([ended == {}, xla_bridge.backends_are_initialized(), rows]))
"""
    argument = json.dumps([configs.to_dict(cell) for cell in cells])
    ran = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, check=True)
    none_ended, touched, rows = json.loads(ran.stdout)
    assert none_ended and not touched
    assert [row["status"] for row in rows] == ["ok", "failed", "oom"]
    assert rows[1]["reason"] == "the process ended with exit code 7 while compiling after step 0 of 3"
    assert rows[2]["reason"].startswith("the process was killed (signal 9) while compiling")
    assert json.loads((stale / "result.json").read_text())["reason"] == rows[1]["reason"]
    assert all(row.keys() >= PROMISED for row in rows[1:])


@pytest.mark.full
def test_a_broken_or_failing_mechanism_is_a_row_and_the_others_go_on(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, end in (("Wrong", " + q[:3]"), ("Leaky", "")):
        (tmp_path / f"{name.lower()}.py").write_text(MECHANISM.format(name=name, end=end))
    wrong, leaky = (str(tmp_path / f"{name}.py") for name in ("wrong", "leaky"))
    cache.keep(leaky, {"passed": False, "failed": [{"property": "no_leak", "message": ""}]})
    words = ["task=copy", *WORDS, f"runs={tmp_path}/runs", f"attention={wrong},{leaky},full"]
    assert main(["compare", *words, "--no-baselines", "--json"]) == 5
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["failed", "refused", "ok"]
    assert "wrong.py:6)" in rows[0]["reason"] and "Error" in rows[0]["reason"]
    assert rows[1]["reason"].startswith("fails its check: no_leak") and rows[1]["tokens_per_second"] is None
    with pytest.raises(UsageError, match=r"wrong\.py: \w+Error: .*wrong\.py:6\)"):
        check_config(tiny(tmp_path, attention=wrong))


def test_only_mechanisms_from_outside_are_checked_anew(tmp_path, monkeypatch):
    (tmp_path / "leaky.py").write_text(MECHANISM.format(name="Leaky", end=""))
    verdicts = []
    monkeypatch.setattr(cache, "known", lambda choice: None)
    monkeypatch.setattr(cache, "verdict", lambda choice: verdicts.append(choice) or {"failed": []})
    assert checked(tiny(tmp_path, attention=f"full+{tmp_path}/leaky.py"))["status"] == "ok"
    assert verdicts == [f"{tmp_path}/leaky.py"]


@pytest.mark.parametrize(
    "changes", [{"task": "lm", "memory": "xl", "position": "rope", "layout": "pmap"}, {"layout": "experts"}]
)
def test_what_a_layout_cannot_is_found_before_any_cell_trains(tmp_path, changes):
    row = checked(tiny(tmp_path, **changes))
    assert row["status"] == "impossible" and "layout=data" in row["reason"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_cell_trains(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with Worker() as worker, pytest.raises(UsageError, match="choose another folder with runs="):
        run.train_cells([tiny(tmp_path)], worker, ended={}, progress=Quiet())
    assert worker.process is None


@pytest.fixture
def two_cells(tmp_path, monkeypatch):
    """A comparison of two cells of which another process holds the first: compare(release) calls release() once the
    other cell is done -> the rows, and which cells were asked for."""
    monkeypatch.setattr(sweep, "PAUSE", 0.0)
    cells, held, asked, results = [tiny(tmp_path, seed=seed) for seed in (0, 1)], [0], [], {}

    def ask(self, what, heard, *, stall, config, **given):
        asked.append(config["seed"])
        if config["seed"] in held:
            return {"status": HELD, "reason": "process 1"}
        return {"status": "ok", "metric": config["seed"]}

    monkeypatch.setattr(Worker, "ask", ask)
    monkeypatch.setattr(sweep, "stored", results.get)

    def compare(release):
        class Releases(Quiet):
            def finished(self, index, count, record):
                if count == 0:
                    release(cells[0], held, results)

        words = []
        with Worker() as worker:
            records = run.train_cells(cells, worker, ended={}, progress=Releases(), announce=words.append)
        assert words == ["waiting for 1 cell that another process trains; Ctrl-C ends the waiting"]
        return records, asked

    return compare


def result(cell, **record):
    path = configs.folder(cell) / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_a_cell_that_another_process_trains_is_left_to_it_and_its_record_taken(two_cells):
    rows, asked = two_cells(lambda cell, held, results: results.update({cell: {"status": "ok", "metric": 0.5}}))
    assert [row["metric"] for row in rows] == [0.5, 1] and asked == [0, 1]


def test_a_cell_that_another_process_failed_meanwhile_is_a_row_and_not_tried_again(two_cells):
    rows, asked = two_cells(lambda cell, held, results: result(cell, status="oom", reason="no room"))
    assert [row["status"] for row in rows] == ["oom", "ok"] and rows[0]["reason"] == "no room" and asked == [0, 1]


def test_a_cell_that_another_process_gave_up_is_trained_here(two_cells):
    rows, asked = two_cells(lambda cell, held, results: held.clear())
    assert [row["status"] for row in rows] == ["ok", "ok"] and asked == [0, 1, 0]


def test_an_older_failure_is_tried_again(tmp_path):
    cell = tiny(tmp_path)
    result(cell, status="failed", reason="older")
    assert sweep.failed_since(time.time() + 5, cell) is None
    assert (sweep.failed_since(0.0, cell) or {})["reason"] == "older"


@pytest.mark.full
def test_two_comparisons_share_the_cells_of_a_folder(tmp_path):
    """Each one ends with all rows, each cell is trained once, and none is marked failed."""
    words = ["task=copy", *WORDS, "seed=0..3", "steps=200", f"runs={tmp_path}/runs", "--json"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "xformers_lab", "compare", *words, "--no-baselines"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    ends = [(*process.communicate(timeout=300), process.returncode) for process in both]
    assert [code for *_, code in ends] == [0, 0], ends
    first, second = (json.loads(out) for out, _, _ in ends)
    assert first == second and [row["status"] for row in first] == ["ok"] * 4
    assert all(len(path.read_text().splitlines()) == 200 for path in tmp_path.glob("runs/*/*/metrics.jsonl"))


def test_a_folder_in_use_is_said_to_be_held(tmp_path):
    config = tiny(tmp_path)
    with records.locked(configs.folder(config)):
        record = cell.train(Tell(io.StringIO()), configs.to_dict(config))
    assert record["status"] == HELD and "is running this" in record["reason"]


@pytest.mark.full
def test_a_result_of_other_data_is_not_taken_for_this_one(tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_bytes(b"some words " * 300)
    config = tiny(tmp_path, task=f"lm:path={text}")
    folder = configs.folder(config)
    record = loop.run(config)
    assert loop.run(config) == record and f"{folder}: already finished" in caplog.text
    assert checked(config)["status"] == "ok"
    text.write_bytes(b"other words " * 300)
    lm.corpus.cache_clear()
    with pytest.raises(UsageError, match=r"train_bytes was 2970, is 3240.*delete that folder"):
        loop.run(config)
    assert checked(config)["status"] == "impossible"
    # Neither with a checkpoint alone, nor with none that verifies, does train send to resume and resume to train.
    (folder / "result.json").unlink()
    with pytest.raises(UsageError, match=f"delete {folder}"):
        loop.resume(folder)
    (folder / "checkpoints" / "3" / "MANIFEST.json").unlink()
    with pytest.raises(IntegrityError, match="delete that folder"):
        loop.resume(folder)


def test_a_split_too_short_for_a_memory_is_found_before_training(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"some words " * 100)
    config = tiny(tmp_path, task=f"lm:path={tmp_path}/text.txt", memory="xl", position="rope", batch=8)
    with pytest.raises(UsageError, match=r"the validation split .* too few for batch=8"):
        check_config(config)
