"""A run that is scored on the validation split cannot read the test split, whoever asks."""

import json

import numpy as np
import pytest
from test_train import TASK, tiny

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_task, check_config
from xformers_lab.tasks import Task
from xformers_lab.train import loop, records, trained

# Looks at the test split from within the batch of a step of training, by a way of its own.
PEEKING = TASK.replace("class Uneven", "class Peeking").replace("        rng = np", "        {peek}\n        rng = np")
PEEKS = {
    "batch": "split == 'train' and step == 3 and self.batch('test', 0)",
    "examples": "split == 'train' and step == 3 and self.examples('test')",
    "class": "split == 'train' and step == 3 and type(self).batch(self, 'test', 0)",
    "take": "split == 'train' and step == 3 and self.take('test', np.arange(2))",
}
REFUSED = "the test split cannot be read with score=validation"


@pytest.fixture(scope="module")
def task_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "uneven.py"
    path.write_text(TASK)
    return str(path)


def test_a_run_says_on_which_split_it_is_scored(task_file, tmp_path, capsys):
    test, validation = (tiny(task_file, tmp_path, score=score, eval_every=6) for score in ("test", "validation"))
    on_test, on_validation = loop.run(test), loop.run(validation)
    assert (on_test["split"], on_validation["split"]) == ("test", "validation")
    assert on_test["curve"][-1][1] == on_validation["curve"][-1][1] and on_test["metric"] != on_validation["metric"]
    assert [on_validation["loss"], on_validation["metric"]] == on_validation["validation"][-1][1:]
    assert on_test["id"] != on_validation["id"]
    folder = on_validation["run_dir"]
    assert (
        trained.evaluate(folder)["split"] == "validation" and trained.evaluate(folder)["loss"] == on_validation["loss"]
    )
    assert trained.evaluate(on_test["run_dir"])["split"] == "test"
    with pytest.raises(UsageError, match=REFUSED):
        trained.evaluate(folder, split="test")
    assert main(["eval", folder, "--split", "test"]) == 2 and REFUSED in capsys.readouterr().err
    assert main(["eval", folder, "--json"]) == 0 and json.loads(capsys.readouterr().out)["split"] == "validation"


@pytest.mark.parametrize("way", PEEKS)
def test_a_planted_look_at_the_test_split_ends_the_run(tmp_path, way):
    path = tmp_path / "peeking.py"
    path.write_text(PEEKING.replace("{peek}", PEEKS[way]))
    config = tiny(str(path), tmp_path / "runs", score="validation")
    with pytest.raises(UsageError, match=REFUSED):
        loop.run(config)
    assert len(records.read(configs.folder(config))) <= 3


def test_what_a_peek_sees_without_the_guard(tmp_path):
    path = tmp_path / "peeking.py"
    path.write_text(PEEKING.replace("{peek}", PEEKS["batch"]))
    assert loop.run(tiny(str(path), tmp_path / "runs"))["status"] == "ok"


@pytest.mark.parametrize("name", ["copy", "lm", "pathfinder"])
def test_every_way_to_the_test_split_is_shut(name, tmp_path):
    (tmp_path / "words.txt").write_text(" ".join(map(str, range(3000))))
    words = {"task": f"lm:path={tmp_path / 'words.txt'}" if name == "lm" else name, "seq_len": 256, "batch": 2}
    config = edit(Config(), **words)
    open_, shut = build_task(config), build_task(edit(config, score="validation"))
    assert type(shut).__name__ == type(open_).__name__ and isinstance(shut, type(open_))
    assert shut.describe() == open_.describe() and shut.reading() == open_.reading()
    ways = {
        "batch": lambda task, split: task.batch(split, 0),
        "examples": lambda task, split: task.examples(split),
        "take": lambda task, split: task.take(split, np.arange(2)),
        "segment": lambda task, split: task.segment(split, 0),
    }
    for way, look in ways.items():
        with pytest.raises(UsageError, match=REFUSED):
            look(shut, "test")
        if way in ("batch", "examples") or name == "lm":
            for split in ("train", "validation"):
                one, other = look(shut, split), look(open_, split)
                assert one == other if way == "examples" else np.array_equal(one.inputs, other.inputs)


def test_the_tasks_that_a_task_reads_from_are_shut_too(tmp_path):
    (tmp_path / "words.txt").write_text(" ".join(map(str, range(3000))))
    config = edit(Config(), task=f"mlm:of=lm:path={tmp_path / 'words.txt'}", seq_len=16, batch=2, score="validation")
    texts: Task = vars(build_task(config))["texts"]
    assert texts.batch("validation", 0).inputs.shape == (2, 16)
    with pytest.raises(UsageError, match=REFUSED):
        texts.batch("test", 0)


def test_a_config_is_checked_without_the_test_split(tmp_path):
    (tmp_path / "words.txt").write_text(" ".join(map(str, range(3000))))
    words = {"task": f"lm:path={tmp_path / 'words.txt'}", "memory": "xl", "position": "rope", "score": "validation"}
    check_config(edit(Config(), seq_len=16, dim=16, layers=1, batch=2, **words))
    with pytest.raises(UsageError, match="score"):
        edit(Config(), score="train")


@pytest.mark.full
def test_eval_and_resume_say_how_the_data_were_read(tmp_path, capfd):
    """As train does: a line for each split."""
    (tmp_path / "words.txt").write_text(" ".join(map(str, range(3000))))
    config = tiny(f"lm:path={tmp_path / 'words.txt'}", tmp_path / "runs", steps=2)
    lines = build_task(config).reading()
    folder = loop.run(config)["run_dir"]
    assert len(lines) >= 3
    for command in ("eval", "resume"):
        capfd.readouterr()
        assert main([command, folder, "--json"]) == 0
        out, err = capfd.readouterr()
        assert all(line in err for line in lines) and json.loads(out)["status" if command == "resume" else "split"]
