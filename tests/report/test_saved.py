"""Rows of a file: read as data alone, refused with the place where they are odd; nothing that they name is run."""

import json
import math
import sys

import pytest
from report_rows import KEYS, cell, sample, written

from xformers_lab import record, spec
from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.report import patterns, saved

ODD = (None, -1, 0, 0.5, "x", "\ud800", True, [], [1], [None], [[1, 2, 3]], [["a", 1]], {}, {"a": [{}]})
ODD += (1e308, math.nan, math.inf, 10**400)


@pytest.fixture
def report(tmp_path, capsys):
    """report(value or text) draws a saved comparison again -> the exit code and what is said."""

    def draw(value):
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / "compare.json").write_text(text)
        code = main(["report", "--runs", str(tmp_path), "--csv", str(tmp_path / "rows.csv")])
        return code, capsys.readouterr().err

    return draw


def saved_rows(**changes) -> dict:
    return {"rows": [cell("full"), cell("linear", seq_len=128)], "varied": KEYS, "command": "xlab compare"} | changes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"rows": ' * 50_000, "nested too deeply"),
        ("", "Expecting value"),
        ("[]", "it holds no rows"),
        ("{}", "rows is missing, where a list should be"),
        (json.dumps(saved_rows(rows=[1])), "rows[0] is 1, where a mapping should be"),
        (json.dumps(saved_rows(notes=["cut", 3])), "notes is a list, where a list of texts should be"),
        (json.dumps(saved_rows(varied=["attention", 3])), "varied[1] is 3, where text should be"),
        (json.dumps(saved_rows(command=None)), "command is missing, where text should be"),
        (
            json.dumps(saved_rows(rows=[cell(), cell(curve=[[1]])])),
            "rows[1].curve is a list, where a list of points of 2 or 3 numbers",
        ),
        (
            json.dumps(saved_rows(rows=[cell() | {"metric": "0.9"}])),
            "rows[0].metric is '0.9', where a number should be",
        ),
        (
            json.dumps(saved_rows(rows=[cell() | {"seq_len": [64]}])),
            "rows[0].seq_len is a list, where one value should be",
        ),
        (
            json.dumps(saved_rows(rows=[cell(machine={"a": ["b"]})])),
            "rows[0].machine is a mapping, where texts should be",
        ),
        (json.dumps(saved_rows(rows=[cell(wrong=[1])])), "rows[0].wrong is a list, where a list of mappings should be"),
        (
            json.dumps(saved_rows(rows=[cell(tuning={"best": 3})])),
            "rows[0].tuning.best is 3, where a mapping should be",
        ),
        (
            json.dumps(saved_rows(rows=[cell(tuning={"points": {}})])),
            "rows[0].tuning.points is a mapping, where a list of mappings",
        ),
        (json.dumps(saved_rows(rows=[cell(config=["x"])])), "rows[0].config is a list, where a mapping should be"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_what_is_no_comparison_is_refused_in_one_line(report, text, words):
    code, said = report(text)
    assert code == 2 and words in said and len(said.strip().splitlines()) == 1 and len(said) < 400


@pytest.mark.full
@pytest.mark.parametrize("where", ["row", "config"])
def test_no_odd_value_ends_in_a_traceback(report, tmp_path, where):
    """Each is refused with its place, or is drawn with all others that are not."""
    keys = [*record.keys(), *record.PLACES, "attention", "heads", "dim", "unknown"]
    path, accepted, refused = tmp_path / "compare.json", [], 0
    for key in (key for key in keys if where == "row" or key != "config"):
        for odd in ODD:
            row = cell("linear", seq_len=128)
            if where == "row":
                row[key] = odd
            else:
                row.pop(key, None)
                row["config"][key] = row["config"]["model"][key] = odd
            path.write_text(json.dumps(saved_rows(rows=[cell(), row])))
            try:
                accepted.append(saved.read(path).rows[1])
            except UsageError as error:
                assert f"rows[1].{key}" in str(error) or f"rows[1].config.{key}" in str(error)
                refused += 1
    assert accepted and refused
    for start in range(0, len(accepted), 40):  # what few rows have is drawn as well
        assert report(saved_rows(rows=[cell(), *accepted[start : start + 40]])) == (0, "")


def test_rows_of_other_versions_are_read(report):
    assert report(saved_rows(rows=[{"status": "failed", "kind": "bench"}, {}, cell(of_tomorrow={"x": [1]})]))[0] == 0
    assert report(saved_rows(rows=[]))[0] == 0


# ---- nothing from outside ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["attention", "task", "model", "norm", "ffn", "depth", "position", "memory"])
@pytest.mark.parametrize("form", ["{path}", "{path}:a=1", "(pre:normaliser=({path}))", "full+{path}", "evil_module"])
def test_a_report_runs_nothing_that_its_rows_name(report, tmp_path, monkeypatch, key, form):
    monkeypatch.chdir(tmp_path)
    for name in ("evil.py", "evil_module.py"):
        (tmp_path / name).write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    row, value = cell(), form.format(path="./evil.py")
    row[key] = value
    (row["config"] if key == "task" else row["config"]["model"])[key] = value
    row["config"]["model"]["heads"] = 2
    assert report(saved_rows(rows=[row]))[0] == 0
    assert not (tmp_path / "ran").exists() and "evil_module" not in sys.modules


def test_a_mechanism_from_outside_is_drawn_where_it_ran_and_said_elsewhere(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from xformers_lab.attention.local import Local\n\n\nclass Mine(Local):\n    pass\n")
    cells = [drawable(str(path), 64), drawable("full", 64)]
    assert [picture.name for picture in patterns.figures(cells)] == ["full"]
    page = written(tmp_path / "r.html", cells, ["attention"])
    assert f"Not drawn, since a report runs no file that its rows name: {path}." in page
    spec.resolve("attention", str(path))  # as a comparison does
    assert [picture.name for picture in patterns.figures(cells)] == [str(path), "full"]
    assert patterns.left_out(cells) == []


# ---- who sees whom ----------------------------------------------------------------------------------------------


def drawable(attention: str, seq_len: int, **more) -> dict:
    row = cell(attention, "copy", seq_len) | more
    row["config"]["model"]["heads"] = 2
    return row


def test_patterns_are_drawn_at_a_length_at_which_they_differ():
    """A window of 64 sees all of 32 and of 64 positions."""
    cells = [drawable(name, n) for n in (32, 64, 128, 256) for name in ("full", "local:window=64")]
    full, local = patterns.figures(cells)
    assert full.path != local.path and full.note.startswith("causal, 128 positions")
    full, local = patterns.figures([row for row in cells if row["seq_len"] == 32])
    assert full.path != local.path and "128 positions, 64 of them drawn, a length that did not run" in local.note
    # At 2,048 positions, of which every 33rd is drawn, two narrow windows are both a diagonal.
    one, other = patterns.figures([drawable(f"local:window={n}", 2048) for n in (8, 12)])
    assert one.path != other.path and "64 positions, a length that did not run" in one.note


def test_patterns_that_never_differ_are_drawn_at_the_shortest_length():
    for picture in patterns.figures([drawable(name, n) for n in (96, 192) for name in ("full", "softcap")]):
        assert picture.note.startswith("causal, 96 positions")


def test_an_image_keeps_its_length():
    row = drawable("image_local", 64, plane=[8, 8])
    image, full = patterns.figures([row, drawable("full", 32)])
    assert image.note.startswith("causal, 64") and full.note.startswith("causal, 32")
    assert patterns.figures([drawable("full", 64, plane=[2**20, 2**20])]) == []


def test_rows_of_a_sample_have_their_pictures():
    assert len(patterns.figures([row | {"heads": 2} for row in sample()])) == 4
