"""`xl.scale`: a comparison over sizes, with the curves of losses and where they cross."""

import dataclasses
import functools
import pathlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xformers_lab import config as configs
from xformers_lab import engines
from xformers_lab.api import arguments, studies
from xformers_lab.api.table import Table
from xformers_lab.compare.scaling import Scale, parted
from xformers_lab.compare.scaling import check as refuse
from xformers_lab.errors import UsageError
from xformers_lab.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console

    from xformers_lab.compare.study import Cell
    from xformers_lab.report.scaling import Scaling

SIZES = "Which variant at which size"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ScaleTable(Table):
    """A `Table` of a scaling study: the same rows, and beneath them the curves of losses over sizes.

    scale: what is fitted against what.
    """

    title: str = SIZES
    scale: Scale = dataclasses.field(default_factory=Scale)

    @classmethod
    def of(cls, table: Table, scale: Scale) -> "ScaleTable":
        """The same table with fits."""
        same = {field.name: getattr(table, field.name) for field in dataclasses.fields(Table) if field.name != "title"}
        return cls(**same, scale=scale)

    def fits(self) -> "Sequence[Scaling]":
        """The fits of each task and length, see `report.scaling`."""
        return self._fitted

    @functools.cached_property
    def _fitted(self) -> "Sequence[Scaling]":
        from xformers_lab.report import scaling

        return scaling.of(self.rows, self.varied, self.scale)

    def plain(self) -> dict[str, Any]:
        """{"fits": exponents, crossings and verdict of each task and length, "rows": the rows}, as `--json` prints
        it."""
        from xformers_lab.report import scaling_words

        return {"fits": [scaling_words.as_json(one) for one in self.fits()], "rows": self.rows}

    def verdict(self) -> str:
        """Where curves cross and how losses fall, in sentences; a line for each task and length."""
        from xformers_lab.report import human, scaling_words

        of_each = [(fit.title, " ".join(map(human.plain, scaling_words.sentences(fit)))) for fit in self.fits()]
        return "\n".join(f"{title}: {said}" if len(of_each) > 1 else said for title, said in of_each)

    def draw(self, console: "Console") -> None:
        from rich.text import Text

        from xformers_lab.report import human, listing, scaling_words, table

        say = lambda text: console.print(Text(visible(human.plain(text))), soft_wrap=not console.is_terminal)
        table.print_rows(self.rows, self.varied, console, judged=False)
        for note in self.notes:
            say(f"note: {note}")
        for fit in self.fits():
            say("")
            say(f"{fit.title}: {fit.scored} over {fit.sized}")
            if fit.curves:
                listing.print_listing(scaling_words.table(fit), console)
            for sentence in scaling_words.sentences(fit):
                say(sentence)
            for note in fit.notes:
                say(f"note: {note}")


@arguments.documented(study=True)
def scale(
    *what: arguments.What,
    x: str = "params",
    y: str = "loss",
    by: str | Sequence[str] | None = None,
    budget: str | float | None = None,
    skip_impossible: bool = False,
    check: bool = True,
    engine: str = "local",
    address: str | None = None,
    jobs: int | None = None,
    report: pathlib.Path | str | None = None,
    track: Sequence[str] = (),
    trust: bool = False,
    quiet: bool = False,
    **keys: Any,
) -> ScaleTable:
    """Fit the losses of variants over their sizes, and say where the curves cross, as `xlab scale` does.

        table = xl.scale(task="lm", attention=["full", "linear"], dim=[32, 48, 64, 96], seeds=3)
        print(table.verdict())
        table.fits()[0].pairs[0].crossings, table.plain()["fits"][0]["curves"][0]["exponent"]

    The cells are those of `xl.compare` with the same words, and are not trained twice. Keys that vary the size are dim,
    layers, heads and kv_heads, with numbers that follow them (another lr for each dim, in a recipe); all others name
    variants, unless `by` says which do. Baselines are not added, which have one size.

    Args:
        what: As `xl.compare` takes it; words may say x=, y= and by= as well, and win.
        x: What losses are set against: "params", without embeddings, positions and the head; "flops" of the whole
            training; "seconds" of it.
        y: "loss", on the test split, or "metric", as 1 - metric where more is better.
        by: The keys that name variants, "attention,norm"; all others then vary the size.
        budget: "30s", "10m", "2h", or seconds: fewer steps for every run alike, where all takes longer.
        skip_impossible: Keep combinations that cannot be as refused rows.
        check: Run the conformance check on mechanisms of your own before they train.
        engine: Where cells train: "local", "ray", "slurm:partition=gpu", or the path of an engine of your own.
        address: "HOST:PORT" of a Ray cluster.
        jobs: How many cells train side by side; with more than one they have no times. By default one on each host.
        report: Where the HTML goes (default: report.html in the folder of runs).
        track: Where else every step is shown: "tensorboard", "wandb".
        trust: Run code outside the package that an @file names.
        quiet: No progress on stderr.
        keys: Keys with their values; see `xl.compare`.

    Returns:
        The table, whose `verdict()` says where curves cross, and whose `fits()` have the numbers.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong, or there are fewer than three sizes, which is found
            before anything trains.
    """
    if not what and not keys:
        raise UsageError('scale what? For example: xl.scale(task="lm", attention=["full", "linear"], dim=[32, 64, 96])')
    words, said = parted(what)
    fitted = Scale.read(**{"x": x, "y": y, "by": by} | said)
    items = arguments.items(words, keys)
    page = studies.page_of(report)
    cells, varied, asked = study(items, fitted, trust=trust)
    options, flags = studies.options_of(
        baselines=False,
        range_control=False,
        budget=budget,
        skip_impossible=skip_impossible,
        check=check,
        track=track,
        engine=engines.chosen(engine, address, jobs),
    )
    flags = [flag for flag in flags if flag != "--no-baselines"]
    words = [*configs.spelled(items), *fitted.words]
    command = shlex.join(["xlab", "scale", *words, *flags, *(["--trust"] if trust else [])])
    table = ScaleTable.of(studies.conducted(cells, varied, asked, options, command, quiet=quiet), fitted)
    studies.ended(table, cells[0].origin.runs, page, quiet)
    return table


