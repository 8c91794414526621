"""One whole study with a real worker's work: matched, tuned, with seeds, and again from what it left."""

import json
import shlex

import pytest

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.compare import cell

TINY = ["task=copy", "seq_len=16", "dim=16", "layers=1", "batch=4", "steps=3", "eval_batches=1"]


def study(capsys, *words) -> tuple[list[dict], str]:
    assert main(["compare", *words, "--json"]) == 0
    told = capsys.readouterr()
    return json.loads(told.out), told.err


@pytest.mark.full
@pytest.mark.usefixtures("inline")
def test_a_whole_study(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "attention=full,linear", "ffn=mlp", "seeds=2", "tune=lr", "match=flops", "--no-baselines"]
    rows, said = study(capsys, *words)
    assert len(rows) == 2 * 2 and "4 cells, 0 already done, and 10 tuning runs, about" in said
    for row in rows:
        assert row["status"] == "ok" and row["split"] == "test" and row["shared"]["status"] == "ok"
        assert row["tuning"]["split"] == "validation" and len(row["tuning"]["points"]) >= 5
        assert row["config"]["train"]["lr"] == row["tuning"]["best"]["lr"]
        assert row["matched"]["budget"] == "flops" and row["matched"]["target"] == rows[0]["matched"]["target"]
        again = configs.single(shlex.split(row["command"])[2:])
        assert str(configs.folder(again)) == row["run_dir"]
        # What the solver counted in shapes is what the run counted.
        assert row["flops"] / (4 * 16) == pytest.approx(row["matched"]["reached"])
    linear = next(row for row in rows if row["attention"] == "linear")
    assert linear["matched"]["changed"]["ffn"][0] == "mlp"
    assert linear["config"]["model"]["ffn"].startswith("mlp:ratio=")
    kept = json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert kept["study"] == {"match": "flops", "tune": "lr", "seeds": 2} and isinstance(kept["notes"], list)
    monkeypatch.setattr(cell, "train", None)  # all is there: nothing trains
    repeated, said = study(capsys, *words)
    assert repeated == rows and "as planned in runs/studies/" in said


@pytest.mark.full
@pytest.mark.usefixtures("inline")
def test_a_whole_ablation(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["ablate", *TINY, "norm=pre,post", "--no-baselines", "--report", "page.html"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "of the base" in shown and "norm=post: " in shown and "one seed, so not tested" in shown
    page = (tmp_path / "page.html").read_text()
    assert "norm=post" in page and "2 cells: 2 ok" in page
    kept = json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert [(row["name"], row["status"], row["norm"]) for row in kept["rows"]] == [
        ("base", "ok", "pre"),
        ("norm=post", "ok", "post"),
    ]
    for row in kept["rows"]:
        again = configs.single(shlex.split(row["command"])[2:])
        assert str(configs.folder(again)) == row["run_dir"]


@pytest.mark.full
@pytest.mark.usefixtures("inline")
def test_a_whole_study_of_equal_seconds(capsys, tmp_path, monkeypatch):
    """The reference keeps its steps; the other gets as many as fit its seconds, and the schedule follows them."""
    monkeypatch.chdir(tmp_path)
    rows, _ = study(capsys, *TINY, "attention=full,linear", "steps=40", "match=wallclock", "--no-baselines")
    full, linear = rows
    assert [row["status"] for row in rows] == ["ok", "ok"] and full["steps"] == 40
    assert full["matched"]["budget"] == linear["matched"]["budget"] == "wallclock"
    assert full["matched"]["target"] == linear["matched"]["target"]
    assert linear["steps"] == linear["config"]["train"]["steps"]
    if linear["steps"] != 40:
        assert linear["matched"]["changed"] == {"steps": [40, linear["steps"]]}
    assert linear["matched"]["ok"] == (abs(linear["matched"]["reached"] / linear["matched"]["target"] - 1) <= 0.02)
