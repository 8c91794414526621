"""A hang or a crash in native code is a row or one line with its exit code: in compare, train, bench and check."""

import io
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from xformers_lab import config as configs
from xformers_lab.check import cache
from xformers_lab.cli import main
from xformers_lab.compare import sweep
from xformers_lab.config import Config, edit
from xformers_lab.supervise import process, worker
from xformers_lab.supervise.limits import APART, CHECK, FIRST, LEAST, MEDIANS, Clock
from xformers_lab.supervise.process import Ended, Worker
from xformers_lab.train import records

TINY = ["task=copy", "seq_len=16", "dim=16", "layers=1", "batch=4", "steps=200", "eval_batches=1"]

# A lock that is taken twice is native code that nothing wakes up, no signal either; PyDLL keeps Python's own lock too.
BAD = """
import ctypes, os, signal
import jax
from xformers_lab.attention.full import Full

CALLS = 0


class Bad(Full):
    def __init__(self, size, *, way: str = "hang", after: int = 0, rngs):
        super().__init__(size, rngs=rngs)
        self.way, self.after = way, after

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        way, after = self.way, self.after

        def end(_):
            global CALLS
            CALLS += 1
            if CALLS <= after:
                return
            if way == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            library = (ctypes.PyDLL if way == "held" else ctypes.CDLL)(None)
            lock = ctypes.create_string_buffer(256)
            library.pthread_mutex_lock(lock)
            library.pthread_mutex_lock(lock)

        if way == "trace":
            os.kill(os.getpid(), signal.SIGSEGV)
        jax.debug.callback(end, q[0, 0])
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias)
"""