def study(
    items: Sequence[configs.Item], scale: Scale, *, trust: bool = False
) -> "tuple[list[Cell], list[str], configs.Study]":
    """The cells of a scaling study; raises UsageError where it is none, before anything compiles."""
    grid, varied, asked = configs.study(items, trust=trust)
    refuse(grid, varied, asked, scale)
    _refuse_equal(grid, varied, scale)
    from xformers_lab.compare.study import cells

    return cells(grid), varied, asked


def stored(folder: pathlib.Path | str, filters: Sequence[str], scale: Scale, command: str) -> ScaleTable:
    """The fits of what is stored: of a comparison's file, or of the one in a folder of runs; with filters, or without
    such a file, of the folder's runs. Raises UsageError where there is none."""
    from xformers_lab.report import saved
    from xformers_lab.report import stored as runs

    folder = pathlib.Path(folder)
    file = folder / "compare.json" if folder.is_dir() else folder
    if not filters and (file.is_file() or not folder.is_dir()):
        kept = saved.read(file)
        return ScaleTable(kept.rows, kept.varied, kept.command, kept.notes, scale=scale)
    if not folder.is_dir():
        raise UsageError(f"{' '.join(filters)}: {folder} is fitted whole; filters choose among the runs of a folder")
    picked, odd = runs.chosen(filters, folder)
    if not picked:
        raise UsageError(f"no run of {folder} fits {' '.join(filters)}".rstrip() if filters else f"no run in {folder}")
    varied = runs.differing(picked)
    left = [f"left out {place} ({why})" for place, why in odd.items()]
    return ScaleTable(runs.rows(picked, varied), varied, command, left, scale=scale)


def _refuse_equal(grid: Sequence[configs.Config], varied: Sequence[str], scale: Scale) -> None:
    """Raises UsageError where sizes by keys that may leave the parameters alone do so. Counted in shapes."""
    from xformers_lab.compare import scaling
    from xformers_lab.measure.power_law import LEAST
    from xformers_lab.supervise.process import Worker

    of_variant, of_size = scaling.keys(grid, varied, scale, configs.get)
    if not scaling.unmoved(of_size, scale.x):
        return
    name = lambda one: (one.task, one.seq_len, *(configs.get(one, key) for key in of_variant))
    first = [one for one in grid if name(one) == name(grid[0])]
    counted: dict[tuple, float] = {}
    with Worker(shown=False) as worker:
        for one in first:
            size = tuple(configs.get(one, key) for key in of_size)
            if size not in counted:
                about = {"config": configs.to_dict(one), "budget": "params"}
                counted[size] = worker.ask("compare.figures.measure", stall=one.stall, **about)
    if len(set(counted.values())) < LEAST:
        raise UsageError(
            f"{', '.join(of_size)}: sizes by these have {len(set(counted.values()))} different numbers of parameters, "
            f"and a fit takes {LEAST}: vary dim or layers, or say x=flops or x=seconds"
        )


def is_stored(word: str) -> bool:
    """Whether a word of a command names what is stored: a folder, or a .json file."""
    return "=" not in word and not word.startswith("@") and (pathlib.Path(word).is_dir() or word.endswith(".json"))
