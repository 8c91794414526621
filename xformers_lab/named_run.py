"""Which run a word means; and the run whose parameters another one begins with, as a config names it: its folder, and
which of its checkpoints.

A user names the folder, `runs/lm/0123456789ab`, or says which run in another way that `picked` knows. From then on the
config keeps `runs/lm/0123456789ab@89abcdef0123`, where the second part stands for what the newest checkpoint holds. So
an id goes by the parameters and not by where they lie, a stored config means what it meant, and nothing reads the other
run but the one start that takes its parameters.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

from xformers_lab import spec
from xformers_lab.errors import UsageError

LAST = "last"  # the word for the run that began last
RUNS = "runs"  # the folder of runs, where nothing else is said
_NAMED = re.compile(r"(.+)@([0-9a-f]{12})", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Known:
    """What a run is called by: its folder, its ids (the folder's name, and its own where somebody renamed that), and
    its `name`, if it has one."""

    folder: pathlib.Path
    ids: Sequence[str]
    name: str | None


def picked(word: str, known: Sequence[Known], runs: pathlib.Path, where: str = "") -> pathlib.Path:
    """The folder of the run that a word means: a folder, `last`, a name, an id or its beginning, in this order.

    Args:
        known: the runs of the folder `runs`, the one that began last at the end.
        where: what messages call the word; itself, if nothing is said.

    Raises UsageError where the word means none or several.
    """
    where = where or word
    if word == LAST:
        if not known:
            raise UsageError(f"no run in {runs} yet; run xlab train, or name its folder with --runs")
        return known[-1].folder
    folder = spec.located(word, where)
    if (folder / "config.json").is_file():
        return folder
    called = [run for run in known if run.name == word]
    if len(called) > 1:
        raise UsageError(
            f"{where}: {len(called)} runs have this name ({_listed(called)}); say which by its id or folder"
        )
    if called:
        return called[0].folder
    if folder.is_dir():
        raise UsageError(f"{where}: no run there (a run's folder holds config.json)")
    alike = [run for run in known if any(identity.startswith(word) for identity in run.ids)]
    exact = [run for run in alike if word in run.ids]
    if len(exact or alike) == 1:
        return (exact or alike)[0].folder
    if alike:
        raise UsageError(f"{where}: {len(alike)} runs begin so ({_listed(alike)}); give more of the id, or the folder")
    raise UsageError(f"{where}: no run in {runs} has this name or id; xlab runs --runs {runs} lists them")


def folder(word: str, runs: pathlib.Path | str = RUNS, where: str = "") -> pathlib.Path:
    """`picked` among the runs that a folder holds."""
    runs = pathlib.Path(runs)
    direct = spec.located(word, where or word)
    if (direct / "config.json").is_file():  # the others need not be read
        return direct
    configs = sorted(runs.glob("*/*/config.json"), key=lambda path: path.stat().st_mtime)
    return picked(word, [Known(path.parent, [path.parent.name], _name(path)) for path in configs], runs, where)


def _name(config: pathlib.Path) -> str | None:
    """The name in a stored config; None where it cannot be read, which is for its readers to say."""
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("name")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None


def _listed(runs: Iterable[Known]) -> str:
    folders = [str(run.folder) for run in runs]
    return ", ".join(folders[:4]) + (f" and {len(folders) - 4} more" if len(folders) > 4 else "")


def named(text: str, where: str) -> str:
    """`folder@checkpoint` of a run, which a folder or, among those in RUNS, another word names; as it is where it names
    the checkpoint already. Raises UsageError."""
    text = spec.bare(text.strip())
    if _NAMED.fullmatch(text):
        return text
    place = folder(text, where=where)
    known = _checkpoints(place)
    if not known:
        raise UsageError(f"{where}: that run holds no checkpoint yet; train it first, with xlab resume {place}")
    return f"{place}@{known[max(known)][1]}"


def parts(text: str) -> tuple[str, str]:
    """The folder and the checkpoint that a value names."""
    match = _NAMED.fullmatch(text)
    assert match is not None, f"{text}: no value that `named` gives"
    return match[1], match[2]


def found(text: str) -> pathlib.Path:
    """The folder of the checkpoint that a value names; raises UsageError where it is not there any more."""
    folder, wanted = parts(text)
    for path, digest in _checkpoints(pathlib.Path(folder)).values():
        if digest == wanted:
            return path
    there = pathlib.Path(folder, "config.json").is_file()
    why = "its checkpoints have changed since" if there else "there is no run any more"
    mend = f"init={folder} takes what is there now, as a run of its own" if there else "give that folder back"
    raise UsageError(f"init={text}: {why}; {mend}")


def _checkpoints(folder: pathlib.Path) -> dict[int, tuple[pathlib.Path, str]]:
    """The checkpoints of a run by their step: the folder of each, and a hash of its manifest, which has the sha256 of
    every file."""
    manifests = {}
    for path in folder.glob("checkpoints/*/MANIFEST.json"):
        if re.fullmatch("[0-9]+", path.parent.name):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            manifests[int(path.parent.name)] = path.parent, digest
    return manifests
