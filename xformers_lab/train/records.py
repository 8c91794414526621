"""The folder of a run: config.json, env.json, metrics.jsonl, result.json. Plain files are the truth. Needs no jax, but
for `environment`. Of several processes that train one run the first alone writes; the others go on without a word.

JSON files are replaced in one go; metrics.jsonl is appended, one line per step, and cut back on resume to the step of
the checkpoint, so that each step stands in it once.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import platform
import socket
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

import filelock

from xformers_lab import __version__, files, hardware
from xformers_lab.errors import InUse, RunFailed, UsageError
from xformers_lab.train import hosts

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets")
# Only these variables are recorded: an environment holds secrets.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_X64",
    "JAX_NUM_CPU_DEVICES",
    "JAX_PLATFORMS",
    "OMP_NUM_THREADS",
    "PJRT_NPROC",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replace a JSON file in one go. NaN and infinities become null. Raises RunFailed where it cannot be written, or
    the run's folder that it belongs in is gone."""
    _replace(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    if not hosts.first():
        return
    still_there(path.parent)
    try:
        files.replace_text(path, text, folder=False)
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from error


def read_json(path: pathlib.Path) -> dict | None:
    """The mapping in a file; None where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def finite(value: Any) -> Any:
    """The same with every float that JSON cannot hold as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- metrics.jsonl -----------------------------------------------------------------------------------------------


def append(run_dir: pathlib.Path, line: dict) -> None:
    """Add a line to metrics.jsonl; raises RunFailed where it cannot be written."""
    if not hosts.first():
        return
    still_there(run_dir)
    path = run_dir / "metrics.jsonl"
    try:
        # A run that is under way makes no new file: one that is gone took the lines before this one with it.
        made = 0 if works_in(run_dir) else os.O_CREAT
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | made, 0o666)
        with os.fdopen(handle, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from error


def read(run_dir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole, in order of steps; see `missing`. Raises UsageError where the file
    cannot be read."""
    path = run_dir / "metrics.jsonl"
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    lines = [line for text in texts if (line := line_of(text)) is not None]
    return sorted(lines, key=lambda line: line["step"])


def line_of(text: str) -> dict | None:
    """A whole line of metrics.jsonl; None for any other text."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if _is_line(line) else None


def _is_line(line: Any) -> bool:
    number = lambda key: line[key] is None or type(line[key]) in (int, float)
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and line["step"] >= 1
        and "loss" in line
        and all(number(key) for key in ("loss", "seconds", "validation_loss", "validation_metric") if key in line)
    )


def missing(run_dir: pathlib.Path, step: int) -> str:
    """The steps up to `step` that metrics.jsonl has no whole line of, in words: "3, 7 to 9"; empty where all are there.

    The lines of a checkpoint are on the disk before it, so that a crash loses none of them.
    """
    there = {line["step"] for line in read(run_dir)}
    spans: list[list[int]] = []
    for each in (each for each in range(1, step + 1) if each not in there):
        if spans and spans[-1][1] == each - 1:
            spans[-1][1] = each
        else:
            spans.append([each, each])
    words = [f"{first} to {last}" if last > first else f"{first}" for first, last in spans]
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def cut(run_dir: pathlib.Path, step: int) -> list[dict]:
    """Keep the lines up to `step`, each step once -> these lines."""
    lines = list({line["step"]: line for line in read(run_dir) if line["step"] <= step}.values())
    write_lines(run_dir, lines)
    return lines


def write_lines(run_dir: pathlib.Path, lines: Iterable[dict]) -> None:
    """Have metrics.jsonl hold these lines alone."""
    _replace(run_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


# ---- who runs, and where -----------------------------------------------------------------------------------------


_HELD: dict[pathlib.Path, int] = {}  # folders that this process works in -> an open descriptor of each
_WORDS: list[str] = []  # what its command was given


def typed(words: Sequence[str]) -> None:
    """Have owner.json tell the words that the command of this process was given; see `refuse_if_typed`."""
    _WORDS[:] = words


@contextlib.contextmanager
def locked(run_dir: pathlib.Path) -> Iterator[None]:
    """This process alone works in the folder; raises InUse where another one does. A dead one's lock is
    the system's to release. Meanwhile `still_there` knows the folder again."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
        lock.acquire(timeout=0.2, poll_interval=0.05)  # `refuse_if_in_use` of another process holds it for a moment
    except filelock.Timeout:
        raise _in_use(run_dir) from None
    except OSError as error:
        raise UsageError(f"{run_dir}: cannot be written ({error.strerror}); choose another folder with runs=") from None
    try:
        _HELD[run_dir] = os.open(run_dir, os.O_RDONLY)  # while it is open no other folder gets its number
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "words": _WORDS}
        write_json(run_dir / "owner.json", owner)
        yield
    finally:
        with contextlib.suppress(RunFailed):
            still_there(run_dir)
            (run_dir / "owner.json").unlink(missing_ok=True)
        with contextlib.suppress(KeyError):
            os.close(_HELD.pop(run_dir))
        lock.release()


def refuse_if_in_use(run_dir: pathlib.Path) -> None:
    """Raises InUse where another process works in the folder; nothing is made there."""
    if not (run_dir / ".lock").is_file():
        return
    try:
        with _lock(run_dir):
            pass
    except filelock.Timeout:
        raise _in_use(run_dir) from None
    except OSError:  # `locked` says why
        pass


def works_in(run_dir: pathlib.Path) -> bool:
    """Whether this process has `locked` the folder."""
    return run_dir in _HELD


def refuse_if_typed(words: Sequence[str], runs: pathlib.Path) -> None:
    """Raises UsageError where a process that was given the same words works in a run's folder under `runs`: which one
    they stand for, imports alone tell. Words that name files are left to these, since what is in them may change."""
    words = list(words)
    if any("@" in word or "/" in word or ".py" in word for word in words if not word.startswith("runs=")):
        return
    for path in runs.glob("*/*/owner.json"):
        if (read_json(path) or {}).get("words") == words:
            refuse_if_in_use(path.parent)


def still_there(run_dir: pathlib.Path) -> None:
    """Raises RunFailed where a folder that is `locked` was moved, deleted or replaced meanwhile: what is written to its
    path now would be a part of nothing."""
    if not works_in(run_dir):
        return
    held = os.fstat(_HELD[run_dir])
    with contextlib.suppress(OSError):
        now = run_dir.stat()
        if (now.st_dev, now.st_ino) == (held.st_dev, held.st_ino):
            return
    raise RunFailed(
        f"{run_dir}: was moved, replaced or deleted while the run was in it; what was saved before went with it "
        "(xlab resume, with its new place, goes on from there)"
    )


def _lock(run_dir: pathlib.Path) -> filelock.BaseFileLock:
    return filelock.FileLock(run_dir / ".lock", timeout=0)


def _in_use(run_dir: pathlib.Path) -> InUse:
    owner = read_json(run_dir / "owner.json") or {}
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
    return InUse(f"{run_dir}: {who}, is running this; wait for it, or stop it")


def environment() -> dict:
    """What a result may depend on besides its config: versions, devices, allow-listed variables."""
    import jax  # here, since who is refused a folder that is in use should not wait for it

    devices = jax.devices()
    packages = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "python": platform.python_version(),
        "packages": {"xformers_lab": __version__, **packages},
        "platform": platform.platform(),
        "cpu": hardware.processor(),
        "cores": hardware.cores(),
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": hosts.processes(),
        "hosts": hosts.machines(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
