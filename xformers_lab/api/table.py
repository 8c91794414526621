"""The rows of a comparison or a bench from Python: a table, a verdict in words, a page, a frame."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from xformers_lab.api.shown import Shown
from xformers_lab.terminal import visible

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

    from xformers_lab.report.scaling import Scaling

VARIANTS, COSTS = "Which variant, and what it costs", "What the mechanisms cost"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Table(Shown, Sequence[Mapping[str, Any]]):
    """A row for every cell, as `xl.compare` and `xl.bench` give it; printing it shows what the command prints.

    A row is a mapping: the keys that vary, status ("ok", or how it failed, with its reason), and what was measured.

    rows: the rows. varied: the keys that tell them apart. command: the command that does the same. notes: what was
    left out, cut or could not be. study: what was matched, tuned and repeated. interrupted: the signal that ended it
    before its end, 0 for none; the same call goes on from there. axes: of an ablation the names of the variants that
    swap each key, {"norm": ["norm=post"]}.
    """

    rows: list[dict[str, Any]]
    varied: list[str]
    command: str
    notes: list[str] = dataclasses.field(default_factory=list)
    study: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    interrupted: int = 0
    title: str = VARIANTS
    axes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    @overload
    def __getitem__(self, at: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, at: slice) -> "Table": ...

    def __getitem__(self, at: int | slice) -> "Mapping[str, Any] | Table":
        return dataclasses.replace(self, rows=self.rows[at]) if isinstance(at, slice) else self.rows[at]

    @property
    def ok(self) -> bool:
        """Whether every cell came to its end."""
        return all(row["status"] == "ok" for row in self.rows)

    def to_pandas(self) -> "pandas.DataFrame":
        """A row for each cell, as `--csv` writes it: what places and names it, then what was measured; a value within
        a value has a column of both names, "metric_interval.low". Curves and configs are left out: see the rows."""
        import pandas

        from xformers_lab.report import sheet

        return pandas.DataFrame(sheet.columns_of(self.rows, self.varied))

    def verdict(self) -> str:
        """Who won, by how much, at what cost, in sentences; only what tests carry. A line for each task and length that
        was compared, after its name, where there are several. Of an ablation, which choice mattered: for each task and
        length the largest difference from the base that each axis makes."""
        from xformers_lab.report import aggregate, findings, human, rows

        if self.axes:
            return "\n".join(self._mattered())

        groups = rows.groups(self.rows, self.varied)
        lines = []
        for group in groups:
            said = " ".join(human.plain(sentence) for sentence in findings.sentences(group))
            lines.append(f"{group.title}: {said}" if len(groups) > 1 else said)
        lines += [human.plain(sentence) for sentence in aggregate.sentences(groups)]
        return "\n".join(lines)

    def report(self, path: pathlib.Path | str) -> pathlib.Path:
        """Write one offline HTML file with charts, every cell and how it was measured; -> its path. Raises UsageError
        where it cannot be written."""
        from xformers_lab.report import exports, html

        path = pathlib.Path(path).expanduser()
        with exports.writing(path, "report"):
            about = {"title": self.title, "command": self.command, "said": self.notes, "scalings": self.fits()}
            html.write_report(self.rows, self.varied, path, **about)
        return path

    def csv(self, path: pathlib.Path | str) -> pathlib.Path:
        """Write the rows as CSV, as `--csv` does: the columns of `to_pandas`; -> its path. Raises UsageError where it
        cannot be written."""
        return self._export("csv", path)[0]

    def parquet(self, path: pathlib.Path | str) -> pathlib.Path:
        """Write the rows as Parquet, with the type of each column, as `--parquet` does; -> its path. Raises UsageError
        where it cannot be written."""
        return self._export("parquet", path)[0]

    def latex(self, path: pathlib.Path | str) -> pathlib.Path:
        """Write the table for a paper, which wants booktabs, as `--latex` does; -> its path. Raises UsageError where it
        cannot be written."""
        return self._export("latex", path)[0]

    def figures(self, folder: pathlib.Path | str) -> list[pathlib.Path]:
        """Write every picture of the report into a folder, as SVG and as PDF, as `--figures` does; -> the paths. Raises
        UsageError where they cannot be written."""
        return self._export("figures", folder)

    def _export(self, kind: str, path: pathlib.Path | str) -> list[pathlib.Path]:
        from xformers_lab.report import exports

        return exports.EXPORTS[kind](self.rows, self.varied, pathlib.Path(path).expanduser(), self.command, self.fits())

    def fits(self) -> "Sequence[Scaling]":
        """The fits over sizes, which only a scaling study has."""
        return ()

    def plain(self) -> Any:
        """What `--json` prints."""
        return self.rows

    def save(self, runs: pathlib.Path | str) -> pathlib.Path:
        """Keep the rows in a folder of runs, where `xlab report` finds them; -> the path. Raises RunFailed."""
        from xformers_lab.compare import run

        about = {"study": dict(self.study), "notes": self.notes}
        return run.save_table(self.rows, self.varied, self.command, str(runs), about)

    def draw(self, console: "Console") -> None:
        from rich.text import Text

        from xformers_lab.report import table

        table.print_rows(self.rows, self.varied, console)
        said = [f"note: {note}" for note in self.notes]
        for line in [*said, *(["", *self._mattered()] if self.axes else [])]:
            console.print(Text(visible(line)), soft_wrap=not console.is_terminal)

    def _mattered(self) -> list[str]:
        from xformers_lab.compare import ablate
        from xformers_lab.report import ablation

        return ablation.lines(self.rows, self.varied, self.axes, ablate.BASE)