@pytest.fixture
def bad(tmp_path, monkeypatch) -> str:
    """The path of a mechanism that ends badly: `way` says how, `after` so many calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    return str(path)


def trained(runs: pathlib.Path) -> pathlib.Path:
    """The folder of the one run, once its steps have stopped coming."""
    lines, end = -1, time.monotonic() + 90
    while time.monotonic() < end:
        for folder in runs.glob("*/*"):
            now = len(records.read(folder))
            if now == lines > 0:
                return folder
            lines = now
        time.sleep(1)
    raise AssertionError("nothing trains")


# ---- how long is too long ------------------------------------------------------------------------------------------


def after(*messages, **how) -> Clock:
    """A clock that heard messages, each (words, cell, seconds until the next one)."""
    clock = Clock(**how)
    for words, cell, seconds in messages:
        clock.heard({"doing": words, "cell": cell})
        clock.wait(seconds)
    return clock


def test_a_step_may_take_a_minute_or_many_medians():
    assert after(("training", None, 0.0)).allowed() == FIRST  # none measured: nothing says how long one takes
    assert after(*[("training", None, 0.1)] * 3).allowed() == LEAST
    slow = after(*[("training", None, 100.0)] * 3)
    assert slow.allowed() == MEDIANS * 100.0 and slow.left() == MEDIANS * 100.0 - 100.0
    assert after(("training", None, 100.0)).left() > 0  # a first step of 100 s
    assert after(*[("training", None, 100.0)] * 3, stall=2.0).allowed() == 2.0


def test_only_steps_of_a_kind_and_a_cell_say_how_long_the_next_may_take():
    assert after(*[("training", None, 9.0)] * 3, ("validating", None, 0.0)).allowed() == FIRST
    assert after(("training", None, 300.0), ("saving", None, 1.0), ("training", None, 1.0)).allowed() == FIRST
    fast, slow = ("timing 2 cells", 0, 0.02), ("timing 2 cells", 1, 100.0)
    assert after(fast, slow, fast, slow, fast).allowed() == LEAST
    assert after(fast, slow, fast, slow).allowed() == MEDIANS * 100.0


def test_what_does_not_step_has_a_limit_of_its_own():
    compiling = ("compiling full at 16 tokens", 0, 0.0)
    assert after(compiling).allowed() == APART * LEAST == 3600
    assert after(compiling, stall=90.0).allowed() == APART * 90
    assert after(("checking mine.py", None, 0.0), stall=2.0).allowed() == CHECK
    for message in (compiling, ("training", None, 0.0), ("checking mine.py", None, 0.0)):
        assert after(message, stall=0.0).allowed() == math.inf
    assert after(compiling, stall=2.0, limit=7.0).left() == 7.0 and after(compiling, limit=0.0).left() == math.inf


def test_after_a_signal_only_a_checkpoint_may_take_long():
    assert after(("compiling", None, 0.0)).allowed(stopping=True) == LEAST
    assert after(("saving", None, 0.0)).allowed(stopping=True) == APART * LEAST
    assert after(*[("training", None, 100.0)] * 3).allowed(stopping=True) == MEDIANS * 100.0


def test_the_limit_is_no_part_of_what_a_run_is():
    assert configs.identity(Config()) == configs.identity(edit(Config(), stall=5))
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(edit(Config(), stall=2.5))))).stall == 2.5


# ---- compare -------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("way", ["hang", "held"])
def test_a_cell_that_hangs_is_a_row_and_the_grid_goes_on(capsys, bad, tmp_path, way):
    words = [*TINY, f"runs={tmp_path}/runs", f"attention={bad}:way={way}:after=300,full", "stall=3", "--no-check"]
    assert main(["compare", *words, "--no-baselines", "--json"]) == 5
    hung, fine = json.loads(capsys.readouterr().out)
    assert fine["status"] == "ok" and hung["status"] == "stalled"
    folder = pathlib.Path(hung["run_dir"])
    assert 0 < hung["step"] == len(records.read(folder)) < 200
    assert hung["reason"].startswith(f"no step for 3 s after step {hung['step']} of 200; the process was ended")
    assert "1 stalled" in (tmp_path / "runs" / "report.html").read_text()
    # Its reason stays in its folder, and the same command tries it again.
    kept = json.loads((folder / "result.json").read_text())
    assert (kept["status"], kept["step"]) == ("stalled", hung["step"])
    assert sweep.stored(configs.from_dict(hung["config"])) is None
    with records.locked(folder):
        pass  # nothing of the process is left to hold it


@pytest.mark.full
def test_a_crash_in_native_code_is_a_row(capsys, bad, tmp_path):
    words = [*TINY, f"runs={tmp_path}/runs", f"attention={bad}:way=trace,{bad}:way=crash:after=300,full", "--no-check"]
    assert main(["compare", *words, "--no-baselines", "--json"]) == 5
    at_once, later, fine = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in (at_once, later, fine)] == ["failed", "failed", "ok"]
    assert "signal 11 (SIGSEGV) while checking the config" in at_once["reason"]
    assert f"signal 11 (SIGSEGV) while training after step {later['step']} of 200" in later["reason"]


@pytest.mark.full
def test_a_check_that_ends_its_process_refuses_all_cells_of_the_mechanism(capsys, bad, tmp_path, monkeypatch):
    requests = []
    ask = Worker.ask
    monkeypatch.setattr(Worker, "ask", lambda self, what, *a, **k: requests.append(what) or ask(self, what, *a, **k))
    words = [*TINY, f"runs={tmp_path}/runs", f"attention={bad}:way=crash,full", "seed=0,1", "steps=2"]
    assert main(["compare", *words, "--no-baselines", "--json"]) == 5
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["refused", "refused", "ok", "ok"]
    for row in rows[:2]:
        assert row["reason"].startswith("its check crashed: the process ended with signal 11 (SIGSEGV)")
        assert row["reason"].endswith(f"see xlab check {bad}:way=crash")
    assert requests.count("compare.cell.check") == 3  # not once more for the second seed


# ---- train ---------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_run_that_hangs_fails_in_one_line_and_says_how_to_go_on(capsys, bad, tmp_path):
    words = [*TINY, f"runs={tmp_path}", f"attention={bad}:after=300", "save_every=10", "stall=3"]
    assert main(["train", *words, "--json"]) == 3
    output = capsys.readouterr()
    (folder,) = tmp_path.glob("copy/*")
    step = len(records.read(folder))
    assert output.out == "" and output.err.splitlines()[-1] == (
        f"xlab train: no step for 3 s after step {step} of 200; the process was ended (stall= changes the limit); "
        f"go on with xlab resume {folder}"
    )
    assert main(["resume", str(folder), "--stall", "soon"]) == 2
    assert "--stall soon wants a number" in capsys.readouterr().err
    assert main(["resume", str(folder), "--stall", "1e-9"]) == 3
    assert f"go on with xlab resume {folder}" in capsys.readouterr().err
    for file in folder.glob("checkpoints/*/MANIFEST.json"):
        file.write_text("")
    assert main(["resume", str(folder)]) == 4
    assert "no checkpoint verifies" in capsys.readouterr().err


@pytest.mark.full
def test_a_run_that_crashes_fails_in_one_line(capsys, bad, tmp_path):
    assert main(["train", *TINY, f"runs={tmp_path}", f"attention={bad}:way=trace"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["xlab train: the process ended with signal 11 (SIGSEGV) while preparing the data and the config"]


@pytest.mark.full
@pytest.mark.parametrize("way", ["hang", "held"])
def test_the_second_signal_ends_a_command_that_hangs(bad, tmp_path, way):
    words = [*TINY, f"runs={tmp_path}/runs", f"attention={bad}:way={way}:after=300"]
    command = [sys.executable, "-m", "xformers_lab", "train", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        trained(tmp_path / "runs")
        running.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1.5)
        running.send_signal(signal.SIGTERM)
        assert running.wait(5) == 128 + signal.SIGTERM
        assert running.stderr is not None and "xlab train: interrupted: stopped at once" in running.stderr.read()


@pytest.mark.full
def test_the_second_signal_ends_a_program_of_ones_own_that_hangs(bad, tmp_path):
    """Which trains in its main thread, where no handler runs while native code hangs."""
    script = "from xformers_lab import config; from xformers_lab.train import loop; import sys; "
    script += "loop.run(config.single(sys.argv[1:]))"
    words = [*TINY, f"runs={tmp_path}/runs", f"attention={bad}:after=300"]
    with subprocess.Popen([sys.executable, "-c", script, *words]) as running:
        trained(tmp_path / "runs")
        running.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1.5)
        running.send_signal(signal.SIGTERM)
        assert running.wait(5) == 128 + signal.SIGTERM


@pytest.mark.full
def test_the_first_signal_ends_what_does_not_stop_within_its_limit(bad, tmp_path):
    words = [*TINY, f"runs={tmp_path}/runs", f"attention={bad}:after=300", "stall=6"]
    with subprocess.Popen([sys.executable, "-m", "xformers_lab", "train", *words], stderr=subprocess.PIPE) as running:
        trained(tmp_path / "runs")
        running.send_signal(signal.SIGINT)
        assert running.wait(15) == 128 + signal.SIGINT
        assert running.stderr is not None and b"ended, since it did not stop for 6 s" in running.stderr.read()


# ---- bench ---------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_bench_goes_on_without_the_cells_that_hang_or_crash(capsys, bad):
    mechanisms = f"{bad}:way=hang:after=5,{bad}:way=crash:after=5,{bad}:way=trace,linear"
    words = [f"attention={mechanisms}", "seq_len=8,16", "dim=16", "heads=1", "batch=1", "stall=3", "--no-check"]
    assert main(["bench", *words, "--pass", "forward", "--rounds", "2", "--json"]) == 5
    rows = {(row["attention"].partition("way=")[2], row["seq_len"]): row for row in json.loads(capsys.readouterr().out)}
    for length in (8, 16):
        hung, crashed = rows["hang:after=5", length], rows["crash:after=5", length]
        assert hung["status"] == "stalled" and crashed["status"] == rows["trace", length]["status"] == "failed"
        assert hung["reason"].startswith("nothing for 3 s while timing")
        assert re.search(rf"signal 11 \(SIGSEGV\) while timing [23] cells at {length} tokens", crashed["reason"])
        assert rows["", length]["status"] == "ok" and rows["", length]["seconds_min"] > 0
    assert rows["", 8]["exponent"] is None and rows["", 8]["machine"]["processor"]  # two lengths have no exponent


# ---- check ---------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_check_that_crashes_or_does_not_end_is_a_verdict_and_the_others_go_on(capsys, bad, tmp_path):
    choice = f"{bad}:way=crash"
    cache.keep(choice, {"passed": True, "failed": []})
    (tmp_path / "import_crash.py").write_text("import os\nos.abort()\n")
    words = [str(tmp_path / "import_crash.py"), choice, f"{bad}:way=held", "norm/rezero"]
    assert main(["check", *words, "--limit", "12", "--json"]) == 1
    imported, crashed, endless, fine = json.loads(capsys.readouterr().out)
    assert [failure["property"] for failure in imported["failed"]] == ["crashed"]
    assert "signal 6 (SIGABRT) while importing" in imported["failed"][0]["message"]
    assert [failure["property"] for failure in crashed["failed"]] == ["crashed"]
    assert f"signal 11 (SIGSEGV) while checking {choice}: " in crashed["failed"][0]["message"]
    assert cache.known(choice) is None  # neither the older verdict nor this one, which may be the machine's
    assert [failure["property"] for failure in endless["failed"]] == ["did not end"]
    assert endless["failed"][0]["message"].startswith("limit 12 s")
    assert fine["passed"] and fine["name"] == "rezero"


@pytest.mark.parametrize("limit", ["-1", "nan"])
def test_a_limit_is_a_number_of_seconds(capsys, limit):
    assert main(["check", "linear", f"--limit={limit}"]) == 2
    assert "a number of seconds" in capsys.readouterr().err


# ---- the worker ----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_commands_touch_no_device(tmp_path):
    """An accelerator may admit one process, which is the worker."""
    script = """
