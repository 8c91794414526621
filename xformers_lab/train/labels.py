"""What people call a run, in its config.json: `name` and `tags`, which may change once it is trained. Needs no jax."""

import os
import pathlib

from xformers_lab import config as configs
from xformers_lab.config import Config, edit
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
    labels = {key: value for key in ("name", "tags") if (value := configs.get(labelled, key)) != stored.get(key)}
    if labels:
        times = path.stat()
        records.write_json(path, stored | labels)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
