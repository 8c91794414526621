"""`xlab runs` and `xlab report RUN...`: which runs words mean, what is shown of them, and that no other folder goes."""

import csv
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len
from rich.console import Console
from stored_runs import stored

from xformers_lab import named_run as run_named
from xformers_lab import record
from xformers_lab.cli import main
from xformers_lab.cli import runs as command
from xformers_lab.config import KEYS
from xformers_lab.errors import LabError
from xformers_lab.report import stored as saved_runs
from xformers_lab.report.listing import print_listing
from xformers_lab.train import records


@pytest.fixture
def xlab(tmp_path, capsys):
    """xlab(words) runs a command on tmp_path/runs -> exit code, stdout, stderr."""

    def run(words: str):
        code = main([*words.split(), "--runs", str(tmp_path / "runs")])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def runs(tmp_path):
    """Five runs, the one that began last at the end of the list."""
    folder = tmp_path / "runs"
    return [
        stored(folder, task="lm:path=a.txt", attention="local:window=16", metric=2.5, metric_name="bits/byte"),
        stored(folder, attention="local", seed=1, metric=0.25),
        stored(folder, attention="full+local:window=16", seq_len=128, metric=0.75),
        stored(folder, attention="full", status="nan", metric=None, reason="loss not finite"),
        stored(folder, attention="full", status=None, steps=400),
    ]


def ids(said: str) -> list[str]:
    return [run["id"] for run in json.loads(said)]


def names(chosen) -> list[str]:
    return [folder.name for folder in chosen]


def test_the_list_says_what_each_run_is_and_how_far_it_came(xlab, runs):
    code, said, _ = xlab("runs")
    lines = said.splitlines()
    assert code == 0 and [line.split()[0] for line in lines[1:]] == names(runs)
    assert lines[0].split() == [
        "id",
        "task",
        "attention",
        "steps",
        "seq_len",
        "seed",
        "status",
        "metric",
        "when",
        "folder",
    ]
    assert "local:window=16" in lines[1] and "2.500 bits/byte" in lines[1] and str(runs[0]) in lines[1]
    assert "not a number" in lines[4] and "unfinished, step 3 of 400" in lines[5]


@pytest.mark.parametrize(
    ("words", "which"),
    [
        ("attention=local", [0, 1]),
        ("attention=local:window=16", [0]),
        ("attention=local:window=64", []),
        ("attention=full+local", [2]),
        ("attention=loc", []),
        ("attention=full,local", [0, 1, 3, 4]),
        ("task=lm", [0]),
        ("task=lm attention=full", []),
        ("task=copy seq_len=64..256:x2 seed=0", [2, 3, 4]),
        ("model.attention=local train.steps=5", [0, 1]),
        ("status=ok", [0, 1, 2]),
        ("status=unfinished,nan", [3, 4]),
        ("metric=0.250", [1]),
        ("metric_name=accuracy status=ok", [1, 2]),
        ("higher_is_better=true status=nan", [3]),
        ("last", [4]),
        ("last 000000000002", [4, 2]),
        ("last 000000000002 seq_len=128", [2]),
        ("id=00000000000", [0, 1, 2, 3, 4]),
        ("lr=3e-3 kv_heads=none", [0, 1, 2, 3, 4]),
    ],
)
def test_words_mean_runs(xlab, runs, words, which):
    code, said, _ = xlab(f"runs {words} --json")
    assert code == 0 and sorted(ids(said)) == sorted(runs[at].name for at in which)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("runs foo=1", 'foo=1: unknown key "foo"'),
        ("runs attnetion=full", 'did you mean "attention"?'),
        ("runs seq_len=x", "seq_len"),
        ("runs seq_len=", "has no value"),
        ("runs 0000", "5 runs begin so"),
        ("runs zzz", "no run in"),
        ("runs --sort metrik", 'did you mean "metric"?'),
        ("runs --columns id,lrr", 'did you mean "lr"?'),
        ("runs compare status=oom", "no run of"),
        ("runs compare --reverse", "--reverse"),
        ("runs --yes", "--yes"),
        ("runs rm", "rm which runs?"),
        ("runs rm last --csv a.csv", "--csv"),
        ("report zzz", "no run in"),
    ],
)
def test_words_that_mean_none_are_refused(xlab, runs, words, said):
    code, out, error = xlab(words)
    assert code == 2 and said in error and out == "" and len(error.splitlines()) == 1


