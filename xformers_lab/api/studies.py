"""`xl.compare`, `xl.ablate` and `xl.bench`, and what `xlab compare`, `ablate` and `bench` print."""

import contextlib
import dataclasses
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from xformers_lab import config as configs
from xformers_lab import engines, spec
from xformers_lab.api import arguments, supervised
from xformers_lab.api.table import COSTS, Table
from xformers_lab.errors import UsageError, nearest
from xformers_lab.train import trackers

if TYPE_CHECKING:
    from xformers_lab.compare.conduct import Options
    from xformers_lab.compare.dry import Plan
    from xformers_lab.compare.study import Cell

Passes = Literal["forward", "both", "decode"]
# What a bench may time, by what it is called.
PASSES: dict[Passes, tuple[str, ...]] = {
    "forward": ("forward",),
    "both": ("forward", "forward+backward"),
    "decode": ("prefill", "decode"),
}


@arguments.documented(study=True)
def compare(
    *what: arguments.What,
    baselines: bool = True,
    range_control: bool = False,
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
) -> Table:
    """Train a grid of configs and compare accuracy, speed and memory, as `xlab compare` does.

        table = xl.compare(task="copy", attention=["full", "local:window=64"], seq_len=[128, 256], seeds=3)
        table = xl.compare("task=copy", "attention=full,local:window=64", tune="lr", match="params")
        table.to_pandas(), table.verdict(), table.report("report.html")

    A list is swept, and every combination is a cell. Cells are trained one at a time in a process of its own, so that
    one that hangs or crashes is a row with its reason; `jobs` and `engine` train several at once. Finished ones are
    read, not trained again. On Ctrl-C, or the interrupt of a notebook, what trains saves itself and the table of what
    was reached comes back, with `interrupted` set; the same call goes on from there. The rows and the page stand in the
    folder of runs too, as the command leaves them.

    Args:
        what: Words as on the command line ("attention=full,linear", "seq_len=128..512:x2", "@study.toml"), mappings of
            keys to values, flat or in sections, a `xformers_lab.config.Config`, or a list of mappings and configs.
            Later ones win.
        baselines: Add what stands beside the variants: bag of tokens, LSTM, full attention with rotary positions.
        range_control: Add the first variant with windows of several sizes: whether the task needs long range at all.
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
        keys: Keys with their values, which win over `what`: attention=["full", "local:window=64"], seeds=3. A choice
            may be a class of your own, attention=["full", MyAttention], or one with options,
            functools.partial(MyAttention, reach=8); its source is kept with the runs.

    Returns:
        The table: a row for each variant, length and seed, and for each baseline.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong, which is found before anything trains.
    """
    if not what and not keys:
        raise UsageError('compare what? For example: xl.compare(task="copy", attention=["full", "linear"])')
    items = arguments.items(what, keys)
    page = page_of(report)
    grid, varied, asked = configs.study(items, trust=trust)
    from xformers_lab.compare import study

    options, flags = options_of(
        baselines=baselines,
        range_control=range_control,
        budget=budget,
        skip_impossible=skip_impossible,
        check=check,
        track=track,
        engine=engines.chosen(engine, address, jobs),
    )
    command = shlex.join(["xlab", "compare", *configs.spelled(items), *flags, *(["--trust"] if trust else [])])
    return ended(conducted(study.cells(grid), varied, asked, options, command, quiet=quiet), grid[0].runs, page, quiet)


