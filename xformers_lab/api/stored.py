"""`xl.load` and `xl.runs`: stored runs, by what the command line calls them."""

import pathlib
from typing import TYPE_CHECKING, Any

from xformers_lab import named_run, spec
from xformers_lab.api.run import Run
from xformers_lab.api.shown import Shown
from xformers_lab.report import human, stored

if TYPE_CHECKING:
    import pandas
    from rich.console import Console


class Runs(Shown, list[Run]):
    """Stored runs, as `xl.runs` gives them: a list that is shown as a table."""

    def to_pandas(self) -> "pandas.DataFrame":
        """A row for each: id, status, step, when, folder, every key of the config, and what was measured."""
        import pandas

        keys = [key for key in stored.known() if key not in (*stored.LONG, "config", "seal")]
        frame = pandas.DataFrame([{key: run.stored.value(key) for key in keys} for run in self])
        return frame.dropna(axis=1, how="all")

    def draw(self, console: "Console") -> None:
        from xformers_lab.report import listing

        if not self:
            console.print("no runs")
            return
        every = [run.stored for run in self]
        varied = [key for key in stored.differing(every) if key not in ("task", "attention", "seq_len", "seed")]
        keys = ["id", "task", "attention", "seq_len", *varied, "seed", "progress", "metric", "metric_name"]
        said = lambda run, key: run.progress if key == "progress" else human.plain(_word(run.value(key)))
        listing.print_listing([{key: said(run, key) for key in keys} for run in every], console)


def _word(value: Any) -> str:
    return human.score(value) if isinstance(value, float) else spec.show(value)


def load(
    run: str | pathlib.Path | Run = named_run.LAST, *, runs: pathlib.Path | str = "runs", trust: bool = False
) -> Run:
    """A stored run.

        run = xl.load("last")
        run.config, run.metrics, run.evaluate(seq_len=256), run.generate("def ")

    Args:
        run: Its folder, its name, its id or the start of it, or "last" for the one that began last.
        runs: The folder of runs, in which ids and "last" are looked for.
        trust: Run code outside the package that its config names, though it is not what the run was trained with.

    Raises:
        xformers_lab.errors.UsageError: There is no such run.
    """
    if isinstance(run, Run):
        return Run(run.folder, trust=trust)
    return Run(named_run.folder(str(run), spec.located(runs, "runs")), trust=trust)


def runs(
    *what: str, runs: pathlib.Path | str = "runs", sort: str = "when", reverse: bool = False, **filters: Any
) -> Runs:
    """The stored runs that fit, the one that began last at the end.

        xl.runs(task="copy", status="ok", sort="metric")
        xl.runs("attention=local").to_pandas()

    Args:
        what: As `xlab runs` takes it: folders, ids or the start of them, "last", and filters, key=value.
        runs: The folder of runs.
        sort: In rising order of a key of the config or the record, "metric" say.
        reverse: In falling order.
        filters: Keys with the value, or a list of the values, that a run must have.

    Returns:
        A list of `Run`, which is shown as a table and has `to_pandas()`.

    Raises:
        xformers_lab.errors.UsageError: No run is called so, or there is no such key.
    """
    of = lambda value: ",".join(map(spec.show, value)) if isinstance(value, list | tuple) else spec.show(value)
    words = [*what, *(f"{key}={of(value)}" for key, value in filters.items())]
    key = stored.key_of(sort, f"sort={sort}")
    picked, odd = stored.chosen(words, spec.located(runs, "runs"))
    if odd:
        from xformers_lab.progress import say

        say(f"left out: {human.listing([f'{folder} ({why})' for folder, why in odd.items()], 4)}")
    return Runs(Run(run.folder) for run in stored.ordered(picked, key, reverse=reverse))
