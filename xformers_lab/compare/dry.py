"""What a study would do, without a worker: its cells, their ids, which are there, and about how long the rest takes."""

import dataclasses
from typing import Any

from xformers_lab import config as configs
from xformers_lab.compare import estimate, sweep
from xformers_lab.compare.conduct import Conductor
from xformers_lab.compare.study import Cell
from xformers_lab.progress import spoken

UNDECIDED = "decided when it runs"


@dataclasses.dataclass(frozen=True)
class Plan:
    """rows: {"cell", "seed", "id", "state"} of each cell; lines: what is to be said of all."""

    rows: list[dict[str, Any]]
    lines: list[str]


def plan(conductor: Conductor) -> Plan:
    """Nothing is started and nothing written: whether each cell can be is not checked."""
    undecided = conductor.foresee()
    rows, left = [], []
    for cell in conductor.cells:
        if cell.variant in undecided:
            rows.append(_row(cell, conductor.varied, None, UNDECIDED))
            continue
        state = _state(cell)
        rows.append(_row(cell, conductor.varied, configs.identity(cell.config), state))
        if sweep.stored(cell.config) is None:
            left.append(cell.config)
    there = len(rows) - len(left) - sum(row["state"] == UNDECIDED for row in rows)
    lines = [conductor.counted(there)]
    if left:
        seconds, untold = estimate.of(dict.fromkeys(left))
        words = f"about {spoken(seconds)} one after the other, by stored runs of the same programs"
        words += f", of which {untold} have none" if untold else ""
        words = words if untold < len(left) else "no stored run tells how long they take"
        lines.append(f"{len(left)} to train: {words}")
    if undecided:
        lines.append("what match=, tune= and --budget make of the cells is decided when they run")
    return Plan(rows, [*lines, "nothing was started; whether each cell can be is checked when it is"])


def _row(cell: Cell, varied: list[str], identity: str | None, state: str) -> dict[str, Any]:
    role = "" if cell.role == "variant" else f" ({cell.role})"
    seed = configs.get(cell.origin, "seed")
    return {"cell": f"{cell.title(varied)}{role}", "seed": seed, "id": identity, "state": state}


def _state(cell: Cell) -> str:
    record = sweep.stored(cell.config)
    if record is not None:
        return f"there ({record['status']})"
    folder, last = configs.folder(cell.config), cell.config.train.steps
    steps = [
        int(path.parent.name) for path in folder.glob("checkpoints/*/MANIFEST.json") if path.parent.name.isdecimal()
    ]
    return f"goes on from step {max(steps)} of {last}" if steps else "to train"
