"""The command line. Nothing here imports jax before it must: `xlab --help` answers at once.

`parser.COMMANDS` has every command; what it takes is declared beside the function that runs it.
"""

import os
import sys
import traceback

from xformers_lab.errors import LabError, UsageError, missing_device
from xformers_lab.supervise.interrupt import ending


def main(arguments: list[str] | None = None) -> int:
    """Run one command; -> its exit code (0 ok, 1 our bug, 2 usage, 3 run failed, 4 integrity, 5 some cells failed)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with ending(" ".join(["xlab", *arguments[:1]])):
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    from xformers_lab.cli.parser import locate, parsed  # here, for a signal may come while it imports

    chosen = parsed(arguments)
    try:
        locate(chosen)
        return chosen.run(chosen)
    except LabError as error:
        print(f"xlab {chosen.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"xlab {chosen.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception:
        if reason := missing_device():
            print(f"xlab {chosen.command}: {reason}", file=sys.stderr)
            return UsageError.exit_code
        traceback.print_exc()
        print("xlab: this is a bug of the laboratory, not of your input; the lines above say where", file=sys.stderr)
        return 1
