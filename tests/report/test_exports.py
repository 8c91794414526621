"""Rows as CSV, Parquet and LaTeX: the same values, each of its type, and text that commands nothing."""

import csv
import math
import re

import pyarrow.parquet
import pytest
from report_rows import HOSTILE, KEYS, bench, cell, sample

from xformers_lab.cli import main
from xformers_lab.record import Record
from xformers_lab.report import latex, sheet

STUDY = {
    "matched": {"budget": "params", "target": 100, "reached": 101, "ok": True, "changed": {"dim": [64, 80]}},
    "shared": {
        "status": "ok",
        "metric": 0.4,
        "metric_interval": [0.3, 0.5],
        "knobs": {"lr": 0.003},
        "run_dir": "runs/a",
    },
    "tuning": {
        "knobs": ["lr", "clip"],
        "share": 0.25,
        "best": {"lr": 0.01},
        "edge": False,
        "points": [{"lr": 0.1}] * 2,
    },
    "by_length": [{"seq_len": 128, "metric": 0.3, "metric_interval": [0.2, 0.4]}, {"seq_len": 256, "metric": 0.2}],
    "role": "baseline",
    "name": "LSTM",
    "flops_per_token": 1234.5,
    "wrong": [{"input": "a", "answer": "b", "said": "c"}],
    "maps": {"tokens": ["a"], "layers": [[[[255]]]]},
}
WANTED = {
    "matched.budget": "params",
    "matched.ok": True,
    "matched.changed.dim.from": 64,
    "matched.changed.dim.to": 80,
    "shared.metric_interval.low": 0.3,
    "shared.knobs.lr": 0.003,
    "tuning.knobs": "lr, clip",
    "tuning.best.lr": 0.01,
    "tuning.edge": False,
    "by_length.128.metric": 0.3,
    "by_length.128.metric_interval.high": 0.4,
    "by_length.256.metric": 0.2,
    "role": "baseline",
    "name": "LSTM",
    "flops_per_token": 1234.5,
}


def table(text: str) -> list[list[str]]:
    """The cells of every line of LaTeX that ends in two backslashes."""
    lines = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r" \\")]
    return [[each.strip() for each in re.split(r"(?<!\\)&", line)] for line in lines]


