"""The worker's side: a process that does what its driver asks, one JSON line each, and answers with JSON lines.

{"do": "train.work.run", "with": {"config": ...}} calls that function of the package with a Tell and these arguments. On
the way it says what it is doing; the last line has the answer, or the error that came instead. SIGTERM ends the process
at once, or, while it trains, has it save first.
"""

import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from typing import Any, TextIO

from xformers_lab import cpu_speed, program_cache
from xformers_lab.errors import LabError, UsageError, foreign, in_words, missing_device, stopped_by
from xformers_lab.terminal import log_in_lines

# Seconds that a worker has to save itself and end, once its driver is gone.
ALONE = 600.0


class Tell:
    """Messages to the driver; busy: it waits for an answer; alone: it is gone, so what trains should save itself."""

    def __init__(self, replies: TextIO):
        self.replies, self.busy, self.alone = replies, False, False

    def __call__(self, **message: Any) -> None:
        try:
            self.replies.write(json.dumps(message) + "\n")
            self.replies.flush()
        except BrokenPipeError:
            self.alone = True

    def doing(self, words: str, **more: Any) -> None:
        """Say what is being done, which is the sign of life that limits look at; see `limits`."""
        self(doing=words, **more)


def perform(what: str, tell: Tell, **arguments: Any) -> Any:
    """Call the function of the package that `what` names, "train.work.run"; -> its answer."""
    module, _, name = what.rpartition(".")
    return getattr(importlib.import_module(f"xformers_lab.{module}"), name)(tell, **arguments)


def main() -> int:
    """Answer questions until there are no more; -> the exit code."""
    # What a library prints must not mix with the answers, and what it reads not with the questions.
    replies, questions = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log_in_lines()
    program_cache.use()
    cpu_speed.keep_memory()
    tell = Tell(replies)
    threading.Thread(target=_end_alone, args=(questions.fileno(), tell), daemon=True).start()
    for line in questions:
        question = json.loads(line)
        answer, error, tell.busy = None, None, True
        try:
            answer = perform(question["do"], tell, **question["with"])
        except LabError as caught:
            error = {"exit_code": caught.exit_code, "text": str(caught)}
        except BaseException as caught:
            # An exit that is no Exception, nor a signal's, is none of ours.
            exits = "" if isinstance(caught, Exception) else in_words(caught)
            if (code := stopped_by(caught)) is not None:
                error = {"exit_code": code, "text": "stopped at once"}
            elif reason := missing_device() or foreign(caught) or exits:
                error = {"exit_code": UsageError.exit_code, "text": reason}
            else:
                traceback.print_exc()
                text = "this is a bug of the laboratory, not of your input; the lines above say where"
                error = {"exit_code": 1, "text": text}
        sys.stderr.flush()
        tell.busy = False
        tell(**({"answer": answer} if error is None else {"error": error}))
        if error and error["exit_code"] > 128:  # a signal: from here on nothing is begun
            return 1
    return 0


def _end_alone(questions: int, tell: Tell) -> None:
    """End a busy worker when nobody is left who asked: the driver's end of the pipe closes with the driver. It ends as
    the driver would have ended it, and leaves no run locked for long: at once or, while it trains, when it has saved
    itself. One that hangs is not waited for."""
    watched = select.poll()
    watched.register(questions, 0)  # hanging up alone
    watched.poll()
    tell.alone = True
    if tell.busy:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ALONE)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
