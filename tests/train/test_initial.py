"""Parameters of another run as the first ones: what is taken, what is said of it, and what a run's id says."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from test_train import tiny

from xformers_lab import config as configs
from xformers_lab import named_run
from xformers_lab.cli import main
from xformers_lab.config import edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_task
from xformers_lab.train import checkpoint, initial, jobs, loop, records, trained
from xformers_lab.train.state import init


def first_state(config):
    job = jobs.prepare(config, configs.folder(config))
    job.run_dir.mkdir(parents=True)
    return loop._start(job, False, False)[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a trained run on 10 symbols."""
    config = tiny("copy", tmp_path_factory.mktemp("runs"), position="learned", eval_batches=1)
    loop.run(config)
    return configs.folder(config)


@pytest.fixture(scope="module")
def stored(source):
    return checkpoint.arrays(next((source / "checkpoints").iterdir()))


def leaves_of(state) -> dict:
    return checkpoint.named_leaves({"params": state.params, "extra": state.extra})


def test_the_same_model_begins_where_the_other_ended(source, stored, tmp_path, caplog):
    config = tiny("reverse", tmp_path, init=str(source))
    for name, leaf in leaves_of(first_state(config)).items():
        np.testing.assert_array_equal(leaf, stored[name])
    said = next(record.message for record in caplog.records if "arrays taken" in record.message)
    assert str(source) in said and "fresh: none" in said and "of step 6" in said


@pytest.mark.full
def test_tables_are_cut_and_other_shapes_are_fresh(source, stored, tmp_path):
    config = tiny("copy:symbols=5", tmp_path, init=str(source), seq_len=32)
    fresh = leaves_of(init(edit(config, init=None), build_task(config), jobs.prepare(config, tmp_path).tx))
    state = leaves_of(first_state(config))
    token, place = "params.embedding.embedding", "params.position.table"
    np.testing.assert_array_equal(state[token], stored[token][:6])
    np.testing.assert_array_equal(state[place][:16], stored[place])
    np.testing.assert_array_equal(state[place][16:], fresh[place][16:])
    np.testing.assert_array_equal(state["params.head.kernel"], fresh["params.head.kernel"])
    assert not np.array_equal(state["params.head.kernel"], stored["params.head.kernel"][:, :6])
    kept = records.read_json(configs.folder(config) / initial.INITIALISED) or {}
    assert kept["cut"] == {token: [6, 6], place: [16, 32]}
    assert kept["fresh"] == ["params.head.bias", "params.head.kernel"] and kept["run"] == str(source)
    assert kept["taken"] + 4 == len(state)


@pytest.mark.full
def test_a_run_on_from_it_keeps_what_it_began_with_and_does_not_look_again(source, tmp_path):
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    config = tiny("reverse", tmp_path / "runs", init=str(moved), steps=4, eval_batches=1)
    folder = configs.folder(config)
    with pytest.raises(loop.Interrupted):
        loop.run(config, stop=lambda: any(records.read(folder)))
    shutil.rmtree(moved)
    record = loop.resume(folder)
    assert record["status"] == "ok" and record["initialised"]["fresh"] == []
    assert record["initialised"]["checkpoint"] == named_run.parts(str(config.init))[1]
    assert trained.evaluate(folder)["loss"] == record["loss"]
    assert "initialised" not in json.loads((source / "result.json").read_text())