def test_csv_and_parquet_hold_what_a_study_adds(tmp_path):
    cells = [cell(), cell("linear", **STUDY)]
    sheet.write_csv(cells, KEYS, tmp_path / "rows.csv")
    sheet.write_parquet(cells, KEYS, tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open() as file:
        first, second = csv.DictReader(file)
    parquet = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    for key, value in WANTED.items():
        assert second[key] == str(value) and first[key] == ""
        assert parquet[key].to_pylist() == [None, value] and type(parquet[key].to_pylist()[1]) is type(value)
    assert parquet.column_names == list(second), "one set of columns, in one order"
    assert not {"curve", "config", "wrong", "maps", "tuning.points"} & set(second)
    metrics = [name for name in second if name.startswith("matched")]
    assert list(second)[list(second).index(metrics[0]) :][: len(metrics)] == metrics, (
        "what belongs together is together"
    )


def test_every_column_of_parquet_has_one_type(tmp_path):
    cells = [cell(steps=3, metric=1, higher_is_better=True, loss=math.nan), cell("linear", steps=4.5, metric=10**30)]
    cells[0]["attention"] = "a\nb"
    cells[1] |= {"parameters": 2**70, "chance": None, "skipped": 0}
    sheet.write_parquet(cells, [*KEYS, "lr", "heads"], tmp_path / "rows.parquet")
    read = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    kinds = {field.name: str(field.type) for field in read.schema}
    wanted = {"seq_len": "int64", "steps": "double", "metric": "double", "parameters": "double", "attention": "string"}
    wanted |= {"higher_is_better": "bool", "skipped": "int64", "lr": "double"}
    assert {name: kinds[name] for name in wanted} == wanted and "heads" not in kinds
    assert read["attention"].to_pylist() == ["a b", "linear"] and read["skipped"].to_pylist() == [None, 0]
    assert math.isnan(read["loss"].to_pylist()[0])


def test_latex_has_a_table_for_each_task_with_intervals(tmp_path):
    latex.write(sample(seeds=(0, 1, 2)), [*KEYS, "seed"], tmp_path / "rows.tex", "xlab compare 50%\nof\x1b")
    text = (tmp_path / "rows.tex").read_text()
    assert text.startswith("% xlab compare 50% of\\x1b\n% \\usepackage{booktabs}\n")
    for word in ("table", "tabular"):
        assert text.count(rf"\begin{{{word}}}") == text.count(rf"\end{{{word}}}") == 2
    assert all(text.count(rule) == 2 for rule in (r"\toprule", r"\bottomrule"))
    assert r"\label{tab:mqar}" in text and r"\label{tab:lm}" in text
    assert "Mean over 2 to 3 seeds $\\pm$ half the 95\\,\\% interval" in text and "Chance: 0.125" in text
    lines = table(text)
    columns = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert {len(line) for line in lines} == {len(columns[0])} == {len(columns[1])}
    assert lines[0] == ["attention", "length", "accuracy", "tokens/s", "memory", "parameters"]
    full = next(line for line in lines if line[:2] == ["full", "128"])
    assert re.fullmatch(r"\\textbf\{0\.9\d\d \$\\pm\$ 0\.00\d\}", full[2])


def test_a_point_of_which_all_failed_says_how(tmp_path):
    cells = [cell(), cell("linear") | {"status": "oom", "metric": None}]
    latex.write(cells, KEYS, tmp_path / "rows.tex", "xlab")
    assert table((tmp_path / "rows.tex").read_text())[2][1] == r"\emph{out of memory}"


@pytest.mark.parametrize("tested", [False, True])
def test_bold_needs_an_interval(tmp_path, tested):
    """One seed on a whole test split tests nothing; on a sample of it the interval tells the first from the last."""

    def of(metric: float) -> dict:
        return {"metric": metric} | ({"metric_interval": [metric - 0.02, metric + 0.02]} if tested else {})

    cells = [cell("full", **of(0.9)), cell("local", **of(0.89)), cell("linear", **of(0.5))]
    latex.write(cells, KEYS, tmp_path / "rows.tex", "xlab")
    bold = [line[0] for line in table((tmp_path / "rows.tex").read_text()) if r"\textbf" in line[1]]
    assert bold == (["full", "local"] if tested else [])
    assert ("Bold:" in (tmp_path / "rows.tex").read_text()) == tested


def test_latex_of_a_study_has_both_recipes_and_says_what_is_unmatched(tmp_path):
    shared = lambda metric: {"status": "ok", "metric": metric}
    cells = [cell("full", seed=seed, metric=0.9, shared=shared(0.5 + seed / 10)) for seed in (0, 1)]
    cells += [cell("linear", seed=seed, matched={"ok": False}) for seed in (0, 1)]
    cells += [cell("full", seed=seed, dim=7, name="LSTM", role="baseline") for seed in (0, 1)]
    for row in cells[-2:]:
        row["config"] = row["config"] | {"model": row["config"]["model"] | {"attention": "none"}}
        row["attention"] = "none"
    latex.write(cells, [*KEYS, "seed", "norm"], tmp_path / "rows.tex", "xlab")
    text = (tmp_path / "rows.tex").read_text()
    lines = table(text)
    assert lines[0][:4] == ["attention", "norm", "accuracy (shared recipe)", "accuracy (tuned)"]
    assert lines[1][2] == r"0.550 $\pm$ 0.635" and lines[1][3] == r"0.900 $\pm$ 0.000"
    assert lines[2][:3] == [r"linear$^{\dagger}$", "pre", "--"] and r"$^{\dagger}$: does not meet the budget" in text
    assert lines[3][:2] == ["LSTM", "--"]


def test_nothing_is_bold_where_nothing_is_told_apart(tmp_path):
    cells = [
        cell("full", metric=0.5, metric_interval=[0.4, 0.6]),
        cell("local", metric=0.51, metric_interval=[0.4, 0.6]),
    ]
    latex.write(cells, KEYS, tmp_path / "rows.tex", "xlab")
    assert r"\textbf" not in (tmp_path / "rows.tex").read_text()


def test_latex_of_a_bench(tmp_path):
    cells = [bench("full", 128, 0.01, 2.0), bench("linear", 128, 0.002, 1.0)]
    latex.write(cells, ["attention", "seq_len", "pass"], tmp_path / "rows.tex", "xlab bench")
    assert table((tmp_path / "rows.tex").read_text())[:2] == [
        ["attention", "time", "memory"],
        ["full", "10 ms", "512 B"],
    ]


# ruff: noqa: RUF001
SIGNS = r"""\{}&%$#_~^<>|"`'[]*-, é ß µ × ± – · 中 😀 Ð \input{x} \\ $x^2$ %comment"""


@pytest.mark.parametrize("text", [SIGNS, *HOSTILE], ids=range(len(HOSTILE) + 1))
def test_text_in_latex_is_no_command(tmp_path, text):
    cells = [cell(text), cell("linear")]
    cells[0]["metric_name"] = cells[1]["metric_name"] = text
    latex.write(cells, KEYS, tmp_path / "rows.tex", text)
    page = (tmp_path / "rows.tex").read_text()
    head, _, body = page.partition("\n")
    assert head.isascii() and head.startswith("% ")
    ours = {"begin", "end", "usepackage", "centering", "caption", "label", "toprule", "midrule", "bottomrule", "pm"}
    ours |= {"times", "mu", "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"}
    ours |= {"textasciigrave", "textquotesingle", "textperiodcentered"}
    commands = re.findall(r"\\([a-zA-Z]+)", body.replace("\\\\", ""))
    assert set(commands) <= ours
    bare = re.sub(r"\\[{}&%$#_,\\]", "", body)  # without what is escaped
    assert bare.count("{") == bare.count("}") and "#" not in bare and "^" not in bare and "~" not in bare
    assert bare.count("$") % 2 == 0 and bare.count("_") == 0 and bare.count("%") == 1
    assert all(sign.isascii() or sign in "éß" for sign in body)
    assert {line.count("&") for line in bare.splitlines() if "&" in line} == {4}


def test_a_range_of_numbers_is_not_a_dash():
    assert latex.escaped("a--b,,c [x] 中") == "a-{}-{}b,{},{}c {[}x{]} {[}U+4E2D{]}"


def test_a_file_that_cannot_be_written_is_one_message(tmp_path, capsys):
    from stored_runs import stored

    stored(tmp_path / "runs")
    (tmp_path / "shut").write_text("")
    for flag in ("--csv", "--parquet", "--latex"):
        words = ["runs", "--runs", str(tmp_path / "runs"), flag, str(tmp_path / "shut" / "x")]
        assert main(words) == 2 and "is no folder" in capsys.readouterr().err


def test_every_single_value_of_the_schema_is_a_column(tmp_path):
    """A field that rows get later is exported without a word here."""
    row = cell() | {"eval_tokens_per_second": 5.0, "prefill_seconds": 0.5, "token_seconds": 0.25, "state_bytes": 7}
    heads = sheet.columns_of([row], KEYS, Record)
    assert {"eval_tokens_per_second", "prefill_seconds", "token_seconds", "state_bytes"} <= set(heads)
