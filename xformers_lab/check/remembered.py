"""Verdicts of the kit that outlive the process: a bench need not wait for a check whose sources have not changed."""

import functools
import hashlib
import json
import os
import pathlib

import jax

from xformers_lab import spec
from xformers_lab.check import run

_PACKAGE = pathlib.Path(spec.__file__).parent


def verdict(choice: str) -> dict:
    """`run.check(choice)` as a dict, from the cache where the same sources were checked before.

    The cache is a file in $XDG_CACHE_HOME (default ~/.cache); one that cannot be read or written is done without.
    """
    path = _folder() / f"{_key(choice)}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        report = run.check(choice).to_dict()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(report))
        temporary.replace(path)
    except OSError:
        pass
    return report


def _folder() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "xformers_lab" / "checks"


def _key(choice: str) -> str:
    """Everything a verdict depends on: the choice, its source, the package's, the properties, jax and the device."""
    about = [
        str(spec.resolve("attention", choice)),
        spec.digest("attention", choice),
        _sources(),
        [holds.__name__ for holds in run.PROPERTIES],
        jax.__version__,
        jax.devices()[0].device_kind,
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=1)
def _sources() -> str:
    files = sorted([*_PACKAGE.glob("*.py"), *_PACKAGE.glob("attention/**/*.py"), *_PACKAGE.glob("check/*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
