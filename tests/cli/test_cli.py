"""The commands as scripts use them: what they print as JSON, and the whole job end to end on a tiny grid."""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from xformers_lab import config, hardware, progress, spec
from xformers_lab.cli import experiment, main
from xformers_lab.doctor import quiet
from xformers_lab.errors import nearest
from xformers_lab.experiment import library
from xformers_lab.measure import speed

TINY = ["task=copy", "dim=16", "batch=4", "steps=3", "eval_batches=1", "heads=2"]


def run(capsys, *arguments, code=0):
    """Run a command with --json; -> what it printed."""
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_help_needs_no_jax():
    program = "import sys; from xformers_lab.cli import main\n"
    program += "try: main(['--help'])\nexcept SystemExit: pass\nprint('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "compare" in done.stdout


@pytest.mark.parametrize("shelf", [*spec.SHELVES, "tasks"])
def test_list(capsys, shelf):
    rows = run(capsys, "list", shelf)
    assert [row["name"] for row in rows] == spec.names(shelf)
    assert all(row["title"] for row in rows)


def test_list_says_what_signatures_say(capsys):
    rows = {row["name"]: row for row in run(capsys, "list", "attention")}
    assert rows["full"]["causal"] and rows["full"]["bias"]
    assert rows["linear"]["causal"] and not rows["linear"]["bias"]
    assert rows["local"]["options"] == "window=128:tokens=0"
    columns = ("kind", "time", "memory", "nature")
    assert not [(name, word) for name, row in rows.items() for word in columns if not row[word]]


def test_show_draws_the_pattern_that_runs(capsys):
    page = run(capsys, "show", "local:window=2", "seq_len=6")
    assert page["pattern"] == ["█·····", "██····", "███···", "·███··", "··███·", "···███"]
    assert page["options"][0]["value"] == "2"
    assert run(capsys, "show", "axial:axis=row", "seq_len=9", "model=encoder")["pattern"][4] == "···███···"


@pytest.mark.parametrize(
    "choice, which", [("random:block=2:count=1:heads=own", "head 1 of 4"), ("local", "every head")]
)
def test_show_says_whose_pattern_it_draws(capsys, choice, which):
    assert main(["show", choice, "seq_len=24", "heads=4"]) == 0
    assert f"columns the keys they see ({which}):" in capsys.readouterr().out


