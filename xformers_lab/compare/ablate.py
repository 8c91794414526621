"""Ablations: from one base config, each alternative of each axis swapped in alone, and each choice of its own set back
to the laboratory's default alone."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.compare.study import SEEDS, Cell
from xformers_lab.compare.tune import Tuning
from xformers_lab.config import Config, Study, edit
from xformers_lab.errors import UsageError

BASE = "base"
FRAME = ("task", "seq_len", *SEEDS)  # what every variant is run on: several values are several tables or seeds
# What a run costs, and how it is measured: no choice of a design that could be set back.
COSTS = ("dim", "layers", "heads", "dtype", "steps", "batch", "accumulate", "remat", "eval_every", "eval_batches")
COSTS += ("layout", "runs", "stall", "save_every", "score", "select", "test_len", "init", "name", "tags")
FILES = (".toml", ".yaml", ".yml", ".json", ".py")


@dataclasses.dataclass(frozen=True)
class Ablation:
    """cells: the base and what differs from it in one key, named "base", "norm=post" and so on; axes: the names of the
    swaps of each key, in the order of the words."""

    cells: list[Cell]
    varied: list[str]
    study: Study
    axes: dict[str, list[str]]


def ablation(words: Iterable[configs.Item], *, trust: bool = False) -> Ablation:
    """What `xlab ablate` runs: words as `compare` takes them, or what stands for them, and files with or without the @.

    A key with several values is an axis. Its value in the base is the one that a file or word before gave it, else the
    first of them. Raises UsageError where nothing is left to swap.
    """
    words = [_at_file(word) for word in words]
    configs.refuse_name(words)
    read = configs.gathered(words, trust=trust)
    if len(read.bases) > 1:
        raise UsageError(f"an ablation has one base, but the recipe has {len(read.bases)} configs; use compare")
    base, listed, frame = _sorted(read)
    if read.study.seeds is not None:
        if "seed" in frame and (frame["seed"] != [0] or any(map(_says_seed, words))):
            raise UsageError(f"seeds={read.study.seeds} and seed= both say which seeds: leave one out")
        frame["seed"] = list(range(read.study.seeds))
    derived = {key: base.pop(key) for key in configs.DERIVED if key in base}
    if several := [key for key in configs.DERIVED if key in listed]:
        raise UsageError(f"{several[0]}= has several values: in an ablation it has one")
    origin = edit(Config(), **base | {"name": None})
    axes = {key: _swaps(origin, key, values) for key, values in listed.items()}
    tuning = Tuning.read(read.study.tune)
    tuned = tuning.knobs if tuning else ()  # each variant gets its own value of these
    for key in configs.KEYS:
        default = configs.get(Config(), key)
        if key not in (*FRAME, *COSTS, *tuned):
            axes[key] = axes.get(key, {}) | _swaps(origin, key, [default])
    axes = {key: swaps for key, swaps in axes.items() if swaps}
    if not axes:
        raise UsageError(
            "nothing to ablate: give a key several values, as in norm=pre,post, or a base that is not all defaults"
        )
    swapped = {name: {key: value} for key, swaps in axes.items() for name, value in swaps.items()}
    variants = {BASE: origin} | {name: edit(origin, **change) for name, change in swapped.items()}
    cells = []
    for name, variant in variants.items():
        for values in itertools.product(*frame.values()):
            config = edit(variant, **dict(zip(frame, values, strict=True)))
            said = derived | {"seq_len": config.seq_len, "dim": config.model.dim}
            config = edit(config, **configs.derive(said))
            cells.append(Cell(config, config, name=name))
    varied = configs.varied([cell.origin for cell in cells])
    return Ablation(cells, varied, read.study, {key: list(swaps) for key, swaps in axes.items()})


def _at_file(word: configs.Item) -> configs.Item:
    bare = isinstance(word, str) and "=" not in word and pathlib.Path(word).suffix in FILES
    return f"@{word}" if bare else word


def _says_seed(word: configs.Item) -> bool:
    """Whether a word, or a mapping, says which seeds; a file that a run left, and a config, say seed=0 as all else."""
    return word.startswith("seed=") if isinstance(word, str) else isinstance(word, Mapping) and "seed" in word


def _sorted(read: configs.Words) -> tuple[dict[str, Any], dict[str, list], dict[str, list]]:
    """The base's values, the values of every axis, and those of what all are run on."""
    base: dict[str, Any] = {}
    listed: dict[str, list] = {}
    frame: dict[str, list] = {}
    for given in (*read.bases, *read.given):
        base = {key: value for key, value in base.items() if key in configs.over({key: []}, given)}
        for key, values in given.items():
            if key in FRAME:
                frame[key] = values
            elif len(values) > 1:
                listed[key] = values
                base.setdefault(key, values[0])
            else:
                base[key] = values[0]
                listed.pop(key, None)
    return base, listed, frame


def _swaps(origin: Config, key: str, values: Iterable[Any]) -> dict[str, Any]:
    """The values of a key that are not the base's own, by the name of the variant."""
    own = configs.canonical(key, configs.get(origin, key))
    return {f"{key}={spec.show(value)}": value for value in values if configs.canonical(key, value) != own}
