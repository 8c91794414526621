"""A mechanism of one's own: `xlab new` writes it, the kit passes it, a model trains with it."""

import json

import kinds
import pytest

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.check import run as kit
from xformers_lab.check import values
from xformers_lab.check.new import new
from xformers_lab.check.run import check, kits
from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.train.loop import run

TINY = {"dim": 16, "layers": 1, "heads": 2, "seq_len": 16, "batch": 4, "steps": 2, "eval_batches": 1}


def tiny(folder, **edits):
    return configs.edit(configs.Config(), **{**TINY, "task": "copy", "runs": str(folder / "runs"), **edits})


def sources():
    package = spec.folder("attention").parent
    return {path: path.read_bytes() for path in package.rglob("*.py")}


@pytest.mark.full
@pytest.mark.usefixtures("inline")
def test_skeleton_passes_trains_is_timed_and_reported_without_touching_the_package(tmp_path, monkeypatch, capsys):
    before = sources()
    path = new("attention", "my_attn", tmp_path)
    report = check(str(path))
    assert report.passed, report.failed
    record = run(tiny(tmp_path, attention=f"{path}:reach=8"))
    assert record["status"] == "ok"
    # The whole kit has just passed it; the bench, which asks again at another place of the cache, needs the cheap part.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kit, "PROPERTIES", [values.equals_reference])
    page = tmp_path / "report.html"
    words = [f"attention={path}", "seq_len=16", "dim=16", "batch=2", "--rounds", "1", "--pass", "forward", "--json"]
    assert main(["bench", *words, "--report", str(page)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["status"] == "ok" and row["checked"] is True and row["attention"] == str(path)
    table = page.read_text().partition("<tbody>")[2].partition("</tbody>")[0]
    assert str(path) in table and "my_attn" in page.read_text().partition("Who sees whom")[0]
    assert sources() == before


@pytest.mark.parametrize("shelf", kinds.every_third([shelf for shelf in spec.SHELVES if shelf != "attention"]))
@pytest.mark.full
def test_skeletons_of_other_shelves_pass_their_kit_or_train(tmp_path, shelf):
    path = new(shelf, "my_own", tmp_path)
    assert spec.entry(shelf, str(path)).__name__ == "MyOwn"
    if shelf in kits():
        report = check(str(path), shelf)
        assert report.passed, report.failed
    else:
        assert run(tiny(tmp_path, **{shelf: str(path)}))["status"] == "ok"


def test_its_options_are_options_of_the_lab(tmp_path):
    path = new("attention", "fading_2", tmp_path)
    assert spec.options(spec.entry("attention", str(path)))["reach"].help == "positions over which a score falls by one"
    model = build_model(tiny(tmp_path, attention=f"{path}:reach=3"), build_task(tiny(tmp_path)))
    assert model is not None
    with pytest.raises(UsageError, match="reach must be above 0"):
        spec.build("attention", f"{path}:reach=0", length=8, dim=8, heads=1)
    with pytest.raises(UsageError, match='did you mean "reach"'):
        spec.build("attention", f"{path}:reech=1", length=8, dim=8, heads=1)


@pytest.mark.parametrize("shelf, name, message", [
    ("attention", "MyAttn", 'for example "my_attn"'),
    ("attention", "my-attn", 'for example "my_attn"'),
    ("attention", "2fast", 'for example "my_2fast"'),
    ("attention", "class", 'for example "my_class"'),
    ("attention", "../evil", 'for example "evil"'),
    ("attention", "_hidden", 'for example "hidden"'),
    ("attention", "", 'for example "my"'),
    ("attention", "attn.py", 'for example "attn_py"'),
    ("attention", "local", 'has "local" already'),
    ("atention", "mine", 'did you mean "attention"'),
])  # fmt: skip
def test_bad_names_are_refused_with_the_nearest_right_one(tmp_path, shelf, name, message):
    with pytest.raises(UsageError, match=message):
        new(shelf, name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    path = new("attention", "mine", tmp_path)
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        new("attention", "mine", tmp_path)
    assert path.read_text() == "precious"
    with pytest.raises(UsageError, match="cannot write"):
        new("attention", "mine", tmp_path / "nowhere")