import sys
from jax._src import xla_bridge
from xformers_lab.cli import main
words = ["task=copy", "seq_len=16", "dim=16", "layers=1", "batch=4", "steps=2", "eval_batches=1", "runs=" + sys.argv[1]]
for command in (["train", *words], ["resume", "last", "--runs", sys.argv[1]], ["check", "norm/rezero"],
                ["bench", *words, "--no-check", "--rounds", "1"]):
    assert main(command) == 0, command
    assert not xla_bridge.backends_are_initialized(), command
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.full
def test_what_a_run_writes_to_stderr_is_the_users_and_stdout_the_records(capsys, tmp_path):
    (tmp_path / "loud.py").write_text(
        "import sys\nfrom xformers_lab.ffn.mlp import Mlp\n\n\nclass Loud(Mlp):\n"
        "    def __call__(self, x, *, valid=None, key=None):\n"
        "        print('to stdout')\n        print('to stderr', file=sys.stderr)\n"
        "        return super().__call__(x, valid=valid, key=key)\n"
    )
    words = [*TINY, "steps=2", f"runs={tmp_path}/runs", f"ffn={tmp_path}/loud.py", "--json"]
    for message in ("to stderr", "already finished; this is its record"):
        assert main(["train", *words]) == 0
        output = capsys.readouterr()
        assert json.loads(output.out)["status"] == "ok"
        assert "to stdout" in output.err and message in output.err


def test_a_worker_that_hangs_ends_without_its_driver(monkeypatch):
    """Its driver's end of the pipe closes, however the driver ended."""
    ended = []
    monkeypatch.setattr(worker, "ALONE", 0.0)
    monkeypatch.setattr(os, "_exit", ended.append)
    reads, writes = os.pipe()
    os.close(writes)
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    tell = worker.Tell(io.StringIO())
    worker._end_alone(reads, tell)
    assert tell.alone and ended == [1] and not signals  # it has nothing to do, and ends by itself
    tell.busy = True
    worker._end_alone(reads, tell)
    os.close(reads)
    assert signals == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.full
def test_an_error_that_nobody_foresaw_is_a_bug_of_ours(capsys):
    with Worker() as child, pytest.raises(process.LabError, match="a bug of the laboratory") as raised:
        child.ask("bench.work.look", config={}, passes=[])
    assert raised.value.exit_code == 1 and "Traceback" in capsys.readouterr().err


def test_after_a_signal_nothing_is_begun():
    with Worker() as child:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Ended, match="not reached") as ended:
            child.ask("bench.work.machine")
    assert ended.value.exit_code == 143 and child.process is None
