"""Ctrl-C and SIGTERM: when they come early, twice, or while something compiles."""

import os
import signal
import subprocess
import sys
import time

import pytest

from xformers_lab.errors import contained, stopped_by
from xformers_lab.supervise.interrupt import REPEATED, ending, listening
from xformers_lab.supervise.process import Ended, Worker

RUN = [sys.executable, "-m", "xformers_lab"]
TINY = ["task=copy", "seq_len=16", "dim=8", "layers=1", "batch=4", "steps=2", "eval_batches=1"]

# A mechanism that takes long to trace, which a compilation begins with.
SLOW = """
import pathlib, time
from xformers_lab.attention.full import Full



class Slow(Full):
    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        if list(pathlib.Path({folder!r}).glob("runs/*/*/env.json")):
            time.sleep(60)
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_an_early_signal_ends_a_command_in_one_line(tmp_path, number, seconds):
    command = [*RUN, "train", *TINY, "steps=100000", f"runs={tmp_path}/runs"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        time.sleep(seconds)
        running.send_signal(number)
        assert running.wait(20) == 128 + number
        assert running.stderr is not None
        said = running.stderr.read()
        assert "interrupted" in said and "Traceback" not in said and len(said.strip().splitlines()) <= 2


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_second_signal_ends_with_the_code_of_the_first(number, raised):
    """Such as in a save, where nothing asks for the first one."""
    with pytest.raises(raised) as caught, listening() as asked:
        os.kill(os.getpid(), number)
        assert asked() == number
        time.sleep(REPEATED + 0.1)
        os.kill(os.getpid(), signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        time.sleep(1)
    assert number == signal.SIGINT or caught.value.code == 143


def test_a_worker_that_was_stopped_twice_says_by_what(monkeypatch):
    with Worker() as child:
        child.stopped = signal.SIGTERM
        error = child._error({"exit_code": 130, "text": "stopped at once"})
        assert isinstance(error, Ended) and error.exit_code == 143
    assert stopped_by(KeyboardInterrupt()) == 128 + signal.SIGINT
    assert stopped_by(SystemExit(143)) == 128 + signal.SIGTERM
    assert [stopped_by(error) for error in (SystemExit(), SystemExit(3), GeneratorExit(), ValueError())] == [None] * 4


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_second_signal_amid_other_peoples_code_is_no_fault_of_theirs(number, kind):
    with pytest.raises(kind), listening() as heard, contained():
        os.kill(os.getpid(), number)
        time.sleep(REPEATED + 0.1)
        assert heard() == number
        os.kill(os.getpid(), number)
        time.sleep(1)


@pytest.mark.full
def test_a_signal_while_it_compiles_does_not_wait_for_the_compiler(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.format(folder=str(tmp_path)))
    command = [*RUN, "train", *TINY, f"attention={tmp_path}/slow.py", f"runs={tmp_path}/runs"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/*/env.json")) and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 143
        assert running.stderr is not None
        said = running.stderr.read()
        assert "interrupted: stopped at once" in said and "saves itself" not in said


def test_a_signal_ends_a_command_in_native_code():
    """Such as a compilation for `eval`, which returns to no handler."""
    script = "import ctypes; from xformers_lab.supervise.interrupt import ending; print('ready', flush=True)\n"
    script += "with ending('xlab eval'):\n    library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)\n"
    script += "    print('in it', flush=True)\n    [library.pthread_mutex_lock(lock) for _ in range(2)]"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        while running.stdout.readline() != b"in it\n":
            pass
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        assert running.wait(5) == 130 and running.stderr.read() == b"\nxlab eval: interrupted\n"


def test_what_heard_signals_before_hears_them_again():
    before = signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    with ending("xlab"), listening() as asked:
        os.kill(os.getpid(), signal.SIGTERM)  # the innermost alone hears it
        assert asked() == signal.SIGTERM
        time.sleep(0.2)
    assert (signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)) == before