def test_any_key_sorts_and_is_a_column(xlab, runs):
    order = lambda words: [line.split()[0] for line in xlab(f"runs --columns id,metric {words}")[1].splitlines()[1:]]
    by_metric = [runs[at].name for at in (1, 2, 0)]
    assert order("--sort metric") == [*by_metric, runs[3].name, runs[4].name], "those without one come last"
    assert order("--sort metric --reverse") == [*by_metric[::-1], runs[3].name, runs[4].name]
    assert order("--sort time --reverse") == names(runs)[::-1]
    assert order("--sort attention")[0] == runs[3].name and order("--sort seq_len")[-1] == runs[2].name
    said = xlab("runs last --columns dim,loss,config,when")[1].splitlines()
    assert said[0].split() == ["dim", "loss", "config", "when"] and said[1].startswith("64   none  {")


def test_json_has_the_same_keys_for_every_run(xlab, runs):
    listed = json.loads(xlab("runs --json")[1])
    assert len({tuple(run) for run in listed}) == 1 and all(tuple(run["config"]) == KEYS for run in listed)
    assert listed[4]["status"] == "unfinished" and listed[4]["step"] == 3 and listed[4]["metric"] is None
    assert json.loads(xlab("runs 000000000001 --json --columns lr,seed")[1]) == [{"lr": 0.003, "seed": 1}]
    assert json.loads(xlab("runs status=oom --json")[1]) == []


def test_folders_that_hold_no_run_are_named_and_the_others_listed(xlab, runs, tmp_path):
    (tmp_path / "runs" / "a" / "notes").mkdir(parents=True)
    (runs[1] / "config.json").write_text("{")
    (runs[2] / "result.json").write_text("[" * 100_000)
    (runs[3] / "result.json").write_text(json.dumps({"status": ["ok"]}))
    (runs[4] / "config.json").write_text(json.dumps({"task": "copy", "seq_len": {"a": 1}, "model": 3}))
    (tmp_path / "runs" / "compare.json").write_text("{}")
    code, said, error = xlab("runs --json")
    assert code == 0 and ids(said) == [runs[0].name] and len(error.splitlines()) == 1
    assert "notes (no run" in error and f"{runs[1]} (damaged" in error and "and 1 more" in error


def test_stored_text_steers_no_terminal(xlab, tmp_path):
    stored(tmp_path / "runs", task="copy", attention="\x1b[31mred\u202e\nx", metric_name="\x1b]0;owned\x07")
    for words in ("runs", "runs --columns attention,metric_name", "runs compare"):
        said = "".join(xlab(words)[1:])
        assert "\x1b" not in said and "\u202e" not in said and "\x07" not in said and "\\x1b" in said


def test_a_narrow_terminal_shows_every_run_whole(runs, tmp_path):
    page = io.StringIO()
    picked, _ = saved_runs.chosen([], tmp_path / "runs")
    console = Console(file=page, force_terminal=True, color_system=None, width=60)
    print_listing(command.lines(picked, saved_runs.differing(picked)), console)
    said = " ".join(page.getvalue().split())
    assert all(cell_len(line) <= 60 for line in page.getvalue().splitlines())
    assert all(folder.name in said for folder in runs) and said.count("2023-11-14 ") == len(runs)
    assert "unfinished, step 3 of 400" in said and "2.500 bits/byte" in said