@arguments.documented(study=True)
def ablate(
    *what: arguments.What,
    baselines: bool = True,
    range_control: bool = False,
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
) -> Table:
    """Swap one choice of a base config at a time, and say which mattered, as `xlab ablate` does.

        table = xl.ablate(task="copy", norm=["pre", "post"], position=["learned", "rope"], seeds=3)
        table = xl.ablate("base.toml", seeds=3)
        print(table.verdict())

    A key with a list is an axis, and its base is what a file or an earlier word says, else the first of the list. Each
    choice of the base that is not the laboratory's default is set back to it, alone, too. Everything else is as in
    `xl.compare`.

    Args:
        what: As `xl.compare` takes it; a file may go without its @.
        baselines: Add what stands beside the variants: bag of tokens, LSTM, full attention with rotary positions.
        range_control: Add the base with windows of several sizes: whether the task needs long range at all.
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
        The table, named "base", "norm=post" and so on; `verdict()` has the largest difference of each axis.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong, or nothing is left to swap, which is found before
            anything trains.
    """
    if not what and not keys:
        raise UsageError('ablate what? For example: xl.ablate("base.toml", norm=["pre", "post"], seeds=3)')
    items = arguments.items(what, keys)
    page = page_of(report)
    from xformers_lab.compare import ablate

    plan = ablate.ablation(items, trust=trust)
    options, flags = options_of(
        baselines=baselines,
        range_control=range_control,
        budget=budget,
        skip_impossible=skip_impossible,
        check=check,
        track=track,
        engine=engines.chosen(engine, address, jobs),
    )
    command = shlex.join(["xlab", "ablate", *configs.spelled(items), *flags, *(["--trust"] if trust else [])])
    table = conducted(plan.cells, plan.varied, plan.study, options, command, quiet=quiet, axes=plan.axes)
    return ended(table, plan.cells[0].origin.runs, page, quiet)


