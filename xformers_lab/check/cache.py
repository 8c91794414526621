"""Verdicts of the kit that outlive the process: a bench need not wait for a check whose sources have not changed."""

import contextlib
import functools
import hashlib
import json
import pathlib
import re

import jax

from xformers_lab import files, spec
from xformers_lab.check import run

_PACKAGE = pathlib.Path(spec.__file__).parent


def verdict(choice: str) -> dict:
    """`run.check(choice)` as a dict, from the cache where the same sources were checked before."""
    return known(choice) or keep(choice, run.check(choice).to_dict())


def refusal(choice: str) -> str | None:
    """Why the kit refuses a mechanism, None where it passes. The package's own, which its tests check, are looked up
    alone, and pass where they have not been checked here."""
    try:
        report = verdict(choice) if unproven(choice) else known(choice)
    except Exception as error:
        return f"its check ended with {type(error).__name__}: {error}".splitlines()[0][:500]
    failed = [failure["property"] for failure in report["failed"]] if report else []
    names = ", ".join(failed[:3]) + (f" and {len(failed) - 3} more" if len(failed) > 3 else "")
    return f"fails its check: {names}; see xlab check {choice}" if failed else None


def unproven(choice: str) -> bool:
    """Whether a mechanism comes from outside the package and has not been checked yet."""
    return spec.digest("attention", choice) is not None and known(choice) is None


def known(choice: str) -> dict | None:
    """The verdict on these very sources, None where they have not been checked.

    The cache is a file in $XDG_CACHE_HOME (default ~/.cache); one that cannot be read or written is done without.
    """
    try:
        return json.loads((files.cache("checks") / f"{_key(choice)}.json").read_text())
    except (OSError, ValueError):
        return None


def keep(choice: str, report: dict) -> dict:
    """Remember a verdict; -> it."""
    with contextlib.suppress(OSError):
        files.replace_text(files.cache("checks") / f"{_key(choice)}.json", json.dumps(report))
    return report


def forget(choice: str) -> None:
    """Drop the verdict on these very sources."""
    with contextlib.suppress(OSError):
        (files.cache("checks") / f"{_key(choice)}.json").unlink(missing_ok=True)


def _key(choice: str) -> str:
    """Everything a verdict depends on: the choice, its source, the package's, the properties, jax and the device."""
    resolved, digest = spec.resolve("attention", choice), spec.digest("attention", choice)
    about = [
        str(spec.Choice(digest or resolved.name, resolved.options)),  # a file's verdict goes with it, wherever it lies
        _sources(resolved.name),
        [holds.__name__ for holds in run.PROPERTIES],
        jax.__version__,
        jax.devices()[0].device_kind,
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=256)
def _sources(name: str) -> str:
    """A hash of what the lab runs a mechanism with, and of the mechanisms whose code it uses."""
    shelf = _PACKAGE / "attention"
    folders = ("*.py", "nn/*.py", "check/*.py", "attention/_*/**/*.py")
    files = {file for pattern in folders for file in _PACKAGE.glob(pattern)} | {shelf / "__init__.py"}
    used = [shelf / f"{name}.py"]
    while used:
        file = used.pop()
        if file.is_file() and file not in files:
            files.add(file)
            used += [
                shelf / f"{other}.py"
                for other in re.findall(r"xformers_lab\.attention\.(\w+) import", file.read_text())
            ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
