"""The driver's side of a worker: it asks one thing at a time, ends what hangs, and starts another where one died."""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

from xformers_lab.errors import IntegrityError, LabError, RunFailed, UsageError
from xformers_lab.supervise.interrupt import handling
from xformers_lab.supervise.limits import Clock
from xformers_lab.terminal import LINES, visible

# The worker imports from where the driver does. `-m` would put the working folder first, where a user's own copy.py
# would hide Python's.
START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_module(sys.argv[1], run_name='__main__')"
SLICE = 0.5  # seconds between looks at the clock and the worker's log
LEAVING = 20.0  # seconds to end in, for a worker that has nothing more to do
KINDS = {kind.exit_code: kind for kind in (UsageError, RunFailed, IntegrityError)}
SAVES = "what is under way saves itself; once more ends it at once"
ENDS = "what is under way ends"
LOST = "another process of the run ended, or fell silent"
# What native threads of jax write where several processes train one run: that they have met, and that one is gone,
# before they end this one too.
MET = re.compile(rb"^\[Gloo\] .*\n", re.M)
GONE = re.compile(rb"^[EF]\d{4} \S+ +\d+ (coordination_service\w*\.cc|client\.h):", re.M)


class Ended(RunFailed):
    """The worker's process ended before it answered.

    status: "failed", "oom" (it was killed, most likely for want of memory), "stalled" (ended for its silence) or
    "interrupted" (by a signal; exit_code is 128 and its number). clock: what it was doing.
    """

    def __init__(self, status: str, reason: str, clock: Clock, exit_code: int = RunFailed.exit_code):
        super().__init__(reason)
        self.status, self.reason, self.clock, self.exit_code = status, reason, clock, exit_code

    @property
    def record(self) -> dict:
        """What a row says of it."""
        step = {} if self.clock.step is None or self.status == "interrupted" else {"step": self.clock.step}
        return {"status": self.status, "reason": self.reason, **step}

    def refusal(self, choice: str) -> str:
        """Why a mechanism is refused whose conformance check ended so; raises this where a signal ended it."""
        if self.status == "interrupted":
            raise self
        how = "did not end" if self.status == "stalled" else "crashed"
        return f"its check {how}: {self.reason}; see xlab check {choice}"


