"""About how long runs take, by stored runs of the same programs; nothing is run, and no code that a run names."""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from xformers_lab import config as configs
from xformers_lab.compare import probe
from xformers_lab.config import Config
from xformers_lab.train import records

KEYS = tuple(key for key, (_, field, _) in configs.LEAVES.items() if field.metadata["compiled"])


def of(runs: Iterable[Config]) -> tuple[float, int]:
    """(seconds that the runs take one after the other, how many of them no stored run tells about)."""
    runs = list(runs)
    known = {program: about for folder in _folders(runs) for program, about in _probes(folder)}
    untold = sum(_program(run) not in known for run in runs)
    return sum(probe.estimate(runs, known, _program)), untold


def _folders(runs: Iterable[Config]) -> list[pathlib.Path]:
    """The folders of the runs of their tasks."""
    return list(dict.fromkeys(configs.folder(run).parent for run in runs))


def _probes(folder: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(program, what `probe.measure` would say of it) of every timed run in a folder."""
    for path in folder.glob("*/result.json"):
        record = records.read_json(path) or {}
        tree, figures = record.get("config"), [record.get(key) for key in ("compile_seconds", "seconds_median")]
        if isinstance(tree, Mapping) and all(isinstance(figure, float) for figure in figures):
            sections = [tree, *(tree[name] for name in ("model", "train") if isinstance(tree.get(name), Mapping))]
            values = {key: value for section in sections for key, value in section.items()}
            about = {"compile_seconds": figures[0], "step_seconds": figures[1], "examples": record.get("examples") or 0}
            yield json.dumps([values.get(key) for key in KEYS]), about


def _program(run: Config) -> str:
    return json.dumps([configs.get(run, key) for key in KEYS])
