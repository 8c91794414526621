"""The rows of a bench, from blank to fitted. Needs no device: a command keeps them, and its worker measures."""

import dataclasses
from collections.abc import Sequence

from xformers_lab import record, spec
from xformers_lab.config import KEYS, Config, get, to_dict, varied
from xformers_lab.errors import BrokenChoice, UsageError, nearest, ran_out_of_memory
from xformers_lab.measure.exponent import LEAST, fit

PASSES = ("forward", "forward+backward", "prefill", "decode")
# The keys that a bench's figures depend on, and those that say where a run is kept and what it is called.
MEASURED = ("model", "attention", "seq_len", "dim", "heads", "kv_heads", "dtype", "batch", "kernel")
APART = ("runs", "name", "tags", "stall", "seed", "init_seed", "data_seed")


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One config and pass, and the row that it becomes."""

    config: Config
    direction: str
    row: dict

    @property
    def title(self) -> str:
        """What progress calls it."""
        return f"{self.config.model.attention} at {self.config.seq_len} tokens, {self.direction}"

    @property
    def open(self) -> bool:
        """Whether it has not ended."""
        return self.row["status"] is None

    def end(self, status: str, reason: str) -> None:
        """End it without figures."""
        self.row.update(status=status, reason=reason)

    def fail(self, error: Exception) -> None:
        """End it with what it raised."""
        text = str(error) if isinstance(error, BrokenChoice) else f"{type(error).__name__}: {error}".strip()
        self.end("oom" if ran_out_of_memory(error) else "failed", text.splitlines()[0][:500])


def blank(
    configs: Sequence[Config], passes: Sequence[str], check: bool, schema: type[record.Record] = record.Record
) -> list[Cell]:
    """Every config's cells, a pass each, with nothing measured; raises UsageError at what is no cell of a bench."""
    for direction in passes:
        if direction not in PASSES:
            raise UsageError(f'bench: no pass "{direction}": {nearest(direction, PASSES, "passes")}')
    cells, keys = [], (*varied(list(configs)), "attention", "seq_len")
    for config in configs:
        choice = config.model.attention
        if len(mechanisms := spec.split(choice, "+")) > 1:
            parts = ",".join(mechanisms)
            raise UsageError(f"attention={choice}: bench times one mechanism at a time; write attention={parts}")
        swept = {key: get(config, key) for key in keys}
        row = {"kind": "bench", "status": None} | record.blank("bench", schema)
        row |= {"checked": check, "config": to_dict(config)}
        cells += [Cell(config, direction, swept | {"pass": direction} | row) for direction in passes]
    return cells


def unused(configs: Sequence[Config]) -> list[str]:
    """The keys that were set, and that no figure of a bench depends on."""
    usual, others = Config(), [key for key in KEYS if key not in (*MEASURED, *APART)]
    return [key for key in others if any(get(config, key) != get(usual, key) for config in configs)]


def interrupted(cells: Sequence[Cell]) -> None:
    """Say of the cells that have not ended that they were not reached."""
    for cell in cells:
        if cell.open:
            cell.end("interrupted", "interrupted before it was measured")


def exponents(cells: Sequence[Cell]) -> None:
    """Fit how each mechanism's costs grow over the lengths it was measured at; all its rows get the same figures.

    None where it was measured at too few of them for a line to be more than its ends.
    """
    series: dict[tuple, list[dict]] = {}
    for cell in cells:
        series.setdefault((dataclasses.replace(cell.config, seq_len=0), cell.direction), []).append(cell.row)
    for rows in series.values():
        held = "peak_bytes" if any("peak_bytes" in row for row in rows) else "temp_bytes"
        for name, key in (("exponent", "seconds_min"), ("exponent_flops", "flops"), ("exponent_bytes", held)):
            points = {row["seq_len"]: row[key] for row in rows if row["status"] == "ok" and row[key]}
            if len(points) >= LEAST:
                slope = fit(list(points), list(points.values()))
                for row in rows:
                    row[name] = slope
