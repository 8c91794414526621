"""The table of a study as an experiment asks it: the sample of one number under some keys."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.api.table import Table
from xformers_lab.errors import UsageError, nearest
from xformers_lab.experiment.sample import Sample
from xformers_lab.report import human, rows

# Figures that the compiler counts: every run of a program has the same.
COUNTED = ("flops", "flops_per_token", "parameters", "state_bytes", "temp_bytes", "exponent_flops", "exponent_bytes")


class Measured:
    """Rows of one study. Keys choose among them, spelled as in the words of the study: `attention="full"`, `dim=32`;
    `name="LSTM"` is a baseline, which no other selection has."""

    def __init__(self, table: Table):
        self.table = table

    def metric(self, *, test_len: int | None = None, shared: bool = False, **keys: Any) -> Sample:
        """The task's metric on its test split, by seed. test_len: scored at this length in place of the trained one;
        shared: of the recipe that all share, where knobs are tuned."""
        found = self._rows(keys)
        point = rows.Point("", None, [row for row in found if rows.ok(row)], [row for row in found if not rows.ok(row)])
        if shared:
            point = point.shared
        if test_len is not None and any(rows.length(row) != test_len for row in found):
            point = point.beyond(test_len)
        return Sample(point.seeds("metric"), point.sampling, missing=_missing(found))

    def value(self, figure: str, **keys: Any) -> Sample:
        """A figure of the rows, by seed: "parameters", "state_bytes", "tokens_per_second", ..."""
        found = self._rows(keys)
        numbers = {rows.draw(row): rows.measure(row, figure) for row in found}
        values = {seed: number for seed, number in numbers.items() if number is not None}
        return Sample(values, exact=figure in COUNTED, missing=_missing(found))

    def reports(self, name: str, **keys: Any) -> Sample:
        """What the models say of themselves on the test split, by seed: a mean by its name in the rows' `aux`, such as
        "steps" of ACT or "exit/2"; 0 of a run that does not report it where another does."""
        found = self._rows(keys)
        told = {each for row in found for each in row.get("aux") or {}}
        if any(map(rows.ok, found)) and name not in told:
            raise UsageError(f'{self._asked(keys)}: no model reports "{name}": {nearest(name, told)}')
        values = {rows.draw(row): float((row.get("aux") or {}).get(name, 0.0)) for row in found if rows.ok(row)}
        return Sample(values, missing=_missing(found))

    def seconds(self, **keys: Any) -> Sample:
        """The time of one pass, by round of a bench, which the rows of one length take in turns."""
        (row,) = self._rows(keys)
        return Sample(dict(enumerate(row.get("seconds_rounds") or [])), missing=_missing([row]))

    def heads(self, figure: str, *, layer: int | None = None, **keys: Any) -> Sample:
        """What heads do on the first test example, as the record keeps its maps (`measure.heads`: "entropy",
        "relative", "distance"), by seed: the mean over the heads of a layer, from 1, or of all."""
        from xformers_lab.measure import heads

        values, missing = {}, []
        found = self._rows(keys)
        for row in found:
            kept = row.get("maps") or {}
            if "layers" not in kept:
                missing.append(f"seed {rows.draw(row)}: {kept.get('reason', 'no maps were kept')}")
                continue
            weights = np.asarray(kept["layers"], np.float64)
            real, causal = np.ones(weights.shape[-1], bool), not np.triu(weights, 1).any()
            each = getattr(heads.figures_of(weights, causal=causal, real_queries=real, real_keys=real), figure)
            values[rows.draw(row)] = float(np.nanmean(each if layer is None else each[layer - 1]))
        return Sample(values, missing=tuple(dict.fromkeys([*_missing(found), *missing])))

    def all(self, key: str) -> list[Any]:
        """The values of a key over the variants, in order."""
        return list(dict.fromkeys(rows.value(row, key) for row in self.table.rows if rows.role(row) == "variant"))

    def _rows(self, keys: Mapping[str, Any]) -> list[dict]:
        variant = "name" not in keys
        mine = [row for row in self.table.rows if (rows.role(row) == "variant") == variant]
        found = [row for row in mine if all(_same(key, rows.value(row, key), choice) for key, choice in keys.items())]
        if not found:
            there = human.listing(list(dict.fromkeys(rows.series(row, self.table.varied) for row in self.table.rows)))
            raise UsageError(f"the study has no row with {self._asked(keys)}; it has {there}")
        if len({rows.draw(row) for row in found}) < len(found):  # one would stand for another of its seed
            raise UsageError(
                f"{self._asked(keys)}: {len(found)} rows of the study, several of one seed; give more keys"
            )
        return found

    def _asked(self, keys: Mapping[str, Any]) -> str:
        return " ".join(f"{key}={spec.show(choice)}" for key, choice in keys.items()) or "any keys"


def _same(key: str, one: Any, other: Any) -> bool:
    """Whether two values of a key are the same however they are spelled."""
    if key in configs.LEAVES:
        return configs.canonical(key, one) == configs.canonical(key, other)
    return one == other


def _missing(found: Iterable[dict]) -> tuple[str, ...]:
    """What did not end, a sentence each."""
    return tuple(dict.fromkeys(f"seed {rows.draw(row)}: {human.outcome(row)}" for row in found if not rows.ok(row)))
