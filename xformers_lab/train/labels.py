"""What people call a run, in its config.json: `name` and `tags`, which may change once it is trained. Needs no jax."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.train import records


def kept(config: Config, run_dir: pathlib.Path) -> Config:
    """The config with the name that the folder of its run has where it brings none, and with the tags of both."""
    stored = records.read_json(run_dir / "config.json") or {}
    name = stored.get("name") if config.name is None else config.name
    tags = "+".join(tags for tags in (stored.get("tags"), config.tags) if isinstance(tags, str))
    return edit(config, name=name, tags=tags or None)


def write(config: Config, run_dir: pathlib.Path) -> None:
    """Have a run that is there already bear the name and tags of `config`; it stays as old as it was."""
    path = run_dir / "config.json"
    stored = records.read_json(path)
    if stored is None or (config.name is None and config.tags is None):
        return
    labelled = kept(config, run_dir)
    _replace(path, stored, {key: configs.get(labelled, key) for key in ("name", "tags")})


def retag(
    run_dirs: Sequence[pathlib.Path], add: str | None = None, remove: str | None = None
) -> dict[pathlib.Path, str | None]:
    """Give runs more tags, "a+b", and take others from them; -> the tags that each has then, None for none. They stay
    as old as they were. Raises UsageError, before any is changed, at a word that can be no tag, at a tag to remove that
    no run has, and where a process works in a folder."""
    more, less = (_words(configs.typed("tags", tags, f"tag {tags}")) for tags in (add, remove))
    for folder in run_dirs:
        records.refuse_if_in_use(folder)
    had = {tag for folder in run_dirs for tag in _words(_stored(folder).get("tags"))}
    if unknown := [tag for tag in less if tag not in had]:
        raise UsageError(f"tag {remove}: no run has the tag {unknown[0]}; there is {', '.join(sorted(had)) or 'none'}")
    tags = {}
    for folder in run_dirs:
        with records.locked(folder):
            stored = _stored(folder)
            kept = [tag for tag in (*_words(stored.get("tags")), *more) if tag not in less]
            tags[folder] = "+".join(dict.fromkeys(kept)) or None
            _replace(folder / "config.json", stored, {"tags": tags[folder]})
    return tags


def _stored(run_dir: pathlib.Path) -> dict[str, Any]:
    path = run_dir / "config.json"
    if (stored := records.read_json(path)) is None:
        raise UsageError(f"{path}: cannot be read, so its tags cannot be changed")
    return stored


def _words(tags: Any) -> list[str]:
    return tags.split("+") if isinstance(tags, str) else []


def _replace(path: pathlib.Path, stored: dict[str, Any], labels: dict[str, Any]) -> None:
    """Write labels that are new into a config.json, whose time stays as it was."""
    if any(stored.get(key) != value for key, value in labels.items()):
        times = path.stat()
        records.write_json(path, stored | labels)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
