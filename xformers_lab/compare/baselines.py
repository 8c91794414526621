"""What stands in every table beside the variants: baselines, and windows that show how far a task reaches.

A variant is worth its cost where it beats what is cheap: a bag of tokens (no order), an LSTM (no attention), and the
Transformer of today's practice, full attention with rotary positions.
"""

from collections.abc import Iterable, Sequence

from xformers_lab import config as configs
from xformers_lab.compare.study import Cell, places, variants
from xformers_lab.config import AXES, Config, Model, edit

# What a baseline changes; all else is as the first variant of its task and length has it, but for a Transformer's axes,
# which what is none has as they are by default.
BASELINES = {
    "bag of tokens": {"model": "bag"},
    "LSTM": {"model": "lstm"},
    "RoPE Transformer": {"model": "auto", "attention": "full", "position": "rope"},
}
SHARES = (16, 8, 4, 2)  # of the length, in a window of the range control
LEAST_WINDOW = 4


def baselines(cells: Sequence[Cell]) -> list[Cell]:
    """A cell of each baseline for every task, length and seed, where the grid has not the very same config."""
    found = []
    for mine in places(cells).values():
        for name, changes in BASELINES.items():
            plain = {} if "attention" in changes else {axis: getattr(Model(), axis) for axis in AXES}
            found += _beside(mine, "baseline", name, plain | changes)
    return found


def ranges(cells: Sequence[Cell]) -> list[Cell]:
    """The first variant of each task and length with windows of several sizes in place of its attention: what a small
    window solves needs no long range."""
    found = []
    for (_, length), mine in places(cells).items():
        sizes = dict.fromkeys(max(length // share, LEAST_WINDOW) for share in SHARES)
        for size in (size for size in sizes if size < length):
            found += _beside(mine, "range", f"window {size}", {"attention": f"local:window={size}"})
    return found


def _beside(mine: Iterable[Cell], role: str, name: str, changes: dict) -> list[Cell]:
    """The cells of one addition, with the seeds of the first variant among those of a task and length."""
    mine = list(mine)
    # Where the words name several kinds of model, the one that the task is made for.
    base = next(iter(variants([cell for cell in mine if cell.origin.model.model == "auto"] or mine).values()))
    known = {configs.identity(cell.origin) for cell in mine}
    added = []
    for cell in base:
        origin = edit(cell.origin, **changes)
        if configs.identity(origin) not in known:
            added.append(Cell(origin, origin, role, name))
    return added


def left_out(cells: Iterable[Cell], reasons: dict[Config, str]) -> list[str]:
    """One line for each addition that cannot be, from the reasons by the origin of each cell."""
    lines: dict[str, None] = {}
    for cell in cells:
        if cell.origin in reasons:
            lines[f"{cell.name} is left out at {cell.origin.seq_len:,} tokens: {reasons[cell.origin]}"] = None
    return list(lines)
