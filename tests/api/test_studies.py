"""Comparisons, benches and checks from Python: the rows of the commands, and what an interrupt leaves."""

import json
import pathlib
import signal
from typing import Any

import pytest

import xformers_lab as xl
from xformers_lab.attention.local import Local
from xformers_lab.check import run as kit
from xformers_lab.check import values
from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.supervise.process import Worker

TINY = {"task": "copy", "seq_len": 16, "dim": 16, "layers": 1, "batch": 4, "steps": 3, "eval_batches": 1}
WORDS = [f"{key}={value}" for key, value in TINY.items()]

RUNS = pathlib.Path("runs")


class Own(Local):
    """A window of the test's own (Nobody, 2026)."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def interrupts(monkeypatch) -> list[int]:
    """Has workers train nothing: a seed in this list is interrupted while it trains."""
    seeds: list[int] = []

    def ask(self, what, heard=None, *, config, **given):
        if self.stopped:
            raise self._interrupted("not reached before the interruption")
        if what == "compare.cell.check":
            return {"status": "ok"}
        assert what == "compare.cell.train"
        if config["seed"] in seeds:
            self._stop(signal.SIGINT)
            raise self._interrupted("saved at step 1")
        return {"status": "ok", "metric": 0.5, "metric_name": "accuracy"}

    monkeypatch.setattr(Worker, "ask", ask)
    return seeds


@pytest.mark.usefixtures("interrupts")
def test_the_rows_are_those_of_the_command(capsys):
    table = xl.compare(TINY, attention=["full", "linear"], seeds=2, baselines=False, quiet=True)
    assert capsys.readouterr() == ("", "")  # nothing is printed
    assert table.ok and [row["seed"] for row in table] == [0, 1, 0, 1] and not table.interrupted
    assert table.command == f"xlab compare {' '.join(WORDS)} attention=full,linear seeds=2 --no-baselines"
    kept, page = RUNS.joinpath("compare.json").read_text(), RUNS.joinpath("report.html").read_text()
    assert main(table.command.split()[1:]) == 0
    assert capsys.readouterr().out.rstrip() == repr(table)
    assert RUNS.joinpath("compare.json").read_text() == kept and RUNS.joinpath("report.html").read_text() == page
    assert main([*table.command.split()[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table.rows


@pytest.mark.usefixtures("interrupts")
def test_an_ablation_is_that_of_the_command(capsys):
    table = xl.ablate(TINY, norm=["pre", "post"], position="rope", seeds=2, baselines=False, quiet=True)
    assert [row["name"] for row in table] == [name for name in ("base", "norm=post", "position=learned") for _ in "ab"]
    words = [*WORDS, "norm=pre,post", "position=rope", "seeds=2"]
    assert table.command == f"xlab ablate {' '.join(words)} --no-baselines"
    assert table.axes == {"norm": ["norm=post"], "position": ["position=learned"]}
    capsys.readouterr()
    assert main(table.command.split()[1:]) == 0
    assert capsys.readouterr().out.rstrip() == repr(table)
    with pytest.raises(UsageError, match="both say which seeds"):
        xl.ablate(TINY, norm=["pre", "post"], seed=1, seeds=2)
    with pytest.raises(UsageError, match="nothing to ablate"):
        xl.ablate({"task": "copy"})


def test_an_interrupt_gives_what_was_reached(monkeypatch, capsys, interrupts):
    interrupts.append(1)
    table = xl.compare(TINY, seed=[0, 1, 2], baselines=False)
    assert table.interrupted == signal.SIGINT and not table.ok
    assert [row["status"] for row in table] == ["ok", "interrupted", "interrupted"]
    assert "saved at step 1" in repr(table) and "not reached before" in repr(table)
    assert "the same call goes on from there" in capsys.readouterr().err
    interrupts.clear()
    assert xl.compare(TINY, seed=[0, 1, 2], baselines=False).ok
    heard = []
    interrupts.append(0)
    monkeypatch.setattr(Worker, "_stop", lambda self, number: setattr(self, "stopped", signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        assert xl.compare(TINY, seed=[0, 1], baselines=False, quiet=True).interrupted == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]  # once the table is kept, it ends the process as it would have without


def test_a_study_from_python_is_refused_as_from_the_command_line():
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "compare what"),
        ({"tune": "dim"}, "tune"),
        ({"task": "copy", "report": pathlib.Path.cwd()}, "report=.*: a folder is there"),
        ({"task": "copy", "budget": "long"}, "a time is a number and its unit"),
        ({"task": "copy", "track": ["nothing"]}, 'no tracker "nothing"'),
    ]
    for keys, message in refused:
        with pytest.raises(UsageError, match=message):
            xl.compare(**keys)
    with pytest.raises(UsageError, match='passes="backward": '):
        xl.bench(attention="full", passes="backward")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="rounds=0: at least 1"):
        xl.bench(attention="full", rounds=0)


@pytest.mark.full
def test_a_bench_with_a_class_of_ones_own(monkeypatch, inline, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kit, "PROPERTIES", [values.signature])
    table = xl.bench(attention=[Own, "local"], seq_len=16, dim=16, batch=2, rounds=1, passes="forward")
    assert table.ok and table[0]["checked"] is True and table[0]["attention"].startswith("runs/source-")
    assert "own@" in repr(table) and "runs/source-" not in repr(table).partition("note")[0]
    assert table.report("bench.html").read_text().count("<title>What the mechanisms cost") == 1


def test_the_kit_on_a_class_of_ones_own(monkeypatch, inline, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kit, "PROPERTIES", [values.signature])
    report = xl.check(Own, quiet=True)
    assert report and report.passed and "own.py passes" in repr(report)
    assert "passes" in report._repr_html_()
    with pytest.raises(UsageError, match='no choice "locl" on any shelf: did you mean "local"'):
        xl.check("locl")
    with pytest.raises(UsageError, match="limit -1: a number of seconds"):
        xl.check("local", limit=-1)


@pytest.mark.full
def test_a_comparison_by_workers_with_a_class_of_ones_own(capsys):
    table = xl.compare(TINY, attention=["linear", Own], seeds=2, baselines=False, check=False)
    assert table.ok and len(table) == 4
    own = next(row for row in table if row["attention"] != "linear")
    recorded = json.loads(pathlib.Path(own["run_dir"], "sources.json").read_text())
    assert list(recorded) == [own["attention"]]
    assert len(xl.load(own["run_dir"]).metrics) == 3  # trusted, since its source is the recorded one
    capsys.readouterr()
    assert main([*table.command.split()[1:], "--json"]) == 0  # which finds every run there
    assert json.loads(capsys.readouterr().out) == table.rows
