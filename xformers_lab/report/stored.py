"""The runs that a folder holds, read as data alone: what each is, how far it came, what it scored. Needs no jax.

A run is a folder RUNS/TASK/ID with config.json in it (`train.records`). Nothing that it names is looked up or run, so
runs of older versions, and of choices that are gone, are read like all others.
"""

import dataclasses
import datetime
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab import named_run, spec
from xformers_lab.errors import IntegrityError, InUse, LabError, UsageError, nearest
from xformers_lab.record import SETTLED, blank, broken, keys
from xformers_lab.report import human, saved
from xformers_lab.train import records

# What a run is called by beside the keys of its config and its record.
OWN = ("id", "status", "step", "when", "folder", "summary")
UNFINISHED, RUNNING = "unfinished", "running"
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that hold its last whole line
# What no list of runs shows, which is checked where it is drawn: curves are long, and runs are many.
LONG = ("curve", "validation", "seconds_rounds", "by_position", "by_length", "wrong", "maps")


@dataclasses.dataclass(frozen=True)
class Run:
    """A stored run. config: as it was written, not checked; record: result.json, empty where there is none; began: when
    it was last begun or resumed, in seconds since the epoch."""

    folder: pathlib.Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    began: float

    @property
    def id(self) -> str:
        """Its identity, which its folder has for a name as long as nobody renamed it."""
        return str(self.record.get("id") or self.folder.name)

    @functools.cached_property
    def status(self) -> str:
        """How it ended, else whether a process works in it."""
        if (self.folder / "owner.json").is_file():
            try:
                records.refuse_if_in_use(self.folder)
            except InUse:
                return RUNNING
        return str(self.record.get("status") or UNFINISHED)

    @functools.cached_property
    def step(self) -> int | None:
        """The last step that it took."""
        step = self.record.get("step", self.record.get("steps"))
        return step if isinstance(step, int) and self.status not in (RUNNING, UNFINISHED) else _last_step(self.folder)

    @property
    def progress(self) -> str:
        """The status in words, with the steps of a run that has not come to its end."""
        if self.status in SETTLED:
            return human.status({"status": self.status})
        at = "" if self.step is None else f", step {self.step:,} of {human.plain(self.value('steps'))}"
        return human.status({"status": self.status}) + at

    @functools.cached_property
    def damage(self) -> str | None:
        """Why its record cannot be believed, in words; None where it can."""
        if self.record.get("status") not in SETTLED:
            return None
        named = re.fullmatch("[0-9a-f]{12}", self.folder.name)
        return broken(self.record, self.folder.name if named else str(self.record.get("id")))

    @property
    def summary(self) -> str:
        """One line for people: what it is, how far it came, what it scored, how long it took."""
        return summary(self.leaves, self.record, self.progress)

    def value(self, key: str) -> Any:
        """What it has of a key of `known`; the default where it is older than a key of the config."""
        if key in OWN:
            when = datetime.datetime.fromtimestamp(self.began, datetime.UTC)
            return str(self.folder) if key == "folder" else when if key == "when" else getattr(self, key)
        if key == "config":
            return self.config
        if key in ("started", "git") and not self.record.get(key):  # it has not come to its end
            return (records.read_json(self.folder / "env.json") or {}).get(key)
        return self.leaves[key] if key in configs.LEAVES else self.record.get(key)

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """The value of every key of the config, by its unique name."""
        return _leaves(self.config)


def summary(leaves: Mapping[str, Any], record: Mapping[str, Any], progress: str) -> str:
    """One line on a run. leaves: the value of every key of its config; progress: how it ended, or how far it came."""
    words = [str(leaves["task"]), str(leaves["attention"]), f"{leaves['seq_len']} tokens", f"{leaves['steps']} steps"]
    words = [f"{leaves['name']}:", *words] if leaves["name"] else words
    line = " \N{MIDDLE DOT} ".join(words).replace(": \N{MIDDLE DOT}", ":", 1)
    metric = human.number(record.get("metric"))
    ended = progress if metric is None else f"{record.get('metric_name') or 'metric'} {human.score(metric)}"
    if (seconds := _seconds(record)) is not None:
        ended += f" in {human.duration(seconds)}"
    return human.plain(f"{line}: {ended}")


def _seconds(record: Mapping[str, Any]) -> float | None:
    """From the beginning of a run to its end, pauses too."""
    try:
        began, ended = (datetime.datetime.fromisoformat(record[key]) for key in ("started", "ended"))
        return (ended - began).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def known() -> list[str]:
    """Every key that runs are filtered, sorted and shown by."""
    return list(dict.fromkeys([*OWN, *configs.KEYS, *keys()]))


