"""Variants brought to one budget: the solver that finds the width at which a config costs what the reference costs.

The width of the feed-forward layer changes first, for it is what variants differ in least; then that of the model, and
for what decoding keeps the number of key/value heads. What cannot come within TOLERANCE keeps the nearest and says so.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.compare.study import Cell
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError, nearest

BUDGETS = ("params", "flops", "state", "wallclock")
TOLERANCE = 0.02
CLOSE = 0.005  # near enough to look no further
TRIES = 24  # widths that one search looks at: it halves the way at least every third time
WIDER = 4  # times the model's own width: a wider one is another experiment
HIDDEN = 64  # times the model's width in hidden channels
KEYS = ("ffn", "dim", "heads", "kv_heads")  # what the solver changes


@dataclasses.dataclass(frozen=True)
class Match:
    """What all variants of a task and length are held to. to: the value of a key that names the reference, None for the
    first variant."""

    budget: str
    to: str | None = None

    @classmethod
    def read(cls, text: str) -> "Match | None":
        """`none`, or `params:to=linear`; raises UsageError."""
        choice = spec.parse(text, f"match={text}")
        if choice.name == "none" and not choice.options:
            return None
        if choice.name not in BUDGETS:
            raise UsageError(f"match={text}: {nearest(choice.name, ['none', *BUDGETS], 'budgets')}")
        if unknown := choice.options.keys() - {"to"}:
            raise UsageError(f"match={text}: {nearest(min(unknown), ['to'], 'options')}")
        to = choice.options.get("to")
        return cls(choice.name, None if to is None else str(to))

    def reference(self, cells: Sequence[Cell], varied: Sequence[str]) -> Cell:
        """The cell whose cost the others of its task and length are held to; raises UsageError where none is named so.
        A baseline is nobody's reference unless it is named."""
        if self.to is None:
            return cells[0]
        for cell in cells:
            names = [cell.name] if cell.name else []
            values = [configs.get(cell.origin, key) for key in dict.fromkeys(["attention", *varied])]
            if self.to in map(spec.show, [*names, *values]):
                return cell
        known = ", ".join(dict.fromkeys(cell.name or cell.origin.model.attention for cell in cells))
        raise UsageError(f"match={self.budget}:to={self.to}: no variant has that value; there are {known}")


@dataclasses.dataclass(frozen=True)
class Solved:
    """The config nearest to a target, and its figure there, None where no config has one."""

    config: Config
    reached: float | None


def off(reached: float | None, target: float) -> float:
    """By what share of the target a figure misses it."""
    return math.inf if reached is None or target <= 0 else abs(reached / target - 1)


def met(reached: float | None, target: float) -> bool:
    """Whether a figure is within TOLERANCE of its target."""
    return off(reached, target) <= TOLERANCE


