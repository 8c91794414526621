"""Scaling studies: what names a variant and what a size, which words are none, and one from its words to its page."""

import json
import re

import pytest

import xformers_lab as xl
from xformers_lab import config as configs
from xformers_lab.api import scaling as api
from xformers_lab.cli import main
from xformers_lab.compare import cell, scaling
from xformers_lab.compare.scaling import Scale
from xformers_lab.errors import UsageError
from xformers_lab.train import loop

TINY = ["task=copy", "seq_len=16", "layers=1", "heads=1", "batch=4", "steps=3", "eval_batches=1"]


def parts(*words: str, by=None) -> tuple[list[str], list[str]]:
    grid, varied, _ = configs.study(list(words))
    return scaling.keys(grid, varied, Scale.read(by=by), configs.get)


def test_what_names_a_variant_and_what_a_size(tmp_path):
    assert parts("attention=full,linear", "dim=32,64,96", "seed=0,1") == (["attention"], ["dim"])
    assert parts("attention=full", "norm=pre,post", "dim=32,64", "layers=1,2") == (["norm"], ["dim", "layers"])
    assert parts("dim=32,64,96", "head=16") == ([], ["dim", "heads"])
    # Two rates at each size are two variants; one that follows the size is part of it.
    assert parts("dim=32,64,96", "lr=1e-3,3e-3") == (["lr"], ["dim"])
    recipe = tmp_path / "sizes.py"
    recipe.write_text("configs = [{'dim': dim, 'lr': 0.1 / dim, 'attention': a} for dim in (32, 64, 96) "
                      "for a in ('full', 'linear')]\n")  # fmt: skip
    assert parts(f"@{recipe}") == (["attention"], ["dim", "lr"])
    ratios = ["attention=full,linear", "ffn=mlp:ratio=2,mlp:ratio=3,mlp:ratio=4"]
    assert parts(*ratios) == (["attention", "ffn"], [])
    assert parts(*ratios, by="attention") == (["attention"], ["ffn"])


def test_words_of_the_fit_stand_among_those_of_the_comparison():
    words = ["task=copy", "x=flops", "dim=32,64,96", "by=attention", "max=3"]
    assert scaling.parted(words) == (["task=copy", "dim=32,64,96", "max=3"], {"x": "flops", "by": "attention"})
    assert Scale.read().words == [] and Scale.read("flops", "metric", "attention").words == [
        "x=flops",
        "y=metric",
        "by=attention",
    ]


REFUSED = {
    "no sizes": (["attention=full,linear"], r"at least 3 sizes, and there is 1 \(no key varies it\)"),
    "two sizes": (["attention=full,linear", "dim=32,64"], r"there are 2 \(dim with 2 values\)"),
    "equal sizes": (["attention=full,linear", "dim=32,32,64,64"], "there are 2|given twice|twice"),
    "match": (["attention=full,linear", "dim=32,64,96", "match=params"], "match=params: it gives all sizes the budget"),
    "x": (["dim=32,64,96", "x=flop"], 'x=flop: did you mean "flops"'),
    "y": (["dim=32,64,96", "y=accuracy"], "y=accuracy: .*loss, metric"),
    "by": (["dim=32,64,96", "by=atention"], 'by=atention: did you mean "attention"'),
    "name": (["dim=32,64,96", "name=mine"], "a name is of one run"),
    "nothing": (["x=flops"], "scale what"),
    "key": (["dim=32,64,96", "widht=3"], "widht"),
}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_scaling_study_is_refused(words, message, monkeypatch, capsys):
    monkeypatch.setattr(loop, "run", None)
    monkeypatch.setattr(cell, "check", None)  # nothing is built either
    assert main(["scale", *(TINY if words[0] != "x=flops" else []), *words]) == 2
    told = capsys.readouterr()
    assert not told.out and len(told.err.splitlines()) == 1
    assert re.search(message, told.err), told.err


@pytest.mark.usefixtures("inline")
def test_sizes_of_equal_parameters_are_refused_before_anything_trains(monkeypatch, capsys):
    monkeypatch.setattr(cell, "check", None)
    words = ["scale", "task=copy", "seq_len=16", "dim=16", "layers=1", "heads=1,2,4"]
    assert main(words) == 2
    assert "heads: sizes by these have 1 different numbers of parameters" in capsys.readouterr().err
    with pytest.raises(UsageError, match="at least 3 sizes"):
        xl.scale("task=copy", dim=[16, 32])
    with pytest.raises(UsageError, match="x=flop: did you mean"):
        xl.scale("task=copy", "x=flop", dim=[16, 32, 48])
    with pytest.raises(UsageError, match="scale what"):
        xl.scale()


