"""One job, wherever an engine brought it: a payload that is JSON in, what came of it as JSON out. Needs no jax.

What it does is done in a process of its own under the limits of `supervise`, so that a hang and a crash have their
reasons there too. `python -m xformers_lab.engines._job` does the job on stdin, for an engine that has no more than a
shell.
"""

import json
import os
import pathlib
import secrets
import socket
import sys
from collections.abc import Mapping
from typing import Any

from xformers_lab import __version__, files
from xformers_lab.engines import Outcome, _host
from xformers_lab.engines.local import SIDE_BY_SIDE
from xformers_lab.errors import RunFailed, in_words
from xformers_lab.supervise.process import Ended, Worker

MARK = ".shared"  # in the folder of runs: what only a host that shares it can read
# Variables that change results: what the command has of them, jobs have.
DECISIVE = ("JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")


def payload(do: str, arguments: Mapping[str, Any], *, stall: float | None) -> dict[str, Any]:
    """A job: a function of the package by its name, "compare.cell.train", and its arguments; see `Worker.ask`."""
    return {"do": do, "with": dict(arguments), "stall": stall}


def sent(job: Mapping[str, Any], runs: pathlib.Path, *, timed: bool) -> dict[str, Any]:
    """The job as another host can do it, in this one's working folder where it is there too. Raises RunFailed where
    the folder of runs cannot be written."""
    mark = runs.absolute() / MARK
    try:
        if not mark.is_file():
            files.replace_text(mark, secrets.token_hex(16))
        token = mark.read_text()
    except OSError as error:
        raise RunFailed(f"{mark}: cannot be written ({error.strerror})") from None
    return {
        **job,
        "timed": timed,
        "version": __version__,
        "folder": str(pathlib.Path.cwd()),
        "runs": str(runs.absolute()),
        "token": token,
        "environment": {name: os.environ[name] for name in DECISIVE if name in os.environ},
    }


def perform(text: str) -> str:
    """Do what `sent` made; -> what `outcome` reads. Every error is told in it."""
    host = socket.gethostname()
    try:
        return json.dumps({"host": host, **_performed(json.loads(text), host)})
    except Exception as error:
        return json.dumps({"host": host, "ended": {"status": "failed", "reason": f"on {host}: {in_words(error)}"}})


def written(text: str, path: str) -> None:
    """`perform`, for an engine that takes no answer: it is written to a file."""
    files.replace_text(pathlib.Path(path), perform(text))


def outcome(handle: str, text: str) -> Outcome:
    """What `perform` said of a job."""
    said = json.loads(text)
    return Outcome(handle, said.get("answer"), host=said["host"], unfit=said.get("unfit", ""), ended=said.get("ended"))


def _performed(job: Mapping[str, Any], host: str) -> dict[str, Any]:
    if reason := _unfit(job, host):
        return {"unfit": reason}
    environment = {**({} if job["timed"] else SIDE_BY_SIDE), **job["environment"]}
    with (
        _host.held(alone=job["timed"]) as lock,
        Worker(shown=False, environment=environment, folder=job["folder"], inherited=[lock]) as worker,
    ):
        try:
            return {"answer": worker.ask(job["do"], stall=job["stall"], **job["with"])}
        except Ended as ended:
            return {"ended": ended.record}


def _unfit(job: Mapping[str, Any], host: str) -> str:
    """Why no job can be done on this host, in words; empty where it can."""
    if job["version"] != __version__:
        return f"{host} has xformers_lab {__version__}, and this command {job['version']}: install the same one there"
    try:
        token = (pathlib.Path(job["runs"]) / MARK).read_text()
    except OSError:
        token = None
    if token != job["token"]:
        return (
            f"{host} does not see the folder of runs {job['runs']} as it is here: name one that all hosts share with "
            "runs="
        )
    if not pathlib.Path(job["folder"]).is_dir():
        return f"{host} has no folder {job['folder']}, where this command works: start it in one that all hosts share"
    return ""


if __name__ == "__main__":
    print(perform(sys.stdin.read()))
