"""Where experiments are, and what a file of them holds."""

import dataclasses
import hashlib
import inspect
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xformers_lab import spec
from xformers_lab.errors import UsageError, contained, nearest, said
from xformers_lab.experiment.claim import Claim, Study
from xformers_lab.experiment.findings import Finding
from xformers_lab.experiment.measured import Measured

_PACKAGE = pathlib.Path(__file__).parents[1]
# In a wheel they lie in the package, in a checkout beside it.
FOLDERS = (_PACKAGE / "experiments", _PACKAGE.parent / "experiments")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A file of experiments. question: the sentence that it begins with; studies: what runs, by name; judge: from the
    table of each study to findings."""

    name: str
    path: pathlib.Path
    question: str
    claim: Claim
    studies: Mapping[str, Study]
    judge: Callable[[Mapping[str, Measured]], Sequence[Finding]]

    @property
    def digest(self) -> str:
        """What identifies the text of the file, thresholds and all."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]

    @property
    def rule(self) -> str:
        """The code of the verdict."""
        return inspect.getsource(self.judge)


def folder() -> pathlib.Path:
    """The folder of the laboratory's own experiments; raises UsageError where this installation has none."""
    for path in FOLDERS:
        if any(path.glob("*.py")):
            return path
    raise UsageError(f"no experiments in {' or '.join(map(str, FOLDERS))}: install the package whole")


def names() -> list[str]:
    """The laboratory's own experiments."""
    return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> Experiment:
    """An experiment by its name, or by the path of a .py file of one's own; raises UsageError, which names the file,
    where there is none or it is no experiment."""
    path = spec.located(name, name) if name.endswith(".py") else folder() / f"{name}.py"
    if not path.is_file():
        if name.endswith(".py"):
            raise UsageError(f"{name}: no such file")
        raise UsageError(f'no experiment "{name}": {nearest(name, names(), "experiments")}')
    module = spec.run_file(path, str(path))
    question = inspect.cleandoc(module.__doc__ or "").strip()
    if not question:
        raise UsageError(f"{path}: begins with no docstring that asks the question")
    claim = _member(module, path, "CLAIM", Claim, 'Claim(says="...", ...)')
    studies = _member(module, path, "STUDIES", Mapping, '{"name": compare("key=value ..."), ...}')
    if not studies or not all(isinstance(study, Study) for study in studies.values()):
        raise UsageError(f"{path}: STUDIES holds something other than compare(...) and bench(...)")
    if any(study.needs_data for study in studies.values()) != bool(claim.data):
        raise UsageError(
            f'{path}: {{data}} in the words of a study and Claim(data={{"NAME": "what it is"}}) go together'
        )
    judge = _member(module, path, "judge", types.FunctionType, "a function from the tables to a list of findings")
    return Experiment(path.stem, path, question, claim, dict(studies), judge)


def lacking(experiment: Experiment, data: str | None) -> str:
    """What an experiment needs of the folder of --data and does not have, in words; empty where nothing is missing."""
    missing = {name: what for name, what in experiment.claim.data.items() if not (data and _there(data, name))}
    if not missing:
        return ""
    needed = " and ".join(f"{name} ({what})" for name, what in missing.items())
    return f"needs {needed}: " + (
        f"--data {data} has no such entry" if data else "give --data the folder that holds it"
    )


def _there(data: str, name: str) -> bool:
    return (pathlib.Path(data).expanduser() / name).exists()


def judged(experiment: Experiment, tables: Mapping[str, Measured]) -> list[Finding]:
    """The findings of an experiment; raises UsageError with the file and line where its rule cannot be applied."""
    try:
        with contained():
            findings = list(experiment.judge(tables))
    except UsageError as error:
        raise UsageError(f"{experiment.path}: judge: {error}") from error
    except Exception as error:
        raise UsageError(f"{experiment.path}: judge: {type(error).__name__}: {said(error)}") from error
    if not any(isinstance(finding, Finding) and finding.decides for finding in findings):
        raise UsageError(f"{experiment.path}: judge gives no finding with a threshold: use at_least or at_most")
    return findings


def _member(module: types.ModuleType, path: pathlib.Path, name: str, kind: type, wanted: str) -> Any:
    value = getattr(module, name, None)
    if not isinstance(value, kind):
        raise UsageError(f"{path}: {name} has to be {wanted}")
    return value