class Worker:
    """A worker process while the `with` lasts, in which the driver hears Ctrl-C and SIGTERM.

    stopped: the first signal, 0 for none. It is passed on to the process, which saves what it trains and ends; a
    second one (insisted) kills it, and so does the limit of what it is doing. From then on nothing is begun.
    """

    def __init__(
        self,
        *,
        shown: bool = True,
        notice: str = SAVES,
        hears: bool = True,
        environment: Mapping[str, str] = MappingProxyType({}),
        folder: str | None = None,
        inherited: Sequence[int] = (),
    ):
        """shown: whether what the process writes to stderr is the user's to read; notice: what the first signal does,
        in words; hears: whether signals of this process are meant for it, where not `stop` is called; environment: what
        the process has beside this one's; folder: where it works; inherited: open files that it keeps until it ends.
        """
        self.shown, self.notice, self.stopped, self.insisted = shown, notice, 0, False
        self.environment, self.folder, self.inherited = environment, folder, inherited
        self.begun_elsewhere = False  # whether other workers have something to save
        self.process: subprocess.Popen | None = None
        self.clock = Clock()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed on exit, with the process)
        self.gone = False  # whether the process wrote that another one is
        self.begun = self.read = 0  # where in the log the latest question begins, and how far it was shown
        self.received, self.ready = b"", None
        self.signals = handling(self._stop) if hears else contextlib.nullcontext()

    def __enter__(self) -> Self:
        self.signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if self.process is not None:
                if kind is not None:
                    self.process.terminate()
                self._close()
        finally:
            self.log.close()
            self.signals.__exit__(None, None, None)

    def ask(
        self,
        what: str,
        heard: Callable[[dict], None] = lambda message: None,
        *,
        stall: float | None = None,
        limit: float | None = None,
        **arguments: Any,
    ) -> Any:
        """The answer of a function of the package, "train.work.run", called in the process with these arguments.

        heard(message) gets what it says before. stall and limit: see `limits`. Raises the LabError that the function
        raised, and Ended where its process died, was too long silent, or was interrupted.
        """
        if self.stopped:
            raise self._interrupted("not reached before the interruption")
        if self.process is None or self.process.poll() is not None:
            self._start()
        self.clock = clock = Clock(stall, limit)
        if self.stopped:  # while it started
            raise self._interrupted("not reached before the interruption")
        assert self.process is not None and self.process.stdin is not None
        self.begun = os.fstat(self.log.fileno()).st_size
        try:
            self.process.stdin.write((json.dumps({"do": what, "with": arguments}) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        while (message := self._receive()) is not None:
            if "answer" in message:
                self._show()
                return message["answer"]
            if "error" in message:
                self._show()
                raise self._error(message["error"])
            clock.heard(message)
            heard(message)
        raise self._died()

    def _start(self) -> None:
        if self.process is not None:
            self._close()
        self.received, self.gone = b"", False
        # Its own session: what a terminal sends reaches the driver alone, which passes it on once; and all that the
        # process starts can be ended with it.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, "xformers_lab.supervise.worker", *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
            env={**os.environ, **self.environment},
            cwd=self.folder,
            pass_fds=self.inherited,
        )
        assert self.process.stdout is not None
        self.ready = selectors.DefaultSelector()
        self.ready.register(self.process.stdout, selectors.EVENT_READ)

    def _receive(self) -> dict | None:
        """The next message, None where the process is dead. Raises Ended where the process has had its time."""
        assert self.process is not None and self.process.stdout is not None and self.ready is not None
        while b"\n" not in self.received:
            began = time.monotonic()
            if self.ready.select(max(0.0, min(SLICE, self.clock.left(bool(self.stopped))))):
                more = os.read(self.process.stdout.fileno(), 1 << 16)
                if not more:
                    return None
                self.received += more
            elif self.process.poll() is not None:  # what it started may still hold the pipe
                return None
            # A driver that was stopped (Ctrl-Z) has not waited all that time.
            self.clock.wait(min(time.monotonic() - began, 2 * SLICE))
            if b"\n" not in self.received and self.clock.left(bool(self.stopped)) <= 0:
                raise self._overdue()
            self._show()
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

    def rest(self) -> None:
        """End the process, which has nothing to do for a while; the next question starts another one."""
        if self.process is not None:
            self._close()

    def stop(self, number: int, *, insisted: bool = False) -> None:
        """Have the process save itself and end, or end it at once if `insisted`, as a signal of that number does; from
        any thread."""
        self.stopped = self.stopped or number
        process = self.process
        if insisted:
            self._kill()
        elif process is not None:
            process.terminate()

    def _stop(self, number: int) -> None:
        again, self.stopped = self.stopped, self.stopped or number
        self.insisted = bool(again)
        saves = self.clock.begun or self.begun_elsewhere
        notice = self.notice if saves else ENDS  # before, there is nothing to save
        late = "; it compiles now, which comes first" if self.clock.doing == "compiling the evaluation" else ""
        with contextlib.suppress(OSError):  # not print: a handler may interrupt another one
            os.write(2, b"\n" if again else f"\nstopping: {notice}{late}\n".encode())
        if again:
            self._kill()
        elif self.process is not None:
            # Until it listens, while it imports or checks, SIGTERM ends it at once, whatever it is in the middle of.
            self.clock.quiet = 0.0
            self.process.terminate()

    def _show(self, rest: bool = False) -> None:
        """Pass on the lines that the process wrote to stderr since the last time; rest: and what is no whole line."""
        text = os.pread(self.log.fileno(), 1 << 20, self.read)
        if not rest and len(text) < 1 << 20:
            text = text[: text.rfind(b"\n") + 1]
        self.read += len(text)
        own = b"" if self.gone else MET.sub(b"", text)
        if gone := GONE.search(own):
            own, self.gone = own[: gone.start()], True
        if self.shown and own:
            sys.stderr.write(visible(own.decode(errors="replace"), LINES))
            sys.stderr.flush()

    def _kill(self) -> None:
        """End the process and all that it started, whatever they are doing."""
        process = self.process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _overdue(self) -> Ended:
        clock, quiet = self.clock, self.clock.quiet
        self._kill()
        self._close()
        if self.stopped:
            return self._interrupted(f"ended, since it did not stop for {quiet:.0f} s")
        if clock.limit is not None:
            return Ended("stalled", f"no end within {clock.limit:g} s: it was {clock.place}", clock)
        what = f"no step for {quiet:.0f} s" if clock.kind == "training" else f"nothing for {quiet:.0f} s"
        where = clock.place.removeprefix("training ") if clock.kind == "training" else f"while {clock.place}"
        mend = "" if clock.kind == "checking" else " (stall= changes the limit)"
        return Ended("stalled", f"{what} {where}; the process was ended{mend}", clock)

    def _died(self) -> Ended:
        clock = self.clock
        code = self._close()
        if self.stopped:
            return self._interrupted("stopped at once")
        if self.gone:
            return Ended("failed", f"{LOST}, while {clock.place}", clock)
        if code == -signal.SIGKILL:
            reason = f"the process was killed (signal 9) while {clock.place}, most likely for want of memory"
            return Ended("oom", reason, clock)
        how = f"signal {-code} ({_name(-code)})" if code < 0 else f"exit code {code}"
        end = os.fstat(self.log.fileno()).st_size
        start = max(self.begun, end - (1 << 16))
        lines = os.pread(self.log.fileno(), end - start, start).decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        return Ended("failed", f"the process ended with {how} while {clock.place}{last}", clock)

    def _error(self, error: dict) -> LabError:
        code, text = error["exit_code"], error["text"]
        if code > 128:  # a signal had it stop, this driver's or somebody else's
            self.stopped = self.stopped or code - 128
            return self._interrupted(text.removeprefix("interrupted: "))
        raised = KINDS.get(code, LabError)(text)
        return raised

    def _interrupted(self, reason: str) -> Ended:
        return Ended("interrupted", reason, self.clock, 128 + self.stopped)

    def _close(self) -> int:
        """Wait for the end of the process, which comes when it has nothing more to read -> its exit code."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            code = process.wait(LEAVING)
        except subprocess.TimeoutExpired:
            self._kill()
            code = process.wait()
        self._kill()  # what it left behind
        if self.ready is not None:
            self.ready.close()
        process.stdout.close()
        self._show(rest=True)
        self.process = None
        return code


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
