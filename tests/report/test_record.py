"""The schema of a row: what writes rows keeps to it, and all that shows them takes a figure from it."""

import csv
import dataclasses
import io
import json
import typing

import pytest
import report_rows
from rich.console import Console

from xformers_lab import config as configs
from xformers_lab import files, record
from xformers_lab.bench import rows as bench_rows
from xformers_lab.bench.cells import PASSES, bench
from xformers_lab.check import cache
from xformers_lab.cli import main
from xformers_lab.compare import run
from xformers_lab.config import Config, edit
from xformers_lab.errors import ran_out_of_memory
from xformers_lab.report import html, human, pages, sheet, table
from xformers_lab.train import decoding, failures, loop, trained

TINY = {"task": "copy", "seq_len": 16, "dim": 16, "layers": 1, "batch": 4, "steps": 3, "eval_batches": 1}


@dataclasses.dataclass(kw_only=True)
class Longer(record.Record):
    """The schema with one more figure, which is all that adding one takes."""

    joules: float | None = record.figure(
        "energy", "significant", "Of one {step}.", unit=" J", better=-1, chart="Energy of it"
    )


CELLS = [report_rows.cell(seq_len=n, joules=n / 8) for n in (64, 128)]


def test_a_figure_added_to_the_schema_is_in_the_terminal_the_page_and_the_summary(tmp_path):
    page = io.StringIO()
    console = Console(file=page, width=200)
    table.print_rows(CELLS, report_rows.KEYS, console, schema=Longer)
    printed = page.getvalue().splitlines()
    at = next(number for number, line in enumerate(printed) if line.startswith("seq_len"))
    head, *lines = (line.split() for line in printed[at : at + 3])
    assert "energy" in head and {"8", "16"} <= {word for line in lines for word in line}
    text = report_rows.written(tmp_path / "r.html", CELLS, report_rows.KEYS, schema=Longer)
    body = text[text.index('<table id="cells">') :]
    assert '<button type="button">energy</button>' in body and '<td class="number" data-sort="16.0">16</td>' in body
    assert "<dt>energy</dt><dd>Of one training step.</dd>" in "".join(text.splitlines())
    assert "<h3>Energy of it by length</h3>" in text and "Less is better" in text and "<td>16 J</td>" in text
    pages.print_record(CELLS[1], console, schema=Longer)
    assert "16 J" in page.getvalue()
    page = report_rows.written(tmp_path / "o.html", CELLS, report_rows.KEYS)
    for other in (report_rows.printed(CELLS, report_rows.KEYS), page):
        assert "energy" not in other.lower()


def test_a_figure_added_to_the_schema_is_in_json_and_csv(tmp_path):
    cell = edit(Config(), **TINY)
    failed = {"status": "failed", "reason": "x"}
    assert "joules" not in run.row(cell, failed, [])
    assert run.row(cell, failed, [], Longer)["joules"] is None
    assert run.row(cell, {"status": "ok", "joules": 3.0}, [], Longer)["joules"] == 3.0
    assert bench_rows.blank([cell], PASSES[:1], True, Longer)[0].row["joules"] is None
    sheet.write_csv(CELLS, report_rows.KEYS, tmp_path / "rows.csv", Longer)
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [line["joules"] for line in csv.DictReader(file)] == ["8.0", "16.0"]


def test_every_form_has_its_function():
    assert set(human.FORMS) == set(typing.get_args(record.Form)) and {f.form for f in record.figures()} <= {
        *human.FORMS
    }
    assert human.alone(record.FIGURES["tokens_per_second"], 1234) == "1.2k tok/s"
    assert human.in_column(record.FIGURES["tokens_per_second"], 1234) == "1.2k"
    assert human.alone(record.FIGURES["tokens_per_second"], None) == human.NONE
    assert all(human.status({"status": status}) == words for status, words in record.STATUSES.items())
    assert set(record.SETTLED) < set(record.STATUSES) and record.IMPOSSIBLE not in record.STATUSES


