"""The folder of a run: config.json, env.json, metrics.jsonl, result.json. Plain files are the truth.

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
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import filelock
import jax

from xformers_lab import __version__, files, hardware
from xformers_lab.errors import InUse, RunFailed, UsageError

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
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replace a JSON file in one go. NaN and infinities become null. Raises RunFailed where it cannot be written."""
    _replace(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    try:
        files.replace_text(path, text)
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from error


def read_json(path: pathlib.Path) -> dict | None:
    """The mapping in a file; None where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
    try:
        with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")
    except OSError as error:
        raise RunFailed(f"{run_dir / 'metrics.jsonl'}: cannot be written ({error.strerror})") from error


def read(run_dir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl in order of steps; a last line torn by a crash is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def cut(run_dir: pathlib.Path, step: int) -> list[dict]:
    """Keep the lines up to `step`, each step once -> these lines."""
    lines = list({line["step"]: line for line in read(run_dir) if line["step"] <= step}.values())
    _replace(run_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return lines


# ---- who runs, and where -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(run_dir: pathlib.Path) -> Iterator[None]:
    """This process alone works in the folder; raises InUse at once where another one does. A dead one's lock is
    the system's to release."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        owner = read_json(run_dir / "owner.json") or {}
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
        raise InUse(f"{run_dir}: {who}, is running this; wait for it, or stop it") from None
    except OSError as error:
        raise UsageError(f"{run_dir}: cannot be written ({error.strerror}); choose another folder with runs=") from None
    try:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(run_dir / "owner.json", {"pid": os.getpid(), "host": socket.gethostname(), "since": now})
        yield
    finally:
        (run_dir / "owner.json").unlink(missing_ok=True)
        lock.release()


def environment() -> dict:
    """What a result may depend on besides its config: versions, devices, allow-listed variables."""
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
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
