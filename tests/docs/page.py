"""Runs the blocks of a page, which its input has as JSON, in one process: JAX starts once for a whole page.

Commands are functions of this process, and what they ask a worker's is done here too; tests/supervise and others look
at commands with a process each.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any


class Wrong(Exception):
    """A line that did not end as the page says; what it wrote."""


def inline(self, what: str, heard=None, *, stall=None, limit=None, **arguments: Any) -> Any:
    from xformers_lab.supervise.worker import Tell, perform

    return perform(what, Tell(io.StringIO()), **arguments)


@contextlib.contextmanager
def written() -> Iterator[list[str]]:
    """What is written to stdout and stderr meanwhile, by whatever code: two texts, there at the end."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = [(number, os.dup(number)) for number in (1, 2)]
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))


def command(line: str) -> None:
    """Run one line; raises Wrong where it does not end as it says, or with a traceback."""
    expected = int(code[1]) if (code := re.search(r"# exit code (\d+)$", line)) else 0
    words = shlex.split(line, comments=True)
    with written() as texts:
        if words[0] == "xlab":
            ended = in_process(words[1:])
        else:
            ended = subprocess.run(["bash", "-c", line], check=False).returncode
    if ended != expected or "Traceback" in texts[1]:
        raise Wrong(f"{line}\nexit code {ended}\n" + "\n".join(texts))


def in_process(words: list[str]) -> int:
    from xformers_lab.cli import main

    try:
        return main(words)
    except SystemExit as left:  # argparse's own
        return left.code if isinstance(left.code, int) else int(left.code is not None)


def python(text: str) -> None:
    """Run a block as a script that lies in this folder."""
    with written() as texts:
        sys.path.insert(0, os.getcwd())
        try:
            exec(compile(text, "block", "exec"), {"__name__": "__main__"})
            failed = False
        except BaseException:
            traceback.print_exc()
            failed = True
        finally:
            sys.path.pop(0)
    if failed:
        raise Wrong("\n".join([text, *texts]))


def main() -> int:
    from xformers_lab.supervise.process import Worker

    Worker.ask = inline
    for kind, text, file in json.load(sys.stdin):
        try:
            if kind == "file":
                pathlib.Path(file).write_text(text)
            else:
                (command if kind == "command" else python)(text)
        except Wrong as wrong:
            print(wrong, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
