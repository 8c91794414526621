"""The command line. Nothing here imports jax before it must: `xlab --help` answers at once.

`parser.COMMANDS` has every command; what it takes is declared beside the function that runs it.
"""

import io
import os
import sys
import traceback

from xformers_lab import cpu_speed, program_cache
from xformers_lab.errors import LabError, UsageError, foreign, in_words, missing_device
from xformers_lab.supervise.interrupt import ending
from xformers_lab.terminal import LINES, log_in_lines, message, visible


def main(arguments: list[str] | None = None) -> int:
    """Run one command; -> its exit code (0 ok, 1 our bug, 2 usage, 3 run failed, 4 integrity, 5 some cells failed)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an encoding has no sign for is shown escaped too
            stream.reconfigure(errors="backslashreplace")
    log_in_lines()
    program_cache.use()
    cpu_speed.keep_memory()
    arguments = sys.argv[1:] if arguments is None else arguments
    with ending(message(" ".join(["xlab", *arguments[:1]]))):
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    from xformers_lab.cli.parser import locate, parsed  # here, for a signal may come while it imports

    chosen = parsed(arguments)
    say = lambda text: print(f"xlab {chosen.command}: {message(text)}", file=sys.stderr)
    try:
        locate(chosen)
        return chosen.run(chosen)
    except LabError as error:
        say(error)
        return error.exit_code
    except BaseException as error:
        # rich makes an exit of a pipe that nobody reads any more.
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 141
        if type(error) is KeyboardInterrupt:
            say("interrupted")
            return 130
        # An exit that is no Exception is none of ours.
        if reason := missing_device() or foreign(error) or ("" if isinstance(error, Exception) else in_words(error)):
            say(reason)
            return UsageError.exit_code
        print(visible(traceback.format_exc(), LINES), file=sys.stderr)
        print("xlab: this is a bug of the laboratory, not of your input; the lines above say where", file=sys.stderr)
        return 1
