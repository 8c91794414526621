"""The cells of a study: which config names a row, which one is run for it, and what its row says beside its record.

A row is one variant at one length with one seed. Its varied keys are those of the config that the words made (the
origin); what matching and tuning made of it is what runs.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.compare import run
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError

# Keys that say which draw of a variant a run is, not which variant.
SEEDS = tuple(key for key in ("seed", "data_seed", "init_seed") if key in configs.LEAVES)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row to be. origin: the config that the words made; config: the one that is run; role and name: see Record.

    matched and tuning are what the row says of them, None where nothing was matched or tuned; shared: the config under
    the recipe that all share, where knobs are tuned.
    """

    origin: Config
    config: Config
    role: str = "variant"
    name: str | None = None
    matched: Mapping | None = dataclasses.field(default=None, compare=False)
    tuning: Mapping | None = dataclasses.field(default=None, compare=False)
    shared: Config | None = None

    @property
    def place(self) -> tuple[str, int]:
        """What is compared with one another: the task and the length."""
        return self.origin.task, self.origin.seq_len

    @property
    def variant(self) -> Config:
        """The origin, whatever its seeds."""
        return unseeded(self.origin)

    def title(self, varied: Sequence[str]) -> str:
        """What the cell is called in a message, without its seed."""
        keys = [key for key in varied if key not in ("task", "seq_len", *SEEDS)] or ["attention"]
        words = [str(configs.get(self.origin, key)) for key in keys]
        return f"{self.name or ' · '.join(words)} at {self.origin.seq_len:,} tokens"


def unseeded(config: Config) -> Config:
    """The config with the seeds that are the default."""
    return edit(config, **{key: configs.get(Config(), key) for key in SEEDS})


def cells(origins: Iterable[Config], names: Mapping[Config, str] | None = None) -> list[Cell]:
    """The cells of the words' own configs, each run as it stands; names: what rows are called, by `unseeded` config."""
    return [Cell(origin, origin, name=(names or {}).get(unseeded(origin))) for origin in origins]


def places(cells: Iterable[Cell]) -> dict[tuple[str, int], list[Cell]]:
    """The cells by task and length, in order of appearance."""
    split: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        split.setdefault(cell.place, []).append(cell)
    return split


def variants(cells: Iterable[Cell]) -> dict[Config, list[Cell]]:
    """The cells by variant, those of all its seeds together, in order of appearance."""
    split: dict[Config, list[Cell]] = {}
    for cell in cells:
        split.setdefault(cell.variant, []).append(cell)
    return split


def command(config: Config) -> str:
    """The command that makes a run again: `xlab train` and every key that is not as it is by default."""
    leaves = {key: configs.get(config, key) for key in configs.KEYS}
    words = [configs.word(key, [value]) for key, value in leaves.items() if value != configs.LEAVES[key][1].default]
    return shlex.join(["xlab", "train", *words])


def row(cell: Cell, record: Mapping, varied: Sequence[str], shared: Mapping | None = None) -> dict:
    """The row of a cell: the record of the config that was run, named by the origin. shared: the record of the run
    under the recipe that all share."""
    said: dict[str, Any] = {"role": cell.role, "command": command(cell.config)}
    if cell.name is not None:
        said["name"] = cell.name
    if cell.matched is not None:
        said["matched"] = cell.matched
    if cell.tuning is not None:
        said["tuning"] = cell.tuning
    if cell.shared is not None and shared is not None:
        of_run = {key: shared.get(key) for key in ("status", "metric", "metric_interval", "loss")}
        knobs = {key: configs.get(cell.shared, key) for key in (cell.tuning or {}).get("knobs", ())}
        said["shared"] = of_run | {"knobs": knobs, "run_dir": str(configs.folder(cell.shared))}
    return run.row(cell.config, {**record, **said}, list(varied)) | keys(cell, varied)


def keys(cell: Cell, varied: Sequence[str]) -> dict[str, Any]:
    """The keys that tell a row from the others, as the words had them."""
    return {key: configs.get(cell.origin, key) for key in dict.fromkeys([*run.PLACING, *varied])}


def check_words(study: configs.Study, varied: Sequence[str]) -> None:
    """Raises UsageError where a key of a study cannot be read, or contradicts the sweep."""
    from xformers_lab.compare import match, tune

    match.Match.read(study.match)
    tuning = tune.Tuning.read(study.tune)
    for knob in tuning.knobs if tuning else ():
        if knob in varied:
            raise UsageError(f"tune={study.tune}: {knob} has several values; give it one, which tuning begins at")