def key_of(name: str, where: str) -> str:
    """The key of `known` that a word means, `model.lr` too; raises UsageError."""
    leaf = name.rpartition(".")[2]
    if name in known():
        return name
    if leaf in configs.LEAVES and name == ".".join(configs.LEAVES[leaf][0]):
        return leaf
    raise UsageError(f'{where}: unknown key "{name}": {nearest(name, known(), "keys")}')


def found(runs: pathlib.Path) -> tuple[list[Run], dict[pathlib.Path, str]]:
    """The runs under a folder, the one that began last at the end; and the folders that hold none which can be read,
    with the reason."""
    read, odd = [], {}
    for folder in sorted(runs.glob("*/*/")):
        try:
            read.append(at(folder))
        except UsageError as error:
            odd[folder] = str(error).removeprefix(f"{folder}: ")
    return sorted(read, key=lambda run: run.began), odd


def at(folder: pathlib.Path) -> Run:
    """The run in a folder; raises UsageError where there is none that can be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder}: no run (a run's folder holds config.json)")
    config = records.read_json(path)
    if config is None or not isinstance(config.get("task"), str):
        raise UsageError(f"{folder}: damaged (config.json is none)")
    began = path.stat().st_mtime
    record = records.read_json(folder / "result.json")
    if record is None and (folder / "result.json").exists():
        raise UsageError(f"{folder}: damaged (result.json cannot be read; xlab resume {folder} makes it again)")
    short = {key: value for key, value in (record or {}).items() if key not in LONG}
    try:
        saved.check_row({**short, "config": config}, ())
        saved.check_row(_leaves(config), configs.KEYS)
    except saved.Odd as odd:
        raise UsageError(f"{folder}: damaged ({odd})") from None
    return Run(folder, config, record or {}, began)


def chosen(words: Sequence[str], runs: pathlib.Path) -> tuple[list[Run], dict[pathlib.Path, str]]:
    """The runs that words mean, and the odd folders met on the way. A word is a run (its folder, its name, its id or
    the start of it, `last`) or a filter key=value; without a run, all under the folder `runs` are meant. Raises
    UsageError."""
    named = [word for word in words if "=" not in word or (pathlib.Path(word) / "config.json").is_file()]
    wanted = [_filter(word) for word in words if word not in named]
    every, odd = found(runs)
    picked = {run.folder.resolve(): run for word in named for run in [_named(word, every, runs)]}
    among = list(picked.values()) if named else every
    return [run for run in among if all(fits(run) for fits in wanted)], {} if named else odd


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys of the config that tell runs apart, as `config.varied` does of configs; what changes no result does
    not."""
    leaves = [{key: _hashable(value) for key, value in run.leaves.items()} for run in runs]
    return [key for key in configs.differing(leaves) if not configs.LEAVES[key][1].metadata["same_result"]]


def ordered(runs: Iterable[Run], key: str, *, reverse: bool = False) -> list[Run]:
    """Runs in rising order of a key, those without it last."""
    have = [run for run in runs if not _missing(run.value(key))]
    lack = [run for run in runs if _missing(run.value(key))]
    return sorted(have, key=lambda run: _rank(run.value(key)), reverse=reverse) + lack


def rows(runs: Sequence[Run], varied: Sequence[str]) -> list[dict]:
    """The runs as rows of a comparison. One that did not come to its end is a row that says so. Raises IntegrityError
    at a record that was changed since it was written, UsageError at one that cannot be drawn."""
    listed = []
    for run in runs:
        if damage := run.damage:
            raise IntegrityError(
                f"{run.folder / 'result.json'}: {damage}; leave that run out, or delete that file, and xlab resume "
                f"{run.folder} makes it again from its last checkpoint"
            )
        record: dict[str, Any] = {key: value for key, value in run.record.items() if key != "seal"}
        if run.status in (UNFINISHED, RUNNING):
            record = {"id": run.id, "status": "interrupted", "reason": run.progress}
        config = record.get("config") or run.config
        leaves = _leaves(config)
        places = {key: leaves[key] for key in dict.fromkeys(["task", "attention", "seq_len", "seed", *varied])}
        about = {"id": run.id, "kind": "compare", "config": config, "run_dir": str(run.folder)}
        labels = {"run_name": run.leaves["name"], "tags": run.leaves["tags"]}  # which may have changed since
        about |= {key: text for key, text in labels.items() if text}
        row = {**blank("compare"), **record, **places, **about}
        try:
            saved.check_row(row, varied)
        except saved.Odd as odd:
            raise UsageError(f"{run.folder / 'result.json'}: {odd}; leave that run out") from None
        listed.append(saved.sound(row))
    return listed