def solve(
    config: Config, figure: Callable[[Config], float], target: float, *, headed: bool = True, decoding: bool = False
) -> Solved:
    """The config whose figure is nearest to the target, with as little changed as brings it within TOLERANCE.

    figure(config) is what a config costs, which grows with its widths; it raises UsageError at one that cannot be.
    headed: whether the model has heads, which divide its width; decoding: whether the figure is what decoding keeps,
    which the feed-forward layer is no part of.
    """
    search = _Search(figure, target)
    if search.cost(config) is None or search.met:
        return search.best(config)
    hidden = _hidden(config) if headed and not decoding else None
    if hidden is not None:
        search.along(lambda width: with_hidden(config, width), hidden, HIDDEN * config.model.dim)
    for heads in _key_heads(config) if decoding else [config.model.kv_heads]:
        shared = config if heads == config.model.kv_heads else edit(config, kv_heads=heads)
        for step in _steps(shared, headed):
            if search.met:
                return search.best(config)
            make = lambda count, shared=shared, step=step: with_dim(shared, count * step)
            around = search.along(make, max(config.model.dim // step, 1), max(WIDER * config.model.dim // step, 1))
            for count in around if hidden is not None and not search.met else ():
                if (wide := make(count)) is not None and (width := _hidden(wide)) is not None:
                    search.along(lambda width, wide=wide: with_hidden(wide, width), width, HIDDEN * wide.model.dim)
    return search.best(config)


def with_hidden(config: Config, width: int) -> Config:
    """The config with so many hidden channels in its feed-forward layer; its other options stay."""
    choice, dim = spec.parse(config.model.ffn), config.model.dim
    short = (f"{width / dim:.{digits}g}" for digits in range(1, 17))
    ratio = next(text for text in short if round(float(text) * dim) == width)
    return edit(config, ffn=str(spec.Choice(choice.name, {**choice.options, "ratio": float(ratio)})))


def with_dim(config: Config, dim: int) -> Config | None:
    """The config with another width; None where it cannot be. A model without heads is divided by none."""
    heads = config.model.heads
    try:
        return edit(config, dim=dim, **({} if dim % heads == 0 else {"heads": 1}))
    except UsageError:
        return None


def changes(before: Config, after: Config) -> dict[str, list[Any]]:
    """What the solver changed: {key: [from, to]}."""
    pairs = {key: [configs.get(before, key), configs.get(after, key)] for key in KEYS}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def report(budget: str, target: float, reached: float | None, changed: Mapping) -> dict[str, Any]:
    """What a row says of matching."""
    return {
        "budget": budget,
        "target": target,
        "reached": reached,
        "ok": met(reached, target),
        "changed": dict(changed),
    }


class _Search:
    """The figures that were looked at, and the nearest of them."""

    def __init__(self, figure: Callable[[Config], float], target: float):
        self.figure, self.target = figure, target
        self.known: dict[Config, float | None] = {}

    @property
    def met(self) -> bool:
        return any(met(reached, self.target) for reached in self.known.values())

    def best(self, config: Config) -> Solved:
        """The nearest, the first of equals."""
        nearest = min(self.known, key=lambda one: off(self.known[one], self.target), default=config)
        return Solved(nearest, self.known.get(nearest))

    def cost(self, config: Config | None) -> float | None:
        """The figure of a config, None where it cannot be."""
        if config is not None and config not in self.known:
            try:
                self.known[config] = self.figure(config)
            except UsageError:
                self.known[config] = None
        return None if config is None else self.known[config]

    def along(self, make: Callable[[int], Config | None], start: int, most: int) -> list[int]:
        """Look at make(count), whose figure grows with the count up to `most`, until one is close or whole counts end
        -> the counts around the target. The next count is where a line through the two nearest would meet it, and every
        third one halves the way, which a curve needs."""
        below: tuple[int, float] | None = None
        above: tuple[int, float] | None = None
        before: tuple[int, float] | None = None
        count = min(max(start, 1), most)
        for tried in range(TRIES):
            value = self.cost(make(count))
            if value is None:
                break
            if value <= self.target:
                below = count, value
            else:
                above = count, value
            if off(value, self.target) <= CLOSE:
                break
            first, last = below[0] + 1 if below else 1, above[0] - 1 if above else most
            if first > last:
                break
            if below and above:
                share = (self.target - below[1]) / (above[1] - below[1])
                guess = (below[0] + above[0]) / 2 if tried % 3 == 2 else below[0] + share * (above[0] - below[0])
            elif before is None or before[1] == value:
                guess = count * max(self.target, 1) / max(value, 1)
            else:
                guess = count + (self.target - value) * (count - before[0]) / (value - before[1])
            before = count, value
            count = min(max(round(guess), first), last)
        return [point[0] for point in (below, above) if point is not None]


def _hidden(config: Config) -> int | None:
    """Hidden channels of the feed-forward layer; None where its width is no option."""
    choice = spec.resolve("ffn", config.model.ffn)
    ratio = choice.options.get("ratio")
    return round(ratio * config.model.dim) if isinstance(ratio, float) else None


def _key_heads(config: Config) -> list[int | None]:
    """Numbers of key/value heads that the query heads can share, the config's own first."""
    heads, own = config.model.heads, config.model.kv_heads
    return [own, *(count for count in range(heads, 0, -1) if heads % count == 0 and count != (own or heads))]


def _steps(config: Config, headed: bool) -> list[int]:
    """By how much the model's width may change, coarse steps first: heads keep a size that is divisible by 4, then by
    2, where theirs is, as rotations of pairs and of planes want it."""
    if not headed:
        return [1]
    head = max(config.model.dim // config.model.heads, 1)
    return list(dict.fromkeys(config.model.heads * math.gcd(head, divisor) for divisor in (4, 2, 1)))
