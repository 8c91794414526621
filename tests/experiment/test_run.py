"""An experiment from its file to the pages: run, judged, kept, resumed, refused."""

import dataclasses
import json
import pathlib
import re

import pytest

from xformers_lab import spec
from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.experiment import result, words

FILE = '''"""Is a model of width 16 any good after three steps?"""

from xformers_lab.experiment import Claim, at_least, at_most, bench, compare, reported, slope

CLAIM = Claim(says="It is <b>not</b>.", source="A | paper", literature="1.0", doubt="More steps.", minutes=1, seeds=2)
STUDIES = {
    "train": compare(
        "task=copy attention=full,linear seq_len=16 test_len=32 position=rope dim=16 layers=1 batch=4 steps=3 "
        "eval_batches=1"
    ),
    "time": bench("attention=full seq_len=16,32 dim=16 batch=1", rounds=2, passes="forward"),
}


def judge(tables):
    full = tables["train"].metric(attention="full")
    flops = {length: tables["time"].value("flops", seq_len=length) for length in (16, 32)}
    return [
        at_most("accuracy", full, 0.9),
        at_most("exponent of FLOPs", slope(flops), BOUND),
        reported("at 32 tokens less at 16", tables["train"].metric(attention="full", test_len=32) - full),
        reported("seconds", tables["time"].seconds(seq_len=32)),
    ]
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one test has trained, the others read."""
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    spec._from_file.cache_clear()  # a process runs the code that it found first
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE.replace("BOUND", "2.5"))
    return tmp_path


def test_from_the_file_to_the_pages(mine, runs, capsys):
    command = ["experiment", "run", "mine.py", "--runs", runs]
    assert main([*command, "--report", "page.html"]) == 0
    said = capsys.readouterr()
    assert "mine claims: It is <b>not</b>." in said.out
    assert "mine: reproduced" in said.out and "at most 0.9: holds" in said.out and "of a quiet machine" in said.out
    kept = result.read(mine / "experiments" / "results", "mine")[1]
    assert kept.verdict == "reproduced" and list(kept.seeds) == [0, 1] and kept.minutes > 0 and kept.machine["cores"]
    assert [measured.n for measured in kept.measurements] == [2, 1, 2, 2]
    assert all((mine / "experiments" / "results" / name).exists() for name in kept.figures) and kept.figures
    page, html = ((mine / "experiments" / name).read_text() for name in ("RESULTS.md", "RESULTS.html"))
    assert "reproduced" in page and "extrapolation" in page  # the others stand there as not run
    assert kept.commands["train"] in page
    trained = [variant for variant in kept.variants if variant.study == "train"]
    assert {variant.choices["attention"] for variant in trained} == {"full", "linear"}
    assert all(variant.n == 2 and variant.mean is not None and variant.costs["state_bytes"] for variant in trained)
    assert [variant.seq_len for variant in kept.variants if variant.study == "time"] == [16, 32]
    assert "train: copy (chance 0.100):" in page and "| linear | 16 |" in page
    assert "<summary>train: copy (chance 0.100): 2 rows</summary>" in html
    assert "&lt;b&gt;not&lt;/b&gt;" in html and "<b>not" not in html and "<svg" in html
    assert not re.search(r"(src|href)=\"(?!#)", html)  # it fetches nothing

    # The page of this run: its experiments alone, with every chart of theirs.
    report = (mine / "page.html").read_text()
    assert "at most 0.9" in report and "of a quiet machine" in report and "extrapolation" not in report
    assert not re.search(r"(src|href)=\"(?!#)", report) and report.count("<svg") > len(kept.figures)

    # Nothing trains twice: a finished study is read.
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(runs).rglob("result.json")}
    (mine / "mine.py").write_text(FILE.replace("BOUND", "0.25"))
    spec._from_file.cache_clear()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(runs).rglob("result.json")} == before
    again = result.read(mine / "experiments" / "results", "mine")[1]
    assert again.verdict == "not reproduced at this scale" and again.digest != kept.digest

    # A result is of the file that it was judged by.
    (mine / "mine.py").write_text(FILE.replace("BOUND", "2.5"))
    capsys.readouterr()
    assert main(["experiment", "show", "mine.py"]) == 0
    assert "changed since" in capsys.readouterr().out


def test_data_that_cannot_be_read_is_said_before_anything_trains(mine, tmp_path, capsys):
    late = 'STUDIES["late"] = compare("task=lm:path=absent.txt attention=full seq_len=16 dim=16 layers=1 steps=3")'
    (mine / "mine.py").write_text(f"{FILE.replace('BOUND', '2.5')}\n{late}\n")
    assert main(["experiment", "run", "mine.py", "--runs", str(tmp_path / "none")]) == 2
    assert "mine.py: late: " in (said := capsys.readouterr().err) and "absent.txt" in said
    assert not list((tmp_path / "none").rglob("config.json"))


def test_a_pilot_has_other_seeds_and_keeps_no_result(mine, runs, capsys):
    assert main(["experiment", "run", "mine.py", "--pilot", "--json", "--runs", runs]) == 0
    printed = json.loads(capsys.readouterr().out)["mine"]
    assert printed["seeds"] == [1000, 1001]
    assert not (mine / "experiments").exists()


NEEDY = '''"""Does it read?"""

from xformers_lab.experiment import Claim, at_most, compare

CLAIM = Claim(says="Yes.", source="-", literature="-", doubt="-", minutes=1, data={"a:b.txt": "any <text>"})
WORDS = "depth=universal:act=true seq_len=16 dim=16 layers=1 batch=4 steps=2 eval_batches=1"
STUDIES = {"train": compare("task=lm:path=({data}/a:b.txt) " + WORDS)}


