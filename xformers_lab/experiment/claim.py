"""What a file of `experiments/` declares: the claim, and the studies that test it."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from xformers_lab import config as configs
from xformers_lab.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the literature, in a form that can fail.

    says: what is claimed, in one sentence. source: the paper, and its cell or figure. literature: the numbers there.
    doubt: what would change one's mind of the verdict. minutes: what its studies take on two idle cores at scale 1.
    seeds: how many seeds each study runs, where the command does not say. data: what the folder of --data has to hold,
    for which {data} stands in the words of studies: the name in it, and what that is.
    """

    says: str
    source: str
    literature: str
    doubt: str
    minutes: float
    seeds: int = 3
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """A command of the laboratory, with words and flags as `xlab` takes them."""

    command: Literal["compare", "bench", "signals", "error"]
    words: tuple[str, ...]
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def line(self) -> str:
        """The command as a user types it."""
        return shlex.join(["xlab", self.command, *self.words, *_flags(self.flags)])

    @property
    def needs_data(self) -> bool:
        """Whether it reads the folder of --data."""
        return any("{data}" in word for word in self.words)

    def of(
        self, *, seeds: list[int], scale: int = 1, runs: Mapping[str, str] = MappingProxyType({}), data: str = ""
    ) -> "Study":
        """The same with these seeds, and with dim and steps times `scale`. A bench has no seeds, and nothing but a
        comparison has steps. runs: the first run of each study before, for which {NAME} stands in the words; data: the
        folder for which {data} does."""
        keys = {"dim": "64", "steps": "400"} if self.command == "compare" else {"dim": "64"}
        keys |= {key: text for key, _, text in (word.partition("=") for word in self.words) if key in keys}
        scaled = {key: _times(key, text, scale) for key, text in keys.items()} if scale != 1 else {}
        words = [word for word in self.words if word.partition("=")[0] not in scaled]
        words += [f"{key}={text}" for key, text in scaled.items()]
        words = [word.format_map({**runs, "data": data}) if "{" in word else word for word in words]
        if self.command != "bench":
            words.append(f"seed={','.join(map(str, seeds))}")
        return dataclasses.replace(self, words=tuple(words))


def compare(words: str, **flags: Any) -> Study:
    """`xlab compare` of these words, with flags as `xformers_lab.compare` takes them: baselines=True, budget="5m".
    Baselines are left out unless asked for. The words say no seed, for the command that runs the experiment does;
    init={NAME} is the first run of the study NAME, which stands before this one; ({data}/FOLDER) lies in the folder of
    --data, and the claim's `data` says what it is."""
    return Study("compare", _split(words), {"baselines": False, **flags})


def bench(words: str, **flags: Any) -> Study:
    """`xlab bench` of these words, with flags as `xformers_lab.bench` takes them: passes="decode", rounds=9."""
    return Study("bench", _split(words), flags)


def signals(words: str) -> Study:
    """`xlab signals` of these words: states and gradients in each layer before training."""
    return Study("signals", _split(words))


def error(words: str, scale: Sequence[float] = (1.0,)) -> Study:
    """`xlab error` of these words: how far mechanisms are from softmax attention."""
    return Study("error", _split(words), {"scale": tuple(scale)})


def _split(words: str) -> tuple[str, ...]:
    """The words apart; raises UsageError where they say what the command that runs the experiment says."""
    split = tuple(shlex.split(words))
    for word in split:
        if word.partition("=")[0] in ("seed", "seeds", "runs"):
            raise UsageError(f'"{word}": seeds and folder are no words of an experiment; xlab experiment run says them')
    return split


def _times(key: str, text: str, scale: int) -> str:
    """A word's values times the scale: "16,32" or "16..64:x2"."""
    return ",".join(str(value * scale) for value in configs.axes_of({key: text}, f"{key}={text}")[key])


def _flags(flags: Mapping[str, Any]) -> list[str]:
    """Keyword arguments of the functions as the flags of their commands."""
    absent = {"baselines": "--no-baselines", "check": "--no-check"}
    spelled = []
    for name, value in flags.items():
        flag = "--pass" if name == "passes" else f"--{name.replace('_', '-')}"
        if name in absent:
            spelled += [] if value else [absent[name]]
        elif isinstance(value, bool):
            spelled += [flag] if value else []
        else:
            spelled += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return spelled