def test_odd_values_end_in_no_traceback(xlab, tmp_path):
    """Whatever stands under a key of a record or a config, the run is listed, drawn, or named with the place."""
    odd = (None, -1, 0.5, "x", True, [], [1], {}, {"a": [{}]}, 1e308, 10**400, [[1, 2]], "\ud800")
    for at, key in enumerate([*record.keys(), "task", "seq_len", "seed", "attention", "lr"]):
        folder = stored(tmp_path / "runs", f"{at:012x}")
        row = json.loads((folder / "result.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        (config if key in KEYS else row)[key] = odd[at % len(odd)]
        row = record.sealed({**row, "config": config}) if key != "seal" else row
        (folder / "result.json").write_text(json.dumps(row))
        (folder / "config.json").write_text(json.dumps(config))
    commands = ["runs", "runs --sort loss", "runs --json", "runs attention=full seed=0", "runs --columns loss,config"]
    for words in commands:
        code, _, error = xlab(words)
        assert code in (0, 2) and "Traceback" not in error, words
    picked, odd_folders = saved_runs.chosen([], tmp_path / "runs")
    drawn = []
    for run in picked:
        try:
            saved_runs.rows([run], [])
            drawn.append(str(run.folder))
        except LabError as error:
            assert run.folder.name in str(error)
    assert odd_folders and len(drawn) > 10
    assert xlab("report " + " ".join(drawn))[0] == 0


def test_a_changed_record_is_not_believed(xlab, runs, tmp_path):
    text = (runs[1] / "result.json").read_text()
    (runs[1] / "result.json").write_text(text.replace("0.25", "0.99"))
    line = xlab("runs")[1].splitlines()[2]
    assert "not believed" in line and "its seal does not match" in line
    for words in ("report task=copy", "runs compare task=copy"):
        code, _, error = xlab(words)
        assert code == 4 and str(runs[1] / "result.json") in error and "seal does not match" in error
    assert not (tmp_path / "runs" / "report.html").exists()
    assert xlab("report 000000000000 000000000002")[0] == 0


def test_a_run_of_another_id_is_not_believed(xlab, runs):
    (runs[1] / "result.json").write_text((runs[2] / "result.json").read_text())
    code, _, error = xlab("report status=ok")
    assert code == 4 and f"it is of run {runs[2].name}, not of {runs[1].name}" in error


def test_compare_and_report_draw_any_set_of_runs(xlab, runs, tmp_path):
    out, sheet = tmp_path / "some.html", tmp_path / "some.csv"
    code, said, _ = xlab(f"report task=copy --out {out} --csv {sheet} --json")
    assert code == 0 and json.loads(said) == {"report": str(out), "rows": 4}
    page = out.read_text()
    assert "full+local:window=16" in page and "loss not finite" in page and "step 3 of 400" in page
    with sheet.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == names(runs[1:])
    assert [line["status"] for line in lines] == ["ok", "ok", "nan", "interrupted"]
    table = xlab("runs compare task=copy status=ok")[1]
    assert "local" in table and "0.250" in table and "0.750" in table


def test_the_same_run_named_twice_is_one_row(xlab, runs):
    _, said, _ = xlab(f"runs compare {runs[1]} {runs[1].name} {runs[1].parent}/../copy/{runs[1].name} --json")
    assert len(json.loads(said)) == 1


def test_report_says_where_runs_say_otherwise(xlab, runs, tmp_path):
    _, said, _ = xlab("runs compare status=ok --json")
    table = {"rows": json.loads(said), "varied": ["task", "attention", "seq_len", "seed"], "command": "xlab compare"}
    (tmp_path / "runs" / "compare.json").write_text(json.dumps(table))
    assert xlab("report")[0::2] == (0, "")
    table["rows"][1]["metric"] = 0.99
    (tmp_path / "runs" / "compare.json").write_text(json.dumps(table))
    code, _, error = xlab("report")
    assert code == 0 and f"{runs[1]} (metric)" in error and len(error.splitlines()) == 1
    table["rows"][1]["run_dir"] = "../../etc/passwd"  # no file outside the folder of runs is looked at
    (tmp_path / "runs" / "compare.json").write_text(json.dumps(table))
    assert xlab("report")[0::2] == (0, "")


def test_rm_deletes_the_named_runs_alone(xlab, runs, tmp_path):
    outside = tmp_path / "precious.txt"
    outside.write_text("x")
    (runs[1] / "events").symlink_to(tmp_path)
    code, said, error = xlab("runs rm attention=local --yes --json")
    assert code == 0 and json.loads(said) == list(map(str, runs[:2])) and "to delete: 2 runs" in error
    assert all(str(folder) in error for folder in runs[:2])
    assert [folder.exists() for folder in runs] == [False, False, True, True, True]
    assert outside.read_text() == "x"


def test_rm_asks_and_without_a_terminal_wants_yes(xlab, runs, monkeypatch):
    code, said, error = xlab("runs rm last")
    assert code == 2 and "say --yes" in error and said == "" and runs[4].exists()
    asked = []
    for answer, left in (("n\n", True), ("\n", True), ("y\n", False)):
        terminal = type("Terminal", (), {"isatty": lambda self: True, "readline": lambda self, text=answer: text})()
        monkeypatch.setattr(sys, "stdin", terminal)
        code, _, error = xlab(f"runs rm {runs[4]}")
        asked.append("delete them?" in error)
        assert code == 0 and runs[4].exists() == left
    assert all(asked)


@pytest.mark.parametrize("how", ["elsewhere", "link to a run", "link to a task", "deeper", "no metrics", "task itself"])
def test_rm_refuses_all_but_a_run_right_under_the_folder_of_runs(xlab, runs, tmp_path, how):
    away = stored(tmp_path / "away", "aaaaaaaaaaaa")
    word = str(away)
    if how == "link to a run":
        (tmp_path / "runs" / "copy" / "aaaaaaaaaaaa").symlink_to(away)
        word = "aaaaaaaaaaaa"
    elif how == "link to a task":
        (tmp_path / "runs" / "linked").symlink_to(away.parent)
        word = "aaaaaaaaaaaa"
    elif how == "deeper":
        away = stored(tmp_path / "runs" / "copy" / "000000000001", "bbbbbbbbbbbb")
        word = str(away)
    elif how == "no metrics":
        for name in ("result.json", "metrics.jsonl"):
            (runs[1] / name).unlink()
        away, word = runs[1], runs[1].name
    elif how == "task itself":
        away = tmp_path / "runs" / "copy"
        for name in ("config.json", "result.json"):
            (away / name).write_text((runs[1] / name).read_text())
        word = str(away)
    code, _, error = xlab(f"runs rm {runs[2].name} {word} --yes")
    assert code == 2 and "nothing was deleted" in error
    assert away.exists() and all(folder.exists() for folder in runs)


@pytest.fixture
def named(tmp_path):
    """Runs with names and tags, two of which share a name."""
    folder, labels = tmp_path / "runs", lambda name, tags=None: {"name": name, "tags": tags}
    return [
        stored(folder, labels=labels("base", "lr+draft"), started="2026-01-01T00:00:00+00:00"),
        stored(folder, "aaaaaaaaaaaa", labels=labels("twice", "draft")),
        stored(folder, "aaaaaaaaaaab", labels=labels("twice"), metric=0.75, metric_name="accuracy"),
        stored(folder, "badcafe00000", labels=labels("aaaaaaaaa"), steps=7),
        stored(folder),
    ]


@pytest.mark.parametrize(
    ("words", "which"),
    [
        ("base", [0]),
        ("name=base", [0]),
        ("base badca", [0, 3]),
        ("aaaaaaaaa", [3]),  # a name comes before the beginning of an id
        ("aaaaaaaaaaaa", [1]),
        ("tags=draft", [0, 1]),
        ("tags=draft+lr", [0]),
        ("tags=lr,none", [0, 2, 3, 4]),
        ("tags=dra", []),
        ("name=none", [4]),
        ("twice tags=draft", "2 runs have this name"),
        ("nobody", "no run in"),
    ],
)
def test_names_and_tags_mean_runs(xlab, named, words, which):
    code, said, error = xlab(f"runs {words} --json")
    if isinstance(which, str):
        assert code == 2 and which in error and said == ""
        return
    assert code == 0 and sorted(ids(said)) == sorted(named[at].name for at in which)
    if all("=" not in word for word in words.split()):
        alone = [run_named.folder(word, named[0].parents[1]) for word in words.split()]
        assert sorted(alone) == sorted(named[at] for at in which), "commands on one run mean the same"


def test_the_list_and_its_exports_show_names_and_tags(xlab, named, tmp_path):
    head, *lines = xlab(f"runs --csv {tmp_path / 'runs.csv'}")[1].splitlines()
    assert head.split()[:3] == ["id", "name", "tags"] and lines[0].split()[1:3] == ["base", "lr+draft"]
    with (tmp_path / "runs.csv").open() as file:
        sheet = list(csv.DictReader(file))
    assert [line["run_name"] for line in sheet] == ["base", "twice", "twice", "aaaaaaaaa", ""]
    assert sheet[0]["tags"] == "lr+draft" and "name" not in xlab(f"runs {named[4]}")[1].splitlines()[0].split()
    assert xlab("report base badca --json")[0] == 0


def test_tags_are_given_and_taken_afterwards(xlab, named):
    began = (named[0] / "config.json").stat().st_mtime_ns
    code, said, _ = xlab("runs tag tags=draft --add paper+draft --remove lr --json")
    assert code == 0 and json.loads(said) == {str(named[0]): "draft+paper", str(named[1]): "draft+paper"}
    assert sorted(ids(xlab("runs tags=paper --json")[1])) == sorted([named[0].name, named[1].name])
    assert (named[0] / "config.json").stat().st_mtime_ns == began, "a run stays as old as it was"
    assert xlab("runs tag base twice --remove paper")[0] == 2  # two runs have this name
    code, said, _ = xlab("runs tag base --remove paper+draft")
    assert code == 0 and said.split()[1:] == ["no", "tags"]
    assert xlab("runs base --json")[0] == 0, "its record is believed"
    for words, reason in (
        ("tag --add a", "tag which runs?"),
        ("tag base", "tag with what?"),
        ("tag base --add a/b", "letters, digits"),
        ("tag tags=draft --remove lr", "no run has the tag lr; there is draft, paper"),
        ("base --add a", "--add: the list of runs does not read it"),
        ("tag base --add a --sort id", "--sort: xlab runs tag"),
    ):
        code, _, error = xlab(f"runs {words}")
        assert code == 2 and reason in error


def test_a_run_is_one_line(xlab, named):
    row = json.loads((named[2] / "result.json").read_text()) | {"started": "2026-01-01T00:00:00+00:00"}
    row = record.sealed(row | {"ended": "2026-01-01T00:01:30+00:00"})
    (named[2] / "result.json").write_text(json.dumps(row))
    said = xlab(f"runs {named[2]} {named[4]} --columns summary --sort id")[1].splitlines()[1:]
    assert [line.strip() for line in said] == [
        "copy \N{MIDDLE DOT} full \N{MIDDLE DOT} 64 tokens \N{MIDDLE DOT} 5 steps: accuracy 0.500",
        "twice: copy \N{MIDDLE DOT} full \N{MIDDLE DOT} 64 tokens \N{MIDDLE DOT} 5 steps: accuracy 0.750 in 90 s",
    ]


def _hold(folder, ready):
    with records.locked(folder):
        ready.set()
        time.sleep(60)


def test_a_run_that_a_process_works_in_is_listed_as_running_and_stays(xlab, runs):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(runs[4], ready))
    process.start()
    try:
        assert ready.wait(60)
        assert "running, step 3 of 400" in xlab("runs status=running")[1]
        code, _, error = xlab("runs rm task=copy --yes")
        assert code == 2 and "is running this" in error and all(folder.exists() for folder in runs)
    finally:
        process.kill()
        process.join()
    assert "unfinished, step 3 of 400" in xlab("runs last")[1], "a dead process's lock is none"


def test_the_list_imports_no_jax(runs, tmp_path):
    code = f"""
import sys
from xformers_lab.cli import main
assert main(["runs", "status=ok", "--runs", {str(tmp_path / "runs")!r}]) == 0
assert main(["runs", "compare", "status=ok", "--runs", {str(tmp_path / "runs")!r}]) == 0
assert "jax" not in sys.modules and "pandas" not in sys.modules and "pyarrow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ}, capture_output=True)
