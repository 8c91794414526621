"""A study from its cells to its rows: checked, matched, cut to a budget, tuned, trained.

Each phase leaves what it found in files, so that the same words go on where an interruption ended them.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab import engines
from xformers_lab.compare import baselines, estimate, match, probe, run, study, sweep, tune
from xformers_lab.compare.kept import Kept, kept
from xformers_lab.compare.study import Cell
from xformers_lab.config import Config, Study, edit
from xformers_lab.errors import UsageError
from xformers_lab.progress import Cells
from xformers_lab.supervise.process import Ended, Worker

Bar = Callable[[str, int], contextlib.AbstractContextManager[Cells]]
"""bar(what, total): progress of so many cells, called by what is done with them."""

FEW = 8  # runs: a probe before no more than these would say little sooner than they do


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command says beside its words. budget: seconds for the whole study, None for no limit; track: where its
    runs are shown; engine: where they train."""

    baselines: bool = True
    ranges: bool = False
    budget: float | None = None
    skip_impossible: bool = False
    kit: bool = True
    track: tuple[str, ...] = ()
    engine: engines.Chosen = dataclasses.field(default_factory=engines.chosen)


class Conductor:
    """One study under way. notes: what was left out, cut or could not be, for the table and the page."""

    def __init__(
        self,
        cells: Sequence[Cell],
        varied: Sequence[str],
        asked: Study,
        options: Options,
        worker: Worker,
        *,
        bar: Bar,
        announce: Callable[[str], None] = lambda text: None,
    ):
        """Raises UsageError where the study's keys cannot be read, or want times that the engine does not take."""
        study.check_words(asked, varied)
        self.cells, self.varied, self.options = list(cells), list(varied), options
        self.match, self.tuning = match.Match.read(asked.match), tune.Tuning.read(asked.tune)
        for knob in self.tuning.knobs if self.tuning else ():
            for cell in self.cells:
                tune.spaced(knob, configs.get(cell.origin, knob), tune.LEAST_POINTS)
        self.worker, self.bar, self.announce = worker, bar, announce
        self.engine: engines.Engine | None = None  # while `rows` has it open
        self.notes: list[str] = []
        self.ended: dict[Config, dict] = {}  # records of cells that will not train, by their origin
        self.began = time.monotonic()
        self._refuse_untimed()
        more = [options.baselines, options.ranges, options.budget]
        self.kept: Kept = kept([cell.origin for cell in self.cells], asked, more)

    def rows(self) -> list[dict]:
        """The rows, in the order of the cells; worker.stopped says whether all were reached. Raises UsageError before
        anything trains where a cell cannot be."""
        with contextlib.closing(self.options.engine.open(self.worker)) as self.engine:
            return self._rows()

    def _rows(self) -> list[dict]:
        if self.kept.values:
            self.announce(f"as planned in {self.kept.path}")
        try:
            self._check()
            run.refuse_unwritable(cell.origin for cell in self.cells)
            self._match()
            self._plan()
            self._tune()
        except Ended as ended:
            if ended.status != "interrupted":
                raise
        return self._train()

    def _refuse_untimed(self) -> None:
        """Raises UsageError where something is decided by times that are taken here, of cells that train elsewhere."""
        engine = self.options.engine
        wants = "--budget" if self.options.budget is not None else ""
        wants = "match=wallclock" if self.match is not None and self.match.budget == "wallclock" else wants
        if wants and not engine.alone:
            raise UsageError(
                f"{wants} counts seconds of steps that are timed here, with one cell at a time, and "
                f"{' '.join(engine.flags)} trains them otherwise: leave one of the two out"
            )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.announce(text)

    def _open(self) -> list[Cell]:
        """The cells that may train."""
        return [cell for cell in self.cells if cell.origin not in self.ended]

    def _program(self, cell: Cell) -> str:
        """What a decision about a variant is kept under."""
        return configs.identity(study.unseeded(cell.origin))

    def _replace(self, change: Callable[[Cell], Cell]) -> None:
        self.cells = [change(cell) if cell.origin not in self.ended else cell for cell in self.cells]

    # ---- what can be ----

    def _check(self) -> None:
        """Check the variants, and add what stands beside them where it can be."""
        origins = [cell.origin for cell in self.cells]
        how = {"skip_impossible": self.options.skip_impossible, "kit": self.options.kit}
        self.ended = run.check_cells(origins, self.worker, **how, announce=self.announce)
        base = self._open()
        added = baselines.baselines(base) if self.options.baselines else []
        added += baselines.ranges(base) if self.options.ranges else []
        variants = study.variants(added)
        if self.worker.stopped:
            return
        reasons = run.impossible([cells[0].origin for cells in variants.values()], self.worker, kit=self.options.kit)
        for line in baselines.left_out(added, reasons):
            self._note(line)
        self.cells += [cell for cells in variants.values() if cells[0].origin not in reasons for cell in cells]

    # ---- equal budgets ----

    def _match(self) -> None:
        if self.match is None or self.match.budget == "wallclock":
            return
        variants = study.variants(self._open())
        with self.bar(f"matching {self.match.budget}", len(variants)) as tell:
            done = 0
            for cells in study.places(cells[0] for cells in variants.values()).values():
                target = self._target(cells)
                for cell in cells:
                    tell.started(done, cell.origin, cell.name or "")
                    self._solve(cell, target)
                    tell.finished(done, done, {"status": "solved", "metric": None})
                    done += 1

    def _target(self, cells: Sequence[Cell]) -> float:
        """The figure of the reference among the variants of one task and length."""
        assert self.match is not None
        reference = self.match.reference(cells, self.varied)
        known = self.kept.get("targets", self._program(reference))
        if known is not None:
            return known
        try:
            target = self._ask("compare.figures.measure", reference.config, budget=self.match.budget)
        except UsageError as error:
            title = reference.title(self.varied)
            raise UsageError(
                f"match={self.match.budget}: {title}, the reference, has no such figure: {error}"
            ) from None
        return self.kept.put("targets", self._program(reference), target)

    def _solve(self, cell: Cell, target: float) -> None:
        assert self.match is not None
        budget, name = self.match.budget, self._program(cell)
        solved = self.kept.get("solved", name)
        if solved is None:
            try:
                solved = self._ask("compare.figures.solve", cell.config, budget=budget, target=target)
            except UsageError as error:
                solved = {"reached": None, "changed": {}, "reason": str(error)}
            except Ended as ended:
                if ended.status == "interrupted":
                    raise
                solved = {"reached": None, "changed": {}, "reason": ended.reason}
            self.kept.put("solved", name, solved)
        matched = match.report(budget, target, solved["reached"], solved["changed"])
        self._matched(cell, matched, solved.get("reason"))

    def _matched(self, variant: Cell, matched: Mapping, reason: str | None = None) -> None:
        """Give all seeds of a variant what matching made of it."""
        if not matched["ok"]:
            reached, target = matched["reached"], matched["target"]
            how = f"has {reached / target:.3g} times the reference's" if reached is not None else f"has none: {reason}"
            self._note(f"unmatched: {variant.title(self.varied)} {how} ({matched['budget']})")
        changed = {key: after for key, (_, after) in matched["changed"].items()}

        def change(cell: Cell) -> Cell:
            if cell.variant != variant.variant:
                return cell
            return dataclasses.replace(cell, config=edit(cell.config, **changed), matched=matched)

        self._replace(change)

    # ---- what it takes ----

    def _plan(self) -> None:
        """Probe what the study takes, give every variant equal time or fewer steps where asked, and say what comes."""
        equal = self.match is not None and self.match.budget == "wallclock"
        runs = self._runs()
        left = [one for one in runs if sweep.stored(one) is None]
        probes: dict[str, Any] = {}
        # What is compiled for the probe is only kept for cells that train in the same process.
        cheap = self.options.engine.alone and len(left) > FEW and len(study.variants(self._open())) <= probe.SHARED
        if equal or self.options.budget is not None or cheap:
            probes = self._probe(probe.ROUNDS if equal else 1)
        if equal:
            self._equal_time(probes)
            left = [one for one in self._runs() if sweep.stored(one) is None]
        if self.options.budget is not None:
            self._cut(probes, equal)
            left = [one for one in self._runs() if sweep.stored(one) is None]
        self._say(left, probes)

    def _runs(self, *, widened: bool = False) -> list[Config]:
        """Every run that the study has, tuning as far as its first grid, or `widened` on one side, each once; of tuned
        values the shared ones stand for those that are not known yet."""
        cells = self._open()
        finals = [cell.config for cell in cells]
        return list(dict.fromkeys([*self._trials(cells, widened=widened), *finals]))

    def _trials(self, cells: Sequence[Cell], *, widened: bool = False) -> list[Config]:
        """The runs of the first grid of every knob, or of one that is `widened` on one side."""
        found = []
        for variant in study.variants(cells).values() if self.tuning else ():
            assert self.tuning is not None
            cell = variant[0]
            if self.kept.get("tuned", self._program(cell)) is not None:
                continue
            for knob in self.tuning.knobs:
                shared, points = configs.get(cell.config, knob), self.tuning.points
                values = tune.spaced(knob, shared, points)
                values += tune.beyond(knob, shared, points, low=True, high=False) if widened else []
                found += [one for value in values for one in self._trial(cell, {knob: value})]
        return found

    def _probe(self, rounds: int) -> dict[str, Any]:
        """What a few steps of every variant said, by the variant's id."""
        variants = study.variants(self._open())
        with self.bar("probing", len(variants)) as tell:
            done = 0
            for cells in study.places(cells[0] for cells in variants.values()).values():
                names = [self._program(cell) for cell in cells]
                new = [cell for cell, name in zip(cells, names, strict=True) if self.kept.get("probes", name) is None]
                first = done
                if new:
                    tell.started(first, new[0].origin)
                    dicts = [configs.to_dict(cell.config) for cell in new]
                    measured = self._measured(dicts, rounds, new[0].config.stall)
                    for cell, about in zip(new, measured, strict=True):
                        self.kept.put("probes", self._program(cell), about)
                done += len(cells)
                tell.finished(first, done - 1, {"status": "probed", "metric": None})
        return self.kept.values.get("probes", {})

    def _measured(self, dicts: list[dict], rounds: int, stall: float | None) -> list[dict]:
        try:
            return self.worker.ask("compare.probe.measure", stall=stall, cells=dicts, rounds=rounds)
        except Ended as ended:
            if ended.status == "interrupted":
                raise
            # One of them ended the process: each alone then.
            if len(dicts) == 1:
                return [{"reason": ended.reason}]
            return [one for each in dicts for one in self._measured([each], rounds, stall)]

    def _equal_time(self, probes: Mapping[str, Mapping]) -> None:
        """As many steps for every variant as fit into the time that the reference's take."""
        assert self.match is not None
        variants = study.variants(self._open())
        for cells in study.places(cells[0] for cells in variants.values()).values():
            reference = self.match.reference(cells, self.varied)
            known = probes[self._program(reference)]
            if "step_seconds" not in known:
                raise UsageError(
                    f"match=wallclock: {reference.title(self.varied)}, the reference, does not run: {known['reason']}"
                )
            target = reference.config.train.steps * known["step_seconds"]
            for cell in cells:
                step = probes[self._program(cell)].get("step_seconds")
                before = cell.config.train.steps
                after = before if step is None else max(round(target / step), 1)
                changed = {"steps": [before, after]} if after != before else {}
                reached = None if step is None else after * step
                matched = match.report("wallclock", target, reached, changed)
                self._matched(cell, matched, probes[self._program(cell)].get("reason"))

    def _cut(self, probes: Mapping[str, Mapping], equal: bool) -> None:
        """Fewer steps for every run alike, where the study would take longer than it may; equal: they then get equal
        time again."""
        budget = self.options.budget
        assert budget is not None
        share = self.kept.get("budget", "share")
        if share is None:
            spent = time.monotonic() - self.began
            share = probe.cut(budget, spent, *probe.estimate(self._runs(widened=True), *self._keyed(probes)))
            self.kept.put("budget", "share", share)
        if share < 1:
            before = sorted({cell.config.train.steps for cell in self._open()})
            # Of the steps that the words say: what equal time made of them is made again.
            cut = lambda cell: edit(cell.config, steps=max(int(cell.origin.train.steps * share), 1))
            self._replace(lambda cell: dataclasses.replace(cell, config=cut(cell)))
            if equal:
                self._equal_time(probes)
            after = sorted({cell.config.train.steps for cell in self._open()})
            steps = f"{share:.0%} of its steps, {_range(after)} in place of {_range(before)}"
            self._note(f"--budget {probe.spoken(budget)}: every run has {steps}, so that all fits")

    def _keyed(self, probes: Mapping[str, Mapping]) -> tuple[Mapping, Callable[[Config], Any]]:
        """The probes by program, and the program of a run, which runs share that differ in seeds and rates alone."""
        program = lambda config: json.dumps(configs.compiled(config), sort_keys=True)
        by = {program(cell.config): probes.get(self._program(cell), {}) for cell in self._open()}
        return by, program

    def _say(self, left: Sequence[Config], probes: Mapping[str, Mapping]) -> None:
        """One line: how many cells, how many of them are done, where they train, and about how long the rest takes."""
        done = sum(cell.origin not in self.ended and sweep.stored(cell.config) is not None for cell in self.cells)
        words = self.counted(done)
        if left and probes:
            about = sum(probe.estimate(left, *self._keyed(probes)))
            words += f", about {probe.spoken(about)} (probe of a step each)"
        elif left:
            about, untold = estimate.of(left)
            words += f", about {probe.spoken(about)} (by stored runs)" if not untold else ""
        self.announce(words)

    def counted(self, done: int) -> str:
        """How many cells there are, so many of them done, how many runs of tuning, and where they train, in words."""
        trials = [one for one in dict.fromkeys(self._trials(self._open())) if sweep.stored(one) is None]
        words = f"{len(self.cells)} cell{'s' * (len(self.cells) != 1)}, {done} already done"
        words += f", and {len(trials)} tuning runs" if trials else ""
        words += f", {self.engine.where}" if self.engine is not None and self.engine.where else ""
        jobs = self.options.engine.jobs
        return words if jobs in (None, 1) else f"{words}, up to {jobs} at once, so without times"

    # ---- nothing at all ----

    def foresee(self) -> set[Config]:
        """Have the cells be those that `rows` would train, as far as earlier runs of the study decided it, whether or
        not they can be; -> the variants of which it is still to be decided."""
        self.cells += baselines.baselines(self.cells) if self.options.baselines else []
        self.cells += baselines.ranges(self.cells) if self.options.ranges else []
        undecided: set[Config] = set()
        budget = self.match.budget if self.match is not None else None
        for cells in study.places(cells[0] for cells in study.variants(self.cells).values()).values():
            for cell in cells:
                if budget not in (None, "wallclock"):
                    assert self.match is not None
                    target = self.kept.get("targets", self._program(self.match.reference(cells, self.varied)))
                    if target is None or self.kept.get("solved", self._program(cell)) is None:
                        undecided.add(cell.variant)
                    else:
                        self._solve(cell, target)
                if self.tuning is not None and self.kept.get("tuned", self._program(cell)) is None:
                    undecided.add(cell.variant)
        if budget == "wallclock" or self.options.budget is not None:
            undecided |= set(study.variants(self.cells))  # by times of a probe
        elif self.tuning is not None:
            self._replace(lambda cell: cell if cell.variant in undecided else self._tuned(cell))
        return undecided

    # ---- tuning ----

    def _tune(self) -> None:
        if self.tuning is None:
            return
        tuning, cells = self.tuning, self._open()
        with self.bar("tuning", len(self._trials(cells))) as tell:
            counted = _Count(tell)
            for mine in study.places(cells).values():
                variants = [cells[0] for cells in study.variants(mine).values()]
                if any(self.kept.get("tuned", self._program(cell)) is None for cell in variants):
                    self._tune_place(variants, tuning, counted)
                if self.worker.stopped:
                    return
        self._replace(self._tuned)

    def _tune_place(self, variants: Sequence[Cell], tuning: tune.Tuning, counted: "_Count") -> None:
        """Tune the variants of one task and length, a knob after the other, and keep what was found."""
        curves: dict[Config, dict[str, list[tune.Point]]] = {cell.variant: {} for cell in variants}
        widened = False
        for knob in tuning.knobs:
            shared = configs.get(variants[0].config, knob)
            values = tune.spaced(knob, shared, tuning.points)
            points = self._points(variants, knob, values, curves, counted)
            if self.worker.stopped:
                return
            ends = [tune.edges(points[cell.variant]) for cell in variants]
            low, high = any(low for low, _ in ends), any(high for _, high in ends)
            more = tune.beyond(knob, shared, tuning.points, low, high)
            if more:
                widened = True
                counted.tell.grow(len(more) * len(variants) * tuning.seeds)
                added = self._points(variants, knob, more, curves, counted)
                if self.worker.stopped:
                    return
                rising = lambda one: one.value
                points = {variant: sorted([*found, *added[variant]], key=rising) for variant, found in points.items()}
            for cell in variants:
                curves[cell.variant][knob] = points[cell.variant]
        for cell in variants:
            steps = self._trial(cell, {})[0].train.steps
            found = tune.said(tuning, curves[cell.variant], steps, widened)
            self.kept.put("tuned", self._program(cell), found)

    def _points(
        self,
        variants: Sequence[Cell],
        knob: str,
        values: Sequence[float],
        curves: Mapping[Config, Mapping[str, Sequence[tune.Point]]],
        counted: "_Count",
    ) -> dict[Config, list[tune.Point]]:
        """Every variant's point at each value of a knob, the knobs before it at their best."""
        tuned = {
            variant: {key: tune.best(points).value for key, points in found.items()}
            for variant, found in curves.items()
        }
        runs = {
            (cell.variant, value): self._trial(cell, {**tuned[cell.variant], knob: value})
            for cell in variants
            for value in values
        }
        every = list(dict.fromkeys(one for ones in runs.values() for one in ones))
        of = {cell.variant: f"{cell.name} · " if cell.name else "" for cell in variants}
        names = {one: f"{of[variant]}{knob}={value:g}" for (variant, value), ones in runs.items() for one in ones}
        records = dict(zip(every, self._records(every, names, counted), strict=True))
        return {
            cell.variant: [
                tune.point(
                    value,
                    {**tuned[cell.variant], knob: value},
                    [records[one] for one in runs[cell.variant, value]],
                )
                for value in values
            ]
            for cell in variants
        }

    def _trial(self, cell: Cell, knobs: Mapping[str, float]) -> list[Config]:
        """The runs of one point of a variant."""
        assert self.tuning is not None
        greatest = max(configs.get(one.config, key) or 0 for one in self.cells for key in study.SEEDS)
        return [tune.trial(cell.config, self.tuning, knobs, at, greatest) for at in range(self.tuning.seeds)]

    def _tuned(self, cell: Cell) -> Cell:
        found = self.kept.get("tuned", self._program(cell))
        return dataclasses.replace(cell, config=edit(cell.config, **found["best"]), shared=cell.config, tuning=found)

    # ---- training ----

    def _train(self) -> list[dict]:
        """Train what every row needs -> the rows."""
        undecided = self.worker.stopped and (
            (self.match is not None and any(cell.matched is None for cell in self._open()))
            or (self.tuning is not None and any(cell.tuning is None for cell in self._open()))
        )
        wanted: dict[Config, dict | None] = {}
        # The seeds of a variant after one another: they share a compiled program.
        for cell in (cell for cells in study.variants(self.cells).values() for cell in cells):
            record = self.ended.get(cell.origin) or (sweep.UNREACHED if undecided else None)
            wanted.setdefault(cell.config, record)
            if cell.shared is not None:
                wanted.setdefault(cell.shared, record)
        every = list(wanted)
        names = {config: cell.name or "" for cell in self.cells for config in (cell.config, cell.shared or cell.config)}
        with self.bar("cells", len(every)) as tell:
            ended = {config: record for config, record in wanted.items() if record is not None}
            records = dict(zip(every, self._records(every, names, _Count(tell), ended), strict=True))
        return [
            study.row(cell, records[cell.config], self.varied, records.get(cell.shared) if cell.shared else None)
            for cell in self.cells
        ]

    def _records(
        self,
        every: list[Config],
        names: Mapping[Config, str],
        counted: "_Count",
        ended: dict[Config, dict] | None = None,
    ) -> list[dict]:
        """The record of every run; those that are not settled are trained. names: what runs are called."""
        with counted.from_here():
            counted.names = names
            return run.train_cells(
                every,
                self.worker,
                engine=self.engine,
                ended=ended or {},
                progress=counted,
                announce=self.announce,
                track=self.options.track,
            )

    def _ask(self, what: str, config: Config, **arguments: Any) -> Any:
        return self.worker.ask(what, stall=config.stall, config=configs.to_dict(config), **arguments)


class _Count:
    """Counts the runs of several calls as one. names: what they are called."""

    def __init__(self, tell: Cells):
        self.tell, self.before, self.latest = tell, 0, 0
        self.names: Mapping[Config, str] = {}

    @contextlib.contextmanager
    def from_here(self) -> Iterator[None]:
        self.before = self.latest
        yield

    def started(self, index: int, cell: Config) -> None:
        """A run of this call begins."""
        self.tell.started(index, cell, self.names.get(cell, ""))

    def stepped(self, index: int, step: int, total: int, loss: float | None) -> None:
        """It has taken a step."""
        self.tell.stepped(index, step, total, loss)

    def finished(self, index: int, count: int, record: dict) -> None:
        """It has its record."""
        self.latest = self.before + count + 1
        self.tell.finished(index, self.latest - 1, record)


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,}..{values[-1]:,}"