def test_the_id_goes_by_the_parameters_and_not_by_the_place(source, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(source, moved)
    here, there = (tiny("reverse", init=str(folder)) for folder in (source, moved))
    assert here.init != there.init and configs.identity(here) == configs.identity(there)
    assert configs.identity(here) != configs.identity(edit(here, init=None))
    assert configs.from_dict(configs.to_dict(here)) == here
    configs.save(here, tmp_path / "config.toml")
    assert configs.single([f"@{tmp_path / 'config.toml'}"]) == here
    several, varied = configs.sweep([f"init=none,{source}", "task=reverse"])
    assert [config.init for config in several] == [None, here.init] and varied == ["init"]


def test_another_checkpoint_is_another_run(source, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    config = tiny("reverse", tmp_path, init=str(changed))
    manifest = next(changed.glob("checkpoints/*/MANIFEST.json"))
    manifest.write_text(manifest.read_text().replace("{", "{ ", 1))
    with pytest.raises(UsageError, match=r"changed@[0-9a-f]{12}: its checkpoints have changed since; init=.*changed "):
        initial.check(config, build_task(config))
    assert configs.identity(tiny("reverse", tmp_path, init=str(changed))) != configs.identity(config)
    shutil.rmtree(changed)
    with pytest.raises(UsageError, match="there is no run any more; give that folder back"):
        initial.check(config, build_task(config))


def test_a_damaged_checkpoint_is_refused(source, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    data = max((broken / "checkpoints").rglob("state/**/*"), key=lambda path: path.stat().st_size * path.is_file())
    data.write_bytes(b"x" + data.read_bytes()[1:])
    config = tiny("reverse", tmp_path, init=str(broken))
    with pytest.raises(UsageError, match=r"its checkpoint is damaged .*sha256"):
        initial.check(config, build_task(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "nowhere"}, "init=nowhere: no run in runs has this name or id"),
        ({"dim": 8, "layers": 2}, "no matrix of that run has the path"),
    ],
)
def test_what_cannot_be_taken_is_refused_before_a_run_begins(source, tmp_path, capsys, changes, message):
    words = {"init": str(source), "task": "reverse", "seq_len": 16, "dim": 16, "steps": 2} | changes
    assert main(["train", f"runs={tmp_path}", *(f"{key}={value}" for key, value in words.items())]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.rglob("config.json"))


def test_a_run_without_a_checkpoint_cannot_be_begun_from(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds no checkpoint yet; train it first"):
        tiny("reverse", init=str(tmp_path))


def test_between_texts_and_other_inputs_no_table_of_tokens_is_taken(source, tmp_path):
    rows = [f'{{"text": "{at} {"ab"[at % 2]}", "label": {at % 2}}}' for at in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = tiny(f"text:path={tmp_path / 'rows.jsonl'}", tmp_path, init=str(source), model="decoder")
    matched = initial.match(config, build_task(config))
    assert "params.embedding.embedding" in matched.fresh and not matched.cut
    assert any(name.startswith("params.stack") for name in matched.taken)


@pytest.mark.full
@pytest.mark.parametrize("theirs", ["bytes", "300 subwords 0123456789ab from 1 on"])
def test_texts_of_another_tokenizer_are_refused(source, tmp_path, theirs):
    config = tiny("mlm", tmp_path, init=str(source))
    task = build_task(tiny("copy", tmp_path))
    task.tokenizer = "bytes from 1 on"
    with pytest.raises(UsageError, match=f"init=.* tokens of {theirs}, those of task mlm are of bytes from 1 on"):
        initial._same_tokens(config, {"tokenizer": theirs}, task)
    assert initial._same_tokens(config, {"tokenizer": task.tokenizer}, task)
    assert not initial._same_tokens(config, {"tokenizer": ""}, task)


@pytest.mark.full
def test_another_head_and_kind_take_the_rest(source, tmp_path):
    config = tiny("listops", tmp_path, init=str(source), model="encoder")
    matched = initial.match(config, build_task(config))
    assert matched.fresh == ["params.head.bias", "params.head.kernel"] and "params.embedding.embedding" in matched.cut
    tx = jobs.prepare(config, tmp_path).tx
    state = init(config, build_task(config), tx)
    taken = initial.take(matched, state, tx)
    assert jax.tree.structure(taken) == jax.tree.structure(state)
    for field in dataclasses.fields(state):
        if field.name not in ("params", "extra"):
            jax.tree.map(np.testing.assert_array_equal, getattr(taken, field.name), getattr(state, field.name))
