"""When a run began, and from what revision of the user's own repository. Needs no jax."""

import datetime
import functools
import pathlib
import subprocess

from xformers_lab.train import records

PATIENCE = 5.0  # seconds that git has: a repository on a slow disk costs a run no more


def now() -> str:
    """The time in UTC, as ISO 8601 has it, in whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def beginning(run_dir: pathlib.Path, step: int) -> dict:
    """What env.json has of a run that begins, or goes on behind `step`: started, git (see `revision`), and of one that
    goes on resumed, the same two of this process."""
    here = {"started": now(), "git": revision(pathlib.Path.cwd())}
    before = records.read_json(run_dir / "env.json") or {}
    if step and isinstance(before.get("started"), str):
        return {"started": before["started"], "git": before.get("git"), "resumed": here}
    return here


@functools.cache  # a process runs the code that it found when it began
def revision(folder: pathlib.Path) -> dict | None:
    """The commit of the git repository that a folder is in, and whether files of it were changed since; None where it
    is in none, or git does not say.

    Files that git does not track do not count: code of one's own that a config names has a hash in sources.json.
    """
    commit, changed = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changed is None else {"commit": commit, "dirty": bool(changed)}


def of_file(path: pathlib.Path) -> dict | None:
    """The commit that a file was last changed in, and whether it was changed since; None where git does not know it."""
    folder, name = path.resolve().parent, path.name
    commit = _git(folder, "log", "-1", "--format=%H", "--", name)
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", name)
    return {"commit": commit, "dirty": bool(changed)} if commit and changed is not None else None


def _git(folder: pathlib.Path, *words: str) -> str | None:
    # A repository may name a program to run as its monitor of files; what only looks runs none.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *words]
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