def contradicted(listed: Iterable[dict], runs: pathlib.Path) -> list[str]:
    """Of rows that a comparison saved, those whose run under the folder `runs` says something else by now, in words."""
    said = []
    for row in listed:
        parts = pathlib.PurePath(str(row.get("run_dir") or "")).parts[-2:]
        if len(parts) < 2 or ".." in parts:
            continue
        folder = runs.joinpath(*parts)
        record = records.read_json(folder / "result.json")
        if record is None or row.get("status") == "interrupted":
            continue
        own = {"seal", "kind", "config", "run_dir", *configs.KEYS}
        record = saved.sound(record)
        other = [key for key in record if key not in own and record[key] != row.get(key)]
        if other:
            said.append(f"{folder} ({', '.join(other[:3])}{' and more' if len(other) > 3 else ''})")
        elif record.get("status") in SETTLED and (damage := broken(record, str(row.get("id")))):
            said.append(f"{folder} ({damage})")
    return said


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every key in a stored config, in its section or flat; its default where there is none."""
    flat: dict[str, Any] = {}
    for tree in (config.get("train"), config.get("model"), config):
        if isinstance(tree, Mapping):  # "model" is a section and a key in it
            flat |= {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    return {key: flat.get(key, field.default) for key, (_, field, _) in configs.LEAVES.items()}


def _last_step(folder: pathlib.Path) -> int | None:
    """The step of the last whole line of metrics.jsonl."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            step = json.loads(line)["step"]
        except (ValueError, RecursionError, TypeError, KeyError):
            continue
        if type(step) is int:
            return step
    return None


def _named(word: str, every: Sequence[Run], runs: pathlib.Path) -> Run:
    known = [named_run.Known(run.folder, (run.folder.name, run.id), run.leaves["name"]) for run in every]
    return at(named_run.picked(word, known, runs))


def _filter(word: str) -> Callable[[Run], bool]:
    """Whether a run fits key=value, key=a,b (one of them) or, where it is a whole number, key=64..256:x2.
    tags=a+b: whether it has both tags, whatever others."""
    name, _, text = word.partition("=")
    if text == "":
        raise UsageError(f'"{word}" has no value')
    key = key_of(name, word)
    if key == "tags":
        wanted = [set(text.split("+")) for text in spec.split(text, ",")]
        return lambda run: any(one <= set(spec.show(run.value(key)).split("+")) for one in wanted)
    if key in configs.LEAVES and not configs.LEAVES[key][1].metadata["shelf"]:
        wanted = configs.axes_of({key: text}, word)[key]
    else:
        wanted = spec.split(text, ",")
    if key in configs.LEAVES and configs.LEAVES[key][1].metadata["shelf"]:
        same = lambda one, value: _same_choice(one, value, word)
    elif key == "id":
        same = lambda one, value: value.startswith(one)
    else:
        same = _same
    return lambda run: any(same(one, run.value(key)) for one in wanted)


def _same_choice(wanted: str, value: Any, where: str) -> bool:
    """Whether a choice has the wanted name, and the very options where the wanted one has any; of a cycle, each."""
    asked = [spec.parse(part, where) for part in spec.cycle(wanted, where, most=configs.MOST_OF_CYCLE)]
    try:
        parts = [spec.parse(part) for part in spec.split(str(value), "+")]
    except LabError:  # of another version, or edited
        return str(value) == wanted
    return len(asked) == len(parts) and all(
        one.name == part.name and (not one.options or one.options == part.options)
        for one, part in zip(asked, parts, strict=True)
    )


def _same(wanted: Any, value: Any) -> bool:
    """Whether a value is what was asked for, in its own words: 3e-3 is 0.003, none is nothing."""
    number = human.number(value)
    if number is not None:
        try:
            return number == float(wanted)
        except (TypeError, ValueError):
            return False
    return value == wanted or spec.show(value) == spec.show(wanted)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _rank(value: Any) -> tuple:
    """Numbers before all else, so that any two values have an order."""
    number = human.number(value)
    return (0, number, "") if number is not None else (1, 0.0, str(value))


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)