def conducted(
    cells: "list[Cell]",
    varied: list[str],
    asked: configs.Study,
    options: "Options",
    command: str,
    *,
    quiet: bool = False,
    lines: bool = True,
    axes: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """Train the cells of a study -> its table. command: what made it; quiet: no progress on stderr; lines: a line for
    each cell where that is no terminal; axes: of an ablation, see `Table`."""
    trackers.require(options.track)
    from xformers_lab import progress
    from xformers_lab.compare.conduct import Conductor
    from xformers_lab.supervise.process import Worker

    nothing = lambda what, total: contextlib.nullcontext(progress.Cells(total, None, True, varied, what))
    bar = lambda what, total: progress.cells(total, varied, quiet=not lines, what=what)
    announce = (lambda text: None) if quiet else progress.say
    with Worker(shown=False) as worker:
        conductor = Conductor(cells, varied, asked, options, worker, bar=nothing if quiet else bar, announce=announce)
        rows = conductor.rows()
    about = {"study": dataclasses.asdict(asked), "interrupted": worker.stopped, "axes": axes or {}}
    return Table(rows, varied, command, conductor.notes, **about)


def planned(cells: "list[Cell]", varied: list[str], asked: configs.Study, options: "Options") -> "Plan":
    """What `conducted` would do; nothing is started."""
    from xformers_lab import progress
    from xformers_lab.compare import dry
    from xformers_lab.compare.conduct import Conductor
    from xformers_lab.supervise.process import Worker

    nothing = lambda what, total: contextlib.nullcontext(progress.Cells(total, None, True, varied, what))
    with Worker() as worker:  # which is not begun
        return dry.plan(Conductor(cells, varied, asked, options, worker, bar=nothing))


@arguments.documented()
def bench(
    *what: arguments.What,
    passes: Passes = "both",
    rounds: int = 5,
    check: bool = True,
    report: pathlib.Path | str | None = None,
    trust: bool = False,
    quiet: bool = False,
    **keys: Any,
) -> Table:
    """Time attention mechanisms alone over lengths: speed, FLOPs and memory, as `xlab bench` does.

        table = xl.bench(attention=["full", "local:window=32"], seq_len=[128, 256, 512])

    Args:
        what: As `xl.compare` takes it.
        passes: "forward"; "both", forward and forward+backward; or "decode": reading a context of seq_len into a
            cache, and one token behind it.
        rounds: Interleaved rounds.
        check: Run the conformance check on mechanisms of your own before they are timed.
        report: Where the figures go as one HTML file; by default nowhere.
        trust: Run code outside the package that an @file names.
        quiet: No progress on stderr.
        keys: Keys with their values; see `xl.compare`.

    Returns:
        The table: a row for each mechanism, length and pass.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong.
    """
    if passes not in PASSES:
        raise UsageError(f'passes="{passes}": {nearest(str(passes), PASSES, "passes")}')
    if rounds < 1:
        raise UsageError(f"rounds={rounds}: at least 1")
    page, items = page_of(report), arguments.items(what, keys)
    flags = ["--rounds", str(rounds), "--pass", passes, *([] if check else ["--no-check"])]
    command = shlex.join(["xlab", "bench", *configs.spelled(items), *flags])
    how = {"rounds": rounds, "passes": passes, "check": check, "trust": trust, "quiet": quiet}
    table = timed(items, command, **how)
    if page is not None:
        table.report(page)
    _end(table, quiet)
    return table


def timed(
    items: Sequence[configs.Item],
    command: str,
    *,
    rounds: int,
    passes: Passes,
    check: bool,
    trust: bool,
    quiet: bool = False,
    lines: bool = True,
) -> Table:
    """The table of a bench; see `bench`, and `conducted` for the last two."""
    cells, varied = configs.sweep(items, trust=trust)
    from xformers_lab import progress
    from xformers_lab.bench import rows as bench_rows
    from xformers_lab.bench import supervised as measured
    from xformers_lab.report import human
    from xformers_lab.supervise import process

    how = {"rounds": rounds, "passes": PASSES[passes], "check": check}
    telling = contextlib.nullcontext(lambda text: None) if quiet else progress.words(quiet=not lines)
    with process.Worker(notice=process.ENDS) as worker, telling as tell:
        rows = measured.bench(cells, worker, progress=tell, **how)
    vain = bench_rows.unused(cells)
    verb = "plays" if len(vain) == 1 else "play"
    notes = [f"A bench times attention alone: {human.listing(vain)} {verb} no part in it."] if vain else []
    return Table(rows, [*varied, "pass"], command, interrupted=worker.stopped, title=COSTS, notes=notes)


def options_of(
    *,
    baselines: bool,
    range_control: bool,
    budget: str | float | None,
    skip_impossible: bool,
    check: bool,
    track: Sequence[str],
    engine: engines.Chosen,
) -> "tuple[Options, list[str]]":
    """What a study does beside its cells, and the flags that say so."""
    from xformers_lab.compare import probe
    from xformers_lab.compare.conduct import Options

    limit = f"{budget:.3f}s" if isinstance(budget, int | float) else budget
    options = Options(
        baselines=baselines,
        ranges=range_control,
        budget=None if limit is None else probe.seconds(limit),
        skip_impossible=skip_impossible,
        kit=check,
        track=tuple(track),
        engine=engine,
    )
    flags = {"--no-baselines": not baselines, "--range-control": range_control, "--no-check": not check}
    flags |= {"--skip-impossible": skip_impossible, f"--budget={limit}": limit is not None}
    return options, [*(flag for flag in flags if flags[flag]), *engine.flags]


def page_of(report: pathlib.Path | str | None) -> pathlib.Path | None:
    """Where a page is asked for; what cannot be written is refused before anything runs."""
    return None if report is None else spec.writable(spec.located(report, f"report={report}"), f"report={report}")


def ended(table: Table, runs: str, page: pathlib.Path | None, quiet: bool) -> Table:
    """Keep the rows and the page of a study as its command does."""
    saved = table.save(runs)
    table.report(page or saved.parent / "report.html")
    _end(table, quiet)
    return table


def _end(table: Table, quiet: bool) -> None:
    """Say that a table is not whole; a signal that meant the whole process ends it now."""
    if table.interrupted and not quiet:
        from xformers_lab.progress import say

        say("interrupted: the table has what was reached; the same call goes on from there")
    supervised.pass_on(table.interrupted)
