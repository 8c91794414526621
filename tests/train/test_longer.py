"""A run that goes on beyond its last step ends in the very bits of the one that was begun with so many steps."""

import json

import pytest
from test_resume import arrays
from test_train import TASK, losses_of, tiny

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import edit
from xformers_lab.errors import UsageError
from xformers_lab.record import sealed
from xformers_lab.train import longer, loop, records

CONSTANT = {
    "schedule": "constant",
    "warmup": 0.5,
    "dropout": 0.1,
    "eval_every": 3,
    "eval_batches": 1,
    "score": "validation",
}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "uneven.py"
    path.write_text(TASK)
    return str(path)


@pytest.fixture(scope="module")
def first(task, tmp_path_factory):
    """A finished run of 4 steps, 2 of them warm; it validated at its last step, which a longer one does not."""
    config = tiny(task, tmp_path_factory.mktemp("runs"), **CONSTANT, steps=4, name="short", tags="a")
    loop.run(config)
    return config


def grown(config, *words):
    """What `xlab resume` with these words does -> the record and the config of the longer run."""
    folder, asked = configs.folder(config), longer.asked(config, words)
    return loop.resume(longer.begin(folder, config, asked)), asked


def test_it_is_the_run_that_was_begun_with_so_many_steps(first, task, tmp_path):
    before = {path: path.read_bytes() for path in configs.folder(first).rglob("*") if path.is_file()}
    record, config = grown(first, "steps=8", "warmup=0.25", "tags=b", "name=long")
    whole = loop.run(edit(config, runs=str(tmp_path)))
    for key in ("id", "status", "loss", "metric", "validation", "steps", "skipped", "step"):
        assert record[key] == whole[key], key
    assert losses_of(record) == losses_of(whole) and arrays(config) == arrays(edit(config, runs=str(tmp_path)))
    lines = [records.read(configs.folder(each)) for each in (config, edit(config, runs=str(tmp_path)))]
    timeless = [[{key: line[key] for key in line if key != "seconds"} for line in each] for each in lines]
    assert timeless[0] == timeless[1], "no validation of step 4 is left"
    assert record["extended"] == {
        "run": str(configs.folder(first)),
        "id": configs.identity(first),
        "step": 4,
        "steps": 4,
    }
    assert "extended" not in whole and configs.folder(config).parent == configs.folder(first).parent
    stored = records.read_json(configs.folder(config) / "config.json") or {}
    assert (stored["name"], stored["tags"]) == ("long", "a+b")
    env = records.read_json(configs.folder(config) / "env.json") or {}
    assert env["started"] == record["started"] and "resumed" in env
    assert before == {path: path.read_bytes() for path in before}, "the first run is as it was"
    assert grown(first, "steps=8", "warmup=0.25")[0] == record, "a second time it is there"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["steps=8"], "step 1 was taken at the learning rate 0.0015, which would be 0.00075 .* say warmup=0.25 too"),
        (["steps=3"], "only more steps go on from it"),
        (["warmup=0.1"], "only more steps go on from it"),
        (["lr=1", "steps=8"], "resume takes steps="),
        (["steps=8,9"], "wants a whole number"),
        (["@run.json"], "resume takes steps="),
    ],
)
def test_what_cannot_go_on_says_why(first, words, said):
    there = set(configs.folder(first).parent.iterdir())
    with pytest.raises(UsageError, match=said):
        grown(first, *words)
    assert set(configs.folder(first).parent.iterdir()) == there, "nothing was begun"


@pytest.mark.parametrize("changes", [{"schedule": "cosine"}, {"schedule": "cosine", "warmup": 0}])
def test_a_decay_towards_the_last_step_cannot_go_on(first, changes):
    shorter = edit(first, **changes)
    with pytest.raises(UsageError, match="only rates that do not go by the last step"):
        longer._refuse_other_rates(shorter, edit(shorter, steps=8), 4)
    longer._refuse_other_rates(shorter, edit(shorter, steps=8, warmup=shorter.train.warmup / 2), 1)


def test_a_run_that_diverged_has_no_longer_one(first, tmp_path):
    folder = configs.folder(edit(first, runs=str(tmp_path)))
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(sealed({"status": "nan"})))
    with pytest.raises(UsageError, match="it diverged"):
        longer.begin(folder, first, longer.asked(first, ["steps=8", "warmup=0.25"]))


def test_the_command_names_runs_and_makes_longer_ones(first, inline, capsys):
    runs = ["--runs", first.runs, "--trust", "--json"]
    assert main(["resume", "short", "tags=c", *runs]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    assert (records.read_json(configs.folder(first) / "config.json") or {})["tags"] == "a+c"
    assert main(["resume", "short", "steps=6", *runs]) == 2 and "say warmup=0.333" in capsys.readouterr().err
    assert main(["resume", "short", "steps=6", "--from-scratch", *runs]) == 2 and "goes on" in capsys.readouterr().err
    assert main(["resume", "short", "steps=6", "warmup=0.33", "name=six", *runs]) == 0
    assert json.loads(capsys.readouterr().out)["extended"]["step"] == 4
    assert main(["resume", "six", *runs]) == 0 and json.loads(capsys.readouterr().out)["steps"] == 6
