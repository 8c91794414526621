"""The run whose parameters another one begins with, as a config names it: its folder, and which of its checkpoints.

A user names the folder, `runs/lm/0123456789ab`. From then on the config keeps `runs/lm/0123456789ab@89abcdef0123`,
where the second part stands for what the newest checkpoint holds. So an id goes by the parameters and not by where
they lie, a stored config means what it meant, and nothing reads the other run but the one start that takes its
parameters.
"""

import hashlib
import pathlib
import re

from xformers_lab import spec
from xformers_lab.errors import UsageError

_NAMED = re.compile(r"(.+)@([0-9a-f]{12})", re.DOTALL)


def named(text: str, where: str) -> str:
    """`folder@checkpoint` of a folder; as it is where it names the checkpoint already. Raises UsageError."""
    text = spec.bare(text.strip())
    if _NAMED.fullmatch(text):
        return text
    folder = spec.located(text, where)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{where}: no run there; name the folder of one (it holds config.json), or none")
    known = _checkpoints(folder)
    if not known:
        raise UsageError(f"{where}: that run holds no checkpoint yet; train it first, with xlab resume {folder}")
    return f"{folder}@{known[max(known)][1]}"


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