def judge(tables):
    return [at_most("steps", tables["train"].reports("steps"), 1)]
'''


def test_an_experiment_that_needs_data(mine, runs, capsys):
    """It is refused before anything runs, whatever runs beside it."""
    (mine / "needy.py").write_text(NEEDY)
    command = ["experiment", "run", "mine.py", "needy.py", "--quiet", "--runs", f"{runs}/needy"]
    for flags, says in (([], "give --data the folder"), (["--data", "."], "--data . has no such entry")):
        assert main([*command, *flags]) == 2
        said = capsys.readouterr().err
        assert says in said and "needy needs a:b.txt (any <text>)" in said
    assert not pathlib.Path(runs, "needy").exists()


@pytest.mark.full
def test_where_data_are_is_not_kept(mine, runs, capsys):
    """A result says {data}, on the page too."""
    (mine / "needy.py").write_text(NEEDY)
    command = ["experiment", "run", "needy.py", "--quiet", "--runs", f"{runs}/needy"]
    (mine / "a:b.txt").write_text("".join(f"{number} " for number in range(2000)))
    assert main([*command, "--seeds", "1", "--data", "."]) == 0
    kept = result.read(mine / "experiments" / "results", "needy")[1]
    assert kept.measurements[0].mean == 1 and "task=lm:path=({data}/a:b.txt)" in kept.commands["train"]
    (variant,) = kept.variants  # where the folder is, is of this machine alone
    assert variant.group.startswith("lm:path=({data}/a:b.txt)")
    assert main(["experiment", "show", "needy.py"]) == 0
    assert "a:b.txt: any <text>" in capsys.readouterr().out
    assert "Data: a:b.txt (any <text>)" in (mine / "experiments" / "RESULTS.md").read_text()


def test_a_result_says_whether_the_machine_was_quiet(mine, runs):
    """By the times of equal work; a result from before that was kept says nothing."""
    row = {"status": "ok", "seconds_ratio": 1.1}
    assert result.quiet([{"status": "ok"}, {"status": "failed", "seconds_ratio": 9.0}]) is None
    assert result.quiet([row, row | {"seconds_ratio": 1.2}]) == {"timed": 2, "busy": 0, "spread": 1.2}
    assert main(["experiment", "run", "mine.py", "--quiet", "--runs", runs]) == 0
    kept = result.read(mine / "experiments" / "results", "mine")[1]
    assert kept.times is not None and kept.times["timed"] == 4 + 2
    said = lambda times: words.quiet(dataclasses.replace(kept, times=times))
    assert said(None) == ""
    assert said({"timed": 2, "busy": 0, "spread": 1.2}).startswith("Times are of a quiet machine")
    assert "above 1.3 in 1 of 2 timed rows, up to 1.50" in said({"timed": 2, "busy": 1, "spread": 1.5})


def test_what_models_report_of_themselves():
    from xformers_lab.api.table import Table
    from xformers_lab.experiment.measured import Measured

    row = {"status": "ok", "attention": "full", "aux": {"exit/1": 0.25, "exit/2": 0.75}}
    other = row | {"seed": 1, "aux": {"exit/2": 1.0}}
    lost = {"status": "failed", "attention": "full", "seed": 2}
    table = Measured(Table([row | {"seed": 0}, other, lost], ["attention"], "xlab compare"))
    sample = table.reports("exit/1", attention="full")
    assert dict(sample.values) == {0: 0.25, 1: 0.0} and len(sample.missing) == 1
    with pytest.raises(UsageError, match=r'reports "exit/3".*choose from: exit/1, exit/2'):
        table.reports("exit/3")


def test_all_leaves_out_what_lacks_its_data(mine, monkeypatch, capsys):
    from xformers_lab.cli import experiment

    ran = []
    monkeypatch.setattr(experiment, "_run", lambda chosen, names: ran.extend(names) or 0)
    assert main(["experiment", "all"]) == 0
    said = capsys.readouterr().err
    assert "left out: ponder needs babi_en10k" in said and "extrapolation" in ran and "ponder" not in ran


@pytest.mark.parametrize(
    "change, message",
    [
        (('attention="full")', 'attention="fulll")'), "fulll"),
        (('tables["train"]', 'tables["trian"]'), "trian"),
        (('metric(attention="full")', "metric()"), "give more keys"),
        (("at_most(", "reported("), "judge"),
    ],
)
def test_a_rule_that_cannot_be_applied_names_its_file(mine, runs, capsys, change, message):
    (mine / "mine.py").write_text(FILE.replace("BOUND", "2.5").replace(*change))
    assert main(["experiment", "run", "mine.py", "--quiet", "--runs", runs]) == 2
    said = capsys.readouterr().err
    assert "mine.py" in said and message in said and "Traceback" not in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["rnu"], "run"),
        (["run"], "which experiments"),
        (["show"], "which experiment"),
        (["run", "extrapolation", "--scale", "0"], "at least 1"),
        (["all", "extrapolation"], "say run extrapolation"),
    ],
)
def test_bad_input(words, message, capsys):
    assert main(["experiment", *words]) == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_read(mine, capsys):
    folder = mine / "experiments" / "results"
    folder.mkdir(parents=True)
    (folder / "extrapolation.json").write_text("[]")
    assert main(["experiment", "list"]) == 4
    assert "delete it and run again" in capsys.readouterr().err
