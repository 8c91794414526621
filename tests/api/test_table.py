"""The rows of a comparison from Python: a sequence, a frame, a verdict, a page, and what a notebook shows."""

import io
import json

import pandas
import pytest
from report_rows import PAYLOAD, cell, failed
from rich.console import Console
from study_rows import study

from xformers_lab.api.table import Table
from xformers_lab.errors import UsageError
from xformers_lab.report import findings, rows, saved, table

VARIED = ["seq_len", "seed", "attention"]


@pytest.fixture(scope="module")
def compared() -> Table:
    return Table(study(), VARIED, "xlab compare ...", ["a note"])


def test_it_is_a_sequence_of_rows(compared):
    assert len(compared) == len(list(compared)) == 42 and compared[0]["attention"] == "full"
    assert all(row["status"] == "ok" for row in compared) and compared.ok
    first = compared[:3]
    assert isinstance(first, Table) and first.rows == compared.rows[:3] and first.varied == VARIED
    assert not Table([failed("oom", "no memory")], [], "").ok


def test_a_frame_has_what_a_sheet_has(compared):
    frame = compared.to_pandas()
    assert len(frame) == len(compared) and list(frame["metric"]) == [row["metric"] for row in compared]
    assert {"attention", "seq_len", "seed", "tuning.best.lr", "matched.target"} <= set(frame.columns)
    assert str(frame["parameters"].dtype).startswith(("int", "float")) and "curve" not in frame
    means = frame[frame.role == "variant"].groupby(["seq_len", "attention"]).metric.mean()
    assert means[256, "linear"] == pytest.approx(0.95, abs=0.01)


def test_the_verdict_is_that_of_the_page(compared):
    (group,) = rows.groups(compared.rows, VARIED)
    assert compared.verdict() == " ".join(findings.sentences(group))
    two = Table([*study((0, 1)), *(row | {"task": "sort"} for row in study((0, 1)))], ["task", *VARIED], "")
    lines = two.verdict().splitlines()
    assert lines[0].startswith("mqar: At 1,024 tokens") and lines[1].startswith("sort: At 1,024 tokens")


def test_the_report_is_a_page_and_the_rows_are_kept(compared, tmp_path):
    page = compared.report(tmp_path / "new" / "page.html")
    assert "<title>Which variant" in page.read_text() and "a note" in page.read_text()
    kept = saved.read(compared.save(tmp_path))
    assert kept.rows == json.loads(json.dumps(compared.rows)) and kept.notes == ["a note"]
    with pytest.raises(UsageError, match="cannot write the report there"):
        compared.report(tmp_path)


def test_files_are_those_of_the_flags(compared, tmp_path):
    frame = compared.to_pandas()
    assert compared.csv(tmp_path / "rows.csv").read_text().splitlines()[0].split(",") == list(frame)
    assert pandas.read_parquet(compared.parquet(tmp_path / "rows.parquet")).metric.equals(frame.metric)
    assert compared.latex(str(tmp_path / "rows.tex")) == tmp_path / "rows.tex"
    assert "% xlab compare ..." in (tmp_path / "rows.tex").read_text()
    drawn = compared[:2].figures(tmp_path / "figures")
    assert {path.suffix for path in drawn} == {".svg", ".pdf"} and all(path.is_file() for path in drawn)
    with pytest.raises(UsageError, match="cannot write the CSV there"):
        compared.csv(tmp_path)


def test_an_ablation_says_which_choice_mattered():
    cells = [cell(name=name, metric=metric) for name, metric in (("base", 0.5), ("norm=post", 0.25))]
    swapped = Table(cells, ["attention"], "xlab ablate ...", axes={"norm": ["norm=post"]})
    assert "norm=post: -0.250 (one seed, so not tested)" in swapped.verdict()
    assert repr(swapped).endswith(swapped.verdict())


def test_what_is_shown_is_what_the_command_prints(compared, monkeypatch):
    page = io.StringIO()
    table.print_rows(compared.rows, VARIED, Console(file=page, width=160))
    plain = repr(compared)
    assert plain == f"{page.getvalue().rstrip()}\nnote: a note" and "\x1b" not in plain
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # where a console shows itself, whatever its file
    assert repr(compared) == plain
    monkeypatch.undo()
    shown = Console(file=io.StringIO(), record=True, width=100, force_terminal=True)
    shown.print(compared)
    text = shown.export_text()
    assert "linear" in text and "note: a note" in text and max(map(len, text.splitlines())) <= 100


def test_a_notebook_gets_html_in_which_nothing_is_markup():
    html = Table([cell(PAYLOAD), cell("full", metric=0.5)], ["attention"], "")._repr_html_()
    assert html.startswith("<pre") and "accuracy" in html and "color: #" in html
    assert "<script" not in html and "&lt;script&gt;" in html