def test_no_two_figures_share_a_name_or_a_heading():
    names, headings = [f.name for f in record.figures()], [f.heading for f in record.columns()]
    assert len(set(names)) == len(names) and len(set(headings)) == len(headings)
    assert set(record.SPEED.values()) <= set(names)


def test_a_record_has_the_keys_that_were_set_and_no_others():
    row = record.Record(status="ok", loss=None).to_dict()
    assert row == {"status": "ok", "loss": None}
    with pytest.raises(TypeError, match="los"):
        record.Record(los=1.0)  # type: ignore


def unknown(row: dict) -> set[str]:
    """The keys of a row that neither the schema nor its place nor its config give."""
    return row.keys() - {*record.keys(), *record.PLACES, *configs.KEYS}


@pytest.mark.full
def test_what_training_evaluation_and_a_comparison_write_is_in_the_schema(tmp_path):
    config = edit(Config(), **TINY, runs=str(tmp_path))
    done = loop.run(config)
    scored = trained.evaluate(configs.folder(config))
    row = run.row(config, done, ["dim"])
    assert unknown(done) == unknown(scored) == unknown(row) == set()
    assert row.keys() >= set(record.blank("compare")) and row["dim"] == 16
    assert json.loads((configs.folder(config) / "result.json").read_text()) == done
    with pytest.raises(failures.Diverged) as diverged:
        loop.run(edit(config, lr=1e30, steps=12, clip=0, optimizer="sgd"))
    assert unknown(diverged.value.record) == set() and diverged.value.record["status"] in record.SETTLED
    # A row of a diverged run has the keys of one that went well, but for what is scored and timed after its last step.
    after = {"split", "computation", "aux", "wrong", "maps", "eval_tokens_per_second", *decoding.FIGURES}
    assert done.keys() - diverged.value.record.keys() == after


def test_what_a_bench_writes_is_in_the_schema():
    (row,) = bench([edit(Config(), **TINY)], rounds=1, passes=PASSES[:1], check=False)
    assert row["status"] == "ok" and unknown(row) == set() and row.keys() >= set(record.blank("bench"))


# ---- CSV --------------------------------------------------------------------------------------------------------


def test_csv_has_every_row_and_no_formula(tmp_path, capsys):
    cells = report_rows.sample(report_rows.HOSTILE)
    (tmp_path / "compare.json").write_text(json.dumps({"rows": cells, "varied": report_rows.KEYS, "command": "xlab"}))
    path = tmp_path / "rows.csv"
    assert main(["report", "--runs", str(tmp_path), "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(cells)
    for line, cell in zip(lines, cells, strict=True):
        assert (line["task"], line["seq_len"], line["status"]) == (cell["task"], str(cell["seq_len"]), cell["status"])
        assert line["metric"] == ("" if cell["metric"] is None else repr(cell["metric"]))
        assert line["reason"] == cell.get("reason", "")
        assert not any(str(word).startswith(("=", "+", "-", "@")) for word in line.values())
    assert "curve" not in lines[0] and "config" not in lines[0]
    assert main(["report", "--runs", str(tmp_path), "--csv", str(tmp_path)]) == 2
    assert "a folder is there" in capsys.readouterr().err


# ---- what rows and files share ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), True),
        (RuntimeError("CUDA: Out of memory while allocating"), True),
        (RuntimeError("INTERNAL: no kernel"), False),
        (ValueError("memory=xl"), False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(error, memory):
    assert ran_out_of_memory(error) is memory


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    files.replace_text(path, "old")
    files.replace_text(path, "new \u2013")
    assert path.read_text(encoding="utf-8") == "new \u2013"

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.replace_text(path, "newest")
    assert path.read_text(encoding="utf-8") == "new \u2013" and list(path.parent.iterdir()) == [path]
    # A page says so to who asked for it; the verdict of a kit is only a cache.
    with pytest.raises(OSError, match="No space"):
        html.write_report(CELLS, report_rows.KEYS, path, title="t", command="c")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache.keep("full", {"failed": []}) == {"failed": []} and cache.known("full") is None
