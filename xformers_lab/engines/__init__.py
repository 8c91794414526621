"""Where jobs run: `--engine local`, `--engine ray`, `--engine slurm`, or a file of your own. Needs no jax.

An engine is a file of this folder, or a .py file anywhere, with a class `Engine` (see `Engine` here). Its options are
the keyword arguments of its constructor, `--engine slurm:partition=gpu:minutes=60`. A job is a payload that is JSON
throughout: the name of a function of the package, what it is called with, and where (see `_job`). An engine moves it
and its answer, and says when it was lost; what a job is for, whether it is tried again, and which row comes of it, is
none of its concern. A file may name PACKAGE, what it needs, and EXTRA, the extra that installs it.
"""

import dataclasses
import importlib
import importlib.util
import pathlib
import pkgutil
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from xformers_lab import spec
from xformers_lab.errors import UsageError, nearest
from xformers_lab.supervise.process import Worker

DEFAULT = "local"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an engine is told. worker: the command's own, which hears signals and has compiled what was probed; jobs: at
    most so many at once, None for as many as there are hosts."""

    worker: Worker
    jobs: int | None = None

    @property
    def timed(self) -> bool:
        """Whether each job has its host to itself, so that its times count."""
        return self.jobs is None or self.jobs == 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job came to its end: with an answer, or without one, `lost`, and then why, in words. host: where it ran;
    unfit: why that place can run no job at all; ended: {"status", "reason", ...} where the job's own process ended
    before it answered."""

    handle: str
    answer: Any = None
    lost: str = ""
    host: str = ""
    unfit: str = ""
    ended: Mapping | None = None


Told = Callable[[str, dict], None]


class Engine(Protocol):
    """Runs jobs somewhere, from one thread of the caller's.

    setting: what it was told; where `setting.timed`, no two jobs share a host. where: in words, "on 2 hosts of the Ray
    cluster at ...", empty for here. remote: whether jobs run elsewhere than under this process, so that folders must be
    shared and payloads made ready for it (`_job.sent`). `submit` and `ended` raise RunFailed where it is gone for good.
    """

    setting: Setting
    where: str
    remote: bool

    def room(self) -> int:
        """How many more jobs it would begin now."""
        ...

    def submit(self, payload: Mapping[str, Any]) -> str:
        """Have a job run; -> its handle. It is begun in the order of submission."""
        ...

    def ended(self, seconds: float, told: Told) -> list[Outcome]:
        """What has come to its end since the last time; waits up to so many seconds for the first, or, where jobs run
        in this very thread, until one is over. told(handle, message) gets what jobs say on their way, by an engine that
        hears it."""
        ...

    def cancel(self, *, insisted: bool = False) -> None:
        """Have all jobs save themselves and end, or end at once if `insisted`; `ended` tells of them as ever."""

    def close(self) -> None:
        """Let go of everything, jobs too; no more is asked."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An engine as the command names it, typed, before it is opened."""

    name: str
    build: Callable[..., Engine]
    options: Mapping[str, Any]
    jobs: int | None
    flags: Sequence[str] = ()  # of the command that say the same

    def open(self, worker: Worker) -> Engine:
        """The engine, made of its setting and its options; raises UsageError where it cannot be reached, within a time
        that it says."""
        return self.build(Setting(worker, self.jobs), **self.options)

    @property
    def alone(self) -> bool:
        """Whether jobs run here, one at a time, so that what is timed here is timed for them."""
        return self.name == DEFAULT and self.jobs in (None, 1)


def names() -> list[str]:
    """What --engine may say beside the path of a file."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def chosen(text: str = DEFAULT, address: str | None = None, jobs: int | None = None) -> Chosen:
    """What --engine, --address and -j say; raises UsageError, before anything is imported that an engine needs."""
    where = f"--engine {text}"
    if jobs is not None and jobs < 1:
        raise UsageError(f"-j {jobs}: at least 1")
    choice = spec.parse(text, where)
    module = _module(choice.name, where)
    entry: Any = getattr(module, "Engine", None)
    if not isinstance(entry, type):
        raise UsageError(f"{where}: {choice.name} defines no class Engine")
    declared = spec.options(entry)
    options = dict(choice.options)
    if address is not None:
        if "address" not in declared:
            raise UsageError(f"--address {address}: --engine {choice.name} has no address; --engine ray has")
        options["address"] = address
    if unknown := options.keys() - declared.keys():
        known = nearest(min(unknown), declared, "options") if declared else "it has no options"
        raise UsageError(f'{where}: {choice.name} has no option "{min(unknown)}": {known}')
    typed = {key: spec.coerce(value, declared[key].type, f'{where}: "{key}"') for key, value in options.items()}
    _require(module, choice.name)
    return Chosen(choice.name, entry, typed, jobs, _flags(text, address, jobs))


def _module(name: str, where: str) -> types.ModuleType:
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    if not name.endswith(".py"):
        raise UsageError(f'{where}: no engine "{name}": {nearest(name, names())}; or the path of a .py file')
    path = spec.located(name, where)
    if not path.is_file():
        raise UsageError(f'{where}: no file "{name}"')
    return spec.run_file(pathlib.Path(path), where)


def _require(module: types.ModuleType, name: str) -> None:
    package, extra = getattr(module, "PACKAGE", None), getattr(module, "EXTRA", None)
    if package is None or package in sys.modules or importlib.util.find_spec(package) is not None:
        return
    how = f"pip install 'xformers_lab[{extra}]'" if extra else f"pip install {package}"
    raise UsageError(f"--engine {name} needs {package}: {how}")


def _flags(engine: str, address: str | None, jobs: int | None) -> list[str]:
    said = [f"--engine={engine}"] if engine != DEFAULT else []
    said += [f"--address={address}"] if address is not None else []
    return [*said, *([f"-j{jobs}"] if jobs is not None else [])]