def test_words_may_follow_flags(capsys, inline):
    assert main(["show", "local:window=2", "--json", "seq_len=6"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 6
    assert main(["show", "--json", "task=copy", "attention=local", "seq_len=16", "dim=16", "batch=8"]) == 0
    assert json.loads(capsys.readouterr().out)["task"].startswith("copy")


def test_a_catalogue_in_a_pipe_is_not_folded(capsys):
    assert main(["list", "attention"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(spec.names("attention"))


def test_show_resolves_a_config(capsys, inline):
    shown = run(capsys, "show", "attention=local+full", "lr=1e-2", "task=copy", "seq_len=16", "dim=16", "batch=8")
    assert shown["attention"] == "local:window=128:tokens=0+full" and shown["lr"] == "0.01"


def test_show_prints_a_task_with_an_example(capsys):
    assert main(["show", "task=addition", "seq_len=11", "--split", "train", "--number", "40"]) == 0
    printed = capsys.readouterr().out
    shown = run(capsys, "show", "task=addition", "seq_len=11", "--split", "train", "--number", "40")
    assert shown["task"] == "addition:reverse=false" and shown["vocab"] == 13 and shown["chance"] == 0.1
    assert shown["splits"] == {"train": None, "validation": None, "test": None}
    example = shown["example"]
    left, right = map(int, example["shown"]["source"].split("+"))
    assert example["shown"]["answer"] == f"{left + right:04d}" and example["shown"]["positions"] == "7..10"
    for line in ("example 40 of train", f"source: {example['shown']['source']}", f"answer: {left + right:04d}"):
        assert line in printed.splitlines()
    assert "drawn without end" in printed and "guessing scores 0.1" in printed


def test_shown_examples_are_numbered_as_an_evaluation_numbers_them(capsys):
    """Whatever `batch` and `seed` are; see train/evaluation.py."""
    from xformers_lab.tasks import Setting
    from xformers_lab.train import evaluation

    rebuilt = lambda batch: spec.build("task", "parity", Setting(16, batch))
    scored = evaluation.sample(rebuilt(8), rebuilt, "validation", 2, None, False)
    wanted = [scored.batch(4).inputs[2].tolist(), scored.batch(1).inputs[7].tolist()]
    words = ["show", "task=parity", "seq_len=16", "--split", "validation", "--number"]
    assert [run(capsys, *words, number)["example"]["inputs"] for number in ("34", "15")] == wanted


def test_show_draws_a_picture_and_names_the_class(capsys):
    assert main(["show", "task=pathfinder", "seq_len=256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("input:")
    assert all(len(line) == 16 and set(line) <= set(".#") for line in lines[at + 1 : at + 17])
    assert lines[at + 17] in ("answer: joined", "answer: apart")


@pytest.mark.parametrize(
    "words, says",
    [
        (["task=parity", "--number", "-1"], "has examples 0 and on"),
        (["task=parity", "attention=full", "--number", "1"], "no word beside but seq_len="),
        (["local", "--split", "train"], "no word beside but seq_len="),
        (["task=parity", "--svg", "x.svg"], "this is a task"),
        (["task=pathfinder", "seq_len=1000"], "961 or 1024"),
        (["task=parity,copy"], "one config"),
    ],
)
def test_what_show_cannot_show_of_a_task(capsys, words, says):
    assert main(["show", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.full
def test_bench_rows(capsys):
    rows = run(
        capsys, "bench", "attention=full,linear", "seq_len=16,32", "dim=16", "batch=1", "--rounds", "2", "--no-check"
    )
    assert len(rows) == 8
    for row in rows:
        assert row["checked"] is False and row["machine"]["processor"]
        assert row["status"] == "ok" and row["attention"] in ("full", "linear") and row["seq_len"] in (16, 32)
        assert 0 < row["seconds_min"] <= row["seconds_median"]
        assert row["tokens_per_second"] > 0 and row["flops"] > 0 and row["compile_seconds"] > 0
        assert "temp_bytes" in row or "peak_bytes" in row


def test_an_unchecked_bench_says_so_wherever_it_is_read(capsys, tmp_path):
    page = tmp_path / "b.html"
    words = ["attention=full", "seq_len=16", "dim=16", "batch=1", "--rounds", "1", "--pass", "forward", "--no-check"]
    assert main(["bench", *words, "--report", str(page)]) == 0
    note = "without the conformance check"
    assert note in capsys.readouterr().out and note in page.read_text()
    assert f"xlab bench {' '.join(words)} --report" in page.read_text()


def test_a_bench_says_which_keys_play_no_part_in_it(capsys):
    words = ["attention=full", "seq_len=16", "dim=16", "batch=1", "position=rope", "conv=4"]
    assert main(["bench", *words, "--rounds", "1", "--pass", "forward"]) == 0
    note = "note: A bench times attention alone: position and conv play no part in it."
    assert note in capsys.readouterr().out
    assert main(["bench", *words, "--rounds", "1", "--pass", "forward", "--json"]) == 0
    assert note in capsys.readouterr().err


def test_an_interrupted_bench_ends_as_interrupted(capsys, monkeypatch):
    """Ctrl-C at the second length keeps the first, and ends what is under way at once."""
    tell = progress.words

    @contextlib.contextmanager
    def interrupting(**how):
        with tell(**how) as write:
            yield lambda text: os.kill(os.getpid(), signal.SIGINT) if "timing 1 cells at 32" in text else write(text)

    monkeypatch.setattr(progress, "words", interrupting)
    words = ["attention=linear", "seq_len=16,32", "dim=16", "batch=1", "--no-check", "--pass", "forward"]
    rows = run(capsys, "bench", *words, "--rounds", "2", code=130)
    assert [row["status"] for row in rows] == ["ok", "interrupted"]
    assert rows[1]["reason"] == "interrupted before it was measured" and rows[0]["exponent"] is None


@pytest.mark.full
def test_compare_end_to_end(capsys, tmp_path, monkeypatch):
    """Two cells, one impossible and kept as refused; run again only what is missing; the report holds every cell."""
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "attention=full,linear,axial:shape=4x4", "seq_len=16"]
    rows = run(capsys, "compare", *words, "--no-baselines")
    assert [row["attention"] for row in rows] == ["full", "linear", "axial:shape=4x4"]
    for row in rows:
        assert row["status"] == "ok" and row["metric_name"] == "accuracy" and 0 <= row["metric"] <= 1
        assert (
            row["parameters"] > 0 and row["flops"] > 0 and row["tokens_per_second"] > 0 and row["compile_seconds"] > 0
        )
        assert pathlib.Path(row["run_dir"], "result.json").is_file()
    assert pathlib.Path("runs/report.html").read_text().count("axial:shape=4x4") >= 1

    kept = {row["run_dir"]: pathlib.Path(row["run_dir"], "result.json").stat().st_mtime_ns for row in rows}
    missing = rows[1]["run_dir"]
    pathlib.Path(missing, "result.json").unlink()
    again = run(capsys, "compare", *words, "--skip-impossible", "--no-baselines")
    assert [row["metric"] for row in again] == [row["metric"] for row in rows]
    for folder, stamp in kept.items():
        assert (pathlib.Path(folder, "result.json").stat().st_mtime_ns == stamp) == (folder != missing)

    # Another machine draws: the page names the one that measured, and says which cell is from elsewhere.
    monkeypatch.setattr(speed, "machine", lambda: {"processor": "the one that draws"})
    summary = run(capsys, "report", "--out", "again.html")
    page = pathlib.Path("again.html").read_text()
    assert summary["rows"] == 3 and "the one that draws" not in page and rows[0]["machine"]["processor"] in page
    assert "different machines" not in page
    saved = json.loads(pathlib.Path("runs/compare.json").read_text())
    saved["rows"][0]["machine"]["processor"] = "Elsewhere 9000"
    pathlib.Path("runs/compare.json").write_text(json.dumps(saved))
    run(capsys, "report")
    page = pathlib.Path("runs/report.html").read_text()
    assert "different machines" in page and "processor Elsewhere 9000 (1 cell)" in page


@pytest.mark.full
def test_impossible_cells_are_refused_together_or_kept_as_rows(capsys, tmp_path):
    words = [*TINY, f"runs={tmp_path}", "attention=full,axial:shape=3x3", "seq_len=16"]
    assert main(["compare", *words]) == 2
    assert "--skip-impossible" in capsys.readouterr().err
    rows = run(capsys, "compare", *words, "--skip-impossible", "--no-baselines", code=5)
    assert [row["status"] for row in rows] == ["ok", "refused"]
    assert "does not fit a length of 16" in rows[1]["reason"]


@pytest.mark.full
def test_train_resume_eval(capsys, tmp_path):
    words = [*TINY, f"runs={tmp_path}", "seq_len=16", "attention=local:window=4"]
    record = run(capsys, "train", *words)
    assert record["status"] == "ok" and pathlib.Path(record["run_dir"]).is_dir()
    assert run(capsys, "train", *words)["metric"] == record["metric"]  # finished: its stored record
    scored = run(capsys, "eval", "last", "--runs", tmp_path)
    assert scored["metric"] == pytest.approx(record["metric"])


TIMED = {"float32 product", "bfloat16 product", "bf16 in training"}


@pytest.mark.full
def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr(hardware, "load", lambda: 99.0)
    monkeypatch.setattr(quiet, "spread", lambda: 1.1)
    findings = {finding["what"]: finding for finding in run(capsys, "doctor")}
    assert findings["cores"]["ok"] is None  # other work on the machine is no fault of the installation
    assert {"python", "packages", "backends", "memory", "same seed, same result", *TIMED} <= findings.keys()
    assert all(findings[what]["measured"] for what in TIMED)


@pytest.mark.full
@pytest.mark.parametrize("arguments", [["doctor"], ["train", "task=copy", "steps=1"]], ids=" ".join)
def test_a_platform_that_is_not_here_is_said(arguments, tmp_path):
    command = [sys.executable, "-m", "xformers_lab", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": "no_such"}
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "JAX_PLATFORMS=no_such: jax has no such device here" in done.stderr


def test_an_unknown_command_gets_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["trian", "task=copy"])
    assert 'no command "trian": did you mean "train"?' in capsys.readouterr().err


def test_an_unknown_flag_gets_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "task=copy", "--repotr=x.html"])
    assert 'no flag --repotr: did you mean "--report"?' in capsys.readouterr().err


@pytest.mark.full
def test_the_demo_runs_experiments_and_ends_with_their_report(capsys, tmp_path, monkeypatch):
    """Here a tiny one in the place of its own, which need no data and are the laboratory's."""
    assert set(experiment.DEMO) <= set(library.names())
    assert not any(library.lacking(library.load(name), None) for name in experiment.DEMO)
    (tmp_path / "tiny.py").write_text(
        '"""Does it?"""\n\nfrom xformers_lab.experiment import Claim, at_most, compare\n\n'
        'CLAIM = Claim(says="It does.", source="-", literature="-", doubt="-", minutes=1)\n'
        f'STUDIES = {{"only": compare("attention=full seq_len=16 layers=1 lr=1e-3 {" ".join(TINY)}")}}\n\n\n'
        'def judge(tables):\n    return [at_most("accuracy", tables["only"].metric(attention="full"), 1)]\n'
    )
    monkeypatch.setattr(experiment, "DEMO", ("tiny.py",))
    monkeypatch.chdir(tmp_path)
    result = run(capsys, "demo", "--seeds", "2")["tiny"]
    assert result["verdict"] == "reproduced" and result["seeds"] == [0, 1] and result["times"]["timed"] == 2
    page = (tmp_path / "report.html").read_text()
    assert "It does." in page and "reproduced" in page and "<svg" in page
    assert (tmp_path / "runs" / "demo" / "results" / "tiny.json").is_file() and not (tmp_path / "experiments").exists()


def test_a_suggestion_is_near():
    """A misspelt name gets its own; a word that is none of them gets the list alone."""
    tasks = spec.names("task")
    for word in ("nope", "moon", "x", "", "tsk", "copyright infringement", "n" * 10_000):
        assert nearest(word, tasks).startswith("(choose from: "), word
    for word, near in [("cpoy", "copy"), ("cop", "copy"), ("COPY", "copy"), ("pixel", "pixels"), ("ypoc", "copy")]:
        assert nearest(word, tasks).startswith(f'did you mean "{near}"?'), word
    assert nearest("lr_rate", []) == ""


def test_a_bar_that_stands_still_says_why():
    """On a terminal a run says that it compiles until it takes steps, and a cell of a grid too."""
    file = io.StringIO()
    bar = progress._bar(Console(file=file, force_terminal=True, width=200, color_system=None))
    words = lambda: [task.description for task in bar.tasks]
    run = progress.Steps("copy [x]", bar)
    run.doing("preparing")
    run.doing("compiling")
    assert words() == [r"copy \[x] · compiling"]
    run.last = 0
    run.doing("training")
    run(3, 10, {"loss": 1.5})
    assert words() == [r"copy \[x] · loss 1.500"] and bar.tasks[0].completed == 3
    cells = progress.Cells(2, bar, False, [])
    cells.started(0, config.edit(config.Config(), task="copy"))
    assert words()[-1].endswith("· compiling")
    cells.stepped(0, 1, 10, 2.0)
    assert words()[-1].endswith("· loss 2.000")
    cells.started(1, config.edit(config.Config(), task="copy"))
    cells.finished(0, 0, {"status": "ok"})
    assert words()[-1].endswith("· compiling") and len(words()) == 3  # the run, the grid, the second cell


@pytest.mark.full
@pytest.mark.parametrize("words", [
    "list attention", "show local", "doctor", "bench attention=full seq_len=16", "check ffn/mlp", "check full",
    "compare task=copy attention=full steps=1",
])  # fmt: skip
def test_every_command_says_which_platforms_there_are(words, capsys, monkeypatch, tmp_path):
    """Where JAX_PLATFORMS names none of them: one line, how to install one, exit code 2."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "xformers_lab", *words.split()]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        pytest.skip("there is a GPU here")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("xlab ")]
    for part in ("JAX_PLATFORMS=cuda", "it has cpu", "cuda13", "unset JAX_PLATFORMS"):
        assert part in line


EXITS = """
from xformers_lab.attention.full import Full


class Exits(Full):
    def __init__(self, size, *, always: bool = False, rngs):
        super().__init__(size, rngs=rngs)
        self.always = always

    def attend_heads(self, call):
        if self.always or call.key is not None:
            raise SystemExit(5)
        return super().attend_heads(call)
"""


@pytest.mark.full
@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("command", ["compare", "bench"])
def test_a_mechanism_that_exits_is_a_row(capsys, tmp_path, command):
    """When it is built, or not before it trains; the others go on."""
    (tmp_path / "exits.py").write_text(EXITS)
    path = tmp_path / "exits.py"
    words = {"compare": [*TINY, f"runs={tmp_path}", "--no-baselines"], "bench": ["dim=16", "batch=1", "--rounds", "1"]}[
        command
    ]
    chosen = f"attention={path}:always=true,full" if command == "bench" else f"attention={path},{path}:always=true,full"
    rows = run(capsys, command, chosen, "seq_len=16", "--no-check", *words, code=5)
    for row in rows:
        if "exits" not in row["attention"]:
            assert row["status"] == "ok"
        else:
            assert row["status"] == "failed" and "SystemExit: 5" in row["reason"] and "exits.py:12" in row["reason"]
