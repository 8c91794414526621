"""Starts the child of a choice, and says how it ended."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

TESTS = pathlib.Path(__file__).parents[1]
# The child's exit code where something does not hold, which its last line says.
BROKEN = 3
# Most choices take a tenth of it or less where nothing is compiled yet; the rest is for machines that are busy.
LIMIT = 400.0


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended: fault is None where all held, else what did not; words: what it measured."""

    fault: str | None
    words: str
    seconds: float


def run(shelf: str, choice: str, *options: str, limit: float = LIMIT) -> Ended:
    """Check a choice in a process of its own, compiled as users compile, for at most `limit` seconds."""
    command = [sys.executable, "-X", "faulthandler", "-m", "default_flags.child", shelf, choice, *options]
    # Whatever the tests set for themselves; the cache of compilations stays, for its entries are told apart by flags.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    begun = time.perf_counter()
    try:
        ended = subprocess.run(
            command, cwd=TESTS, env=environment, timeout=limit, capture_output=True, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired as late:
        lines = (late.stdout or b"").decode(errors="replace").splitlines()
        return Ended(f"did not end in {limit:g} s: {_last(lines)}", "", time.perf_counter() - begun)
    seconds, lines = time.perf_counter() - begun, ended.stdout.splitlines()
    if ended.returncode == 0:
        return Ended(None, _last(lines), seconds)
    if ended.returncode == BROKEN:
        return Ended(_last(lines), "", seconds)
    how = f"crashed ({_name(-ended.returncode)})" if ended.returncode < 0 else "raised an exception"
    return Ended(f"{how}: {_last(lines)}\n{_end(ended.stderr)}", "", seconds)


def _last(lines: list[str]) -> str:
    return lines[-1] if lines else "before it began"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(text: str) -> str:
    return "\n".join(text.splitlines()[-20:])