@pytest.mark.full
@pytest.mark.usefixtures("inline")
def test_a_whole_scaling_study(capsys, tmp_path, monkeypatch):
    """Trained once, with the ids of a comparison; fitted; and fitted again from what it left."""
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "attention=full,linear", "dim=8,16,24", "seeds=2"]
    assert main(["scale", *words, "--dry-run"]) == 0
    assert "12 cells, 0 already done" in capsys.readouterr().out and not (tmp_path / "runs" / "copy").exists()
    assert main(["scale", *words, "--json", "--report", "page.html", "--figures", "figures"]) == 0
    whole = json.loads(capsys.readouterr().out)
    (fitted,), rows = whole["fits"], whole["rows"]
    assert len(rows) == 12 and all(row["status"] == "ok" and row["role"] == "variant" for row in rows)
    assert [curve["variant"] for curve in fitted["curves"]] == ["full", "linear"]
    for curve in fitted["curves"]:
        assert [point["size"] for point in curve["points"]] == ["dim=8", "dim=16", "dim=24"]
        assert curve["law"] == "L = A x^-a" and curve["seeds"] == [0, 1] and len(curve["exponent_interval"]) == 2
    of_full = [row for row in rows if row["attention"] == "full" and row["seed"] == 0]
    sizes = [row["parameters"] - row["embedding_parameters"] for row in of_full]
    assert [point["x"] for point in fitted["curves"][0]["points"]] == sizes
    assert main(["show", *TINY, "attention=full", "dim=8", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["sizes"]["parameters"]["parts"]
    assert of_full[0]["embedding_parameters"] == sum(counted[name] for name in ("embedding", "position", "head"))
    page = (tmp_path / "page.html").read_text()
    assert "Loss by size" in page and "Which variant at which size" in page
    assert list((tmp_path / "figures").glob("loss_by_size*.svg"))

    grid, _, _ = configs.study(words)
    assert {row["id"] for row in rows} == {configs.identity(one) for one in grid}
    monkeypatch.setattr(cell, "train", None)  # all is there: nothing trains
    table = xl.scale(*words, x="flops", quiet=True)
    assert table.command == "xlab scale " + " ".join(words) + " x=flops" and table.ok
    (flops,) = table.fits()
    assert flops.curves[0].fit.sizes[0] == pytest.approx(of_full[0]["flops"] * 3)
    assert table.verdict() == " ".join(table.plain()["fits"][0]["verdict"]) and table[:2].varied == table.varied
    assert main(table.command.split()[1:]) == 0
    assert capsys.readouterr().out.rstrip() == repr(table)
    for stored in (["runs"], ["runs/compare.json", "--report", "again.html"], ["runs", "task=copy"]):
        assert main(["scale", *stored, "--json"]) == 0
        again = json.loads(capsys.readouterr().out)["fits"][0]
        assert again["curves"] == fitted["curves"]
    assert "Loss by size" in (tmp_path / "again.html").read_text()
    assert main(["scale", "runs", "attention=full"]) == 0 and "exponents a" in capsys.readouterr().out
    refused = {
        ("runs", "dim=8,16"): "No variant has results at enough sizes",
        ("runs", "task=lm"): "no run of runs fits task=lm",
        ("runs/compare.json", "task=copy"): "is fitted whole",
        ("nothing.json",): "no comparison there yet",
        ("runs", "--dry-run"): "nothing trains",
    }
    for words_of_it, message in refused.items():
        assert main(["scale", *words_of_it]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.usefixtures("inline")
def test_a_cell_that_fails_is_a_row_and_left_out_of_the_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = cell.train

    def fails(tell, config, **more):
        if config["model"]["dim"] == 24 and config["model"]["attention"] == "linear":
            return {"status": "failed", "reason": "planted"}
        return train(tell, config, **more)

    monkeypatch.setattr(cell, "train", fails)
    assert main(["scale", *TINY, "attention=full,linear", "dim=8,16,24,32"]) == 5
    shown = capsys.readouterr().out
    assert (
        "failed: planted" in shown and "Left out of the fits: dim=24: linear has no result (failed: planted)" in shown
    )


def test_a_word_names_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert all(map(api.is_stored, ("runs", "runs/compare.json", "there/is/none.json")))
    assert not any(map(api.is_stored, ("task=copy", "@runs.json", "attention=./mine.json", "none")))
