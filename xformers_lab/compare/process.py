"""The driver's side of the worker: a process that is asked one thing at a time, replaced when it died, and stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

from xformers_lab import config as configs
from xformers_lab.config import Config
from xformers_lab.train.interrupt import handling

# The worker imports from where the driver does. `-m` would put the working folder first, where a user's own copy.py
# would hide Python's.
START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_module(sys.argv[1], run_name='__main__')"


class Worker:
    """A worker process while the `with` lasts, in which the driver hears Ctrl-C and SIGTERM.

    stopped: the first signal, 0 for none. It is passed on to the process, which saves what it trains and ends; a
    second one kills it. From then on nothing is begun.
    """

    def __init__(self):
        self.stopped = 0
        self.process: subprocess.Popen | None = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed on exit, with the process)
        self.begun = 0  # where in the log the latest question begins
        self.signals = handling(self._stop)

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, kind, *rest):
        try:
            if self.process is not None:
                if kind is not None:
                    self.process.terminate()
                self._close()
        finally:
            self.log.close()
            self.signals.__exit__(None, None, None)

    def ask(self, what: str, cell: Config, heard: Callable[[dict], None], **more) -> dict:
        """The process's answer, a record; heard(words) of what it says before. Where it died its record says why."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        if self.stopped:
            return {"status": "interrupted", "reason": "not reached before the interruption"}
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.begun = os.fstat(self.log.fileno()).st_size
        try:
            self.process.stdin.write(json.dumps({"do": what, "config": configs.to_dict(cell), **more}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._died()
        for line in iter(self.process.stdout.readline, ""):
            if not line.endswith("\n"):  # it was killed while it spoke
                break
            said = json.loads(line)
            if "answer" not in said:
                heard(said)
                continue
            if said["answer"]["status"] == "interrupted":  # or it was asked by somebody else
                self.stopped = self.stopped or int(signal.SIGTERM)
            return said["answer"]
        return self._died()

    def _start(self) -> None:
        # Its own session: what a terminal sends reaches the driver alone, which passes it on once.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, "xformers_lab.compare.worker", *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )

    def _stop(self, number: int) -> None:
        again, self.stopped = self.stopped, self.stopped or number
        with contextlib.suppress(OSError):  # not print: a handler may interrupt another one
            os.write(2, b"\n" if again else b"\nstopping: what is under way saves itself; once more ends it at once\n")
        if self.process is not None:
            # Until it listens, while it imports or checks, SIGTERM ends it at once, whatever it is in the middle of.
            self.process.kill() if again else self.process.terminate()

    def _died(self) -> dict:
        code = self._close()
        if self.stopped:
            return {"status": "interrupted", "reason": "stopped at once: it goes on from what it had saved"}
        if code == -signal.SIGKILL:
            return {"status": "oom", "reason": "the process was killed (signal 9), most likely for want of memory"}
        self.log.seek(self.begun)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        return {
            "status": "failed",
            "reason": f"the process ended with {code}: {said[-1][:300] if said else 'no message'}",
        }

    def _close(self) -> int:
        """Wait for the end of the process, which comes when it has nothing more to read -> its exit code."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        return code
