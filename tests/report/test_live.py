"""`xlab watch`: what is shown of a run while it grows, that it ends when the run does, and leaves the run alone."""

import json
import re

import pytest
from stored_runs import stored

from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.record import sealed
from xformers_lab.report import live
from xformers_lab.report.braille import curve
from xformers_lab.train import records
from xformers_lab.train.tail import Tail


@pytest.fixture
def folder(tmp_path):
    """A run that was begun, at step 3 of 400, with a name that steers."""
    return stored(tmp_path / "runs", status=None, steps=400, labels={"name": "base"})


def add(folder, *lines) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def line(step, **more) -> dict:
    return {"step": step, "loss": 1.0 / step, "seconds": 0.5, **more}


def steps(lines) -> list[int]:
    return [line["step"] for line in lines]


def test_a_tail_reads_what_is_added_and_anew_what_is_replaced(folder):
    tail = Tail(folder)
    assert steps(tail.lines()) == [1, 2, 3]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
        file.flush()
        assert steps(tail.lines()) == [1, 2, 3], "half a line is none yet"
        file.write('ss": 0.5}\nnonsense\n')
    assert steps(tail.lines()) == [1, 2, 3, 4] and tail.lines()[-1]["loss"] == 0.5
    records.cut(folder, 2)  # as a resume does
    add(folder, line(3, loss=9.0))
    assert steps(tail.lines()) == [1, 2, 3] and tail.lines()[-1]["loss"] == 9.0
    (folder / "metrics.jsonl").unlink()
    assert steps(tail.lines()) == [1, 2, 3] and steps(Tail(folder).lines()) == []


def test_it_follows_a_run_to_its_end(folder, monkeypatch):
    """Each pause of the watcher the run takes steps; in the third it ends."""
    record = sealed({"id": folder.name, "status": "ok", "step": 400, "metric": 0.75, "metric_name": "accuracy"})
    growth = iter(
        [
            lambda: add(folder, line(4), line(5, validation_metric=0.25)),
            lambda: add(folder, line(6)),
            lambda: (held.__exit__(None, None, None), records.write_json(folder / "result.json", record)),
        ]
    )
    monkeypatch.setattr("time.sleep", lambda seconds: next(growth)())
    held = records.locked(folder)
    held.__enter__()
    seen = list(live.follow(folder, 1))
    assert [now.step for now in seen] == [3, 5, 6, 6] and [now.running for now in seen] == [True, True, True, False]
    assert seen[1].validation == [(5, 0.25)] and seen[0].validation == []
    said = dict(seen[2].facts())
    assert said["step"] == "6 of 400" and said["status"].startswith("running")
    assert said["speed"] == "14k tok/s", "64 x 64 tokens in the median of 0.1 and 0.5 s"
    assert said["left"] == "about 118 s" and "left" not in dict(seen[3].facts())
    assert "accuracy 0.750" in seen[3].run.summary


def test_the_page_reloads_as_long_as_the_run_goes_on(folder, tmp_path):
    with records.locked(folder):
        now = live.snapshot(folder, Tail(folder))
        live.write(now, tmp_path / "page.html", 5)
        running = (tmp_path / "page.html").read_text()
    ended = live.page(live.snapshot(folder, Tail(folder)))
    assert '<meta http-equiv="refresh" content="5">' in running and "refresh" not in ended
    for page in (running, ended):
        assert page.count("<svg") == 1 and "Training loss" in page and "base: copy" in page
        assert "default-src &#x27;none&#x27;" in page and not re.search(r"<script|https?://(?!www\.w3)", page)


def test_words_of_others_steer_neither_page_nor_terminal(tmp_path):
    folder = stored(tmp_path / "runs", attention="<b>\x1b[31m", status=None)
    now = live.snapshot(folder, Tail(folder))
    assert "<b>" not in live.page(now) and "\x1b" not in live.page(now)
    shown = live.in_text(now, 40)
    assert all(len(line) <= 40 and "\x1b" not in line for line in shown) and shown[2:4] == ["", "loss"]
    assert shown[4].startswith("  2.000") and shown[3 + live.HEIGHT].startswith("  0.667")


def test_a_curve_goes_through_its_points():
    assert curve([], 1, 2, 1) == ["⠀⠀"]
    assert curve([(0, 1.0), (1, 0.0)], 1, 2, 1) == ["⠑⢄"]
    assert curve([(0, 0.0), (1, 1.0)], 1, 2, 1) == ["⡠⠊"]
    assert curve([(0, 5.0), (1, 5.0)], 2, 2, 1) == ["⠤⠄"] and curve([(1, 5.0)], 1, 1, 1) == ["⠠"]


def test_loss_is_drawn_in_few_points():
    points = [(step, float(step)) for step in range(1, 1002)]
    thinned = live._thinned(points)
    assert len(thinned) == 167 <= live.POINTS and thinned[0] == (6, 3.5) and thinned[-1] == (1001, 999.0)


def test_the_command_says_how_a_run_ended(folder, tmp_path, capsys, monkeypatch):
    runs = ["--runs", str(tmp_path / "runs")]
    page = tmp_path / "live.html"
    assert main(["watch", "base", "--report", str(page), *runs]) == 0
    said = capsys.readouterr()
    assert "step 3 of 400" in said.out and f"xlab resume {folder}" in said.err and page.is_file()
    assert main(["watch", "nobody", *runs]) == 2 and main(["watch", "base", "--every", "0", *runs]) == 2
    with pytest.raises(UsageError, match="no run"):
        next(live.follow(tmp_path))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with records.locked(folder):
        monkeypatch.setattr("time.sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
        capsys.readouterr()
        assert main(["watch", "base", *runs]) == 130
        assert "the run goes on" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
