"""SCAN's files: what is read of them, where the actions stand, and what counts as right."""

import gzip

import jax.numpy as jnp
import numpy as np
import pytest
from test_tasks import build, certain, meaning

from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS
from xformers_lab.tasks.scan import BEGIN, BLANK, END, SIGNS, SOURCE


@pytest.fixture
def folder(tmp_path):
    """A split with one command for each number of repetitions, compressed, and a longer one."""
    verbs = [f"{verb} {way}" for verb in ("walk", "look", "run", "jump", "turn") for way in ("left", "around right")]
    commands = [f"{one} {word} {other}" for one in verbs for other in verbs for word in ("and", "after")]
    for name, train, test in (("simple", commands[:160], commands[160:]), ("length", verbs, commands)):
        for side, some in (("train", train), ("test", test)):
            text = "".join(f"IN: {command} OUT: {' '.join(meaning(command))}\n" for command in some)
            (tmp_path / f"tasks_{side}_{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def test_a_sequence_is_command_and_actions(folder):
    task = build(f"scan:path={folder}", 32)
    batch = task.take("test", np.arange(task.examples("test")))
    for row, targets, weights in zip(batch.inputs, batch.targets, batch.weights, strict=True):
        command = task.decode(row[:SOURCE].tolist())
        actions = [SIGNS.index(word) for word in meaning(command)]
        assert row[SOURCE] == BEGIN and (targets[:-1] == row[1:]).all()
        asked = np.flatnonzero(weights)
        assert targets[asked].tolist() == [*actions, END] and asked[0] == SOURCE
        assert task.encode(command) == row[: SOURCE + 1].tolist()
        assert (row[SOURCE + 2 + len(actions) :] == BLANK).all()


def test_the_published_test_split_is_the_test_split(folder):
    task = build(f"scan:path={folder}", 32)
    assert task.examples("test") == 40 and task.examples("train") + task.examples("validation") == 160
    seen = {split: {row[:SOURCE].tobytes() for row in task.rows[split]} for split in SPLITS}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]


def test_an_answer_counts_whole_or_not_at_all(folder):
    task = build(f"scan:path={folder}", 32, batch=8)
    batch = task.batch("test", 0)
    answers = batch.targets.copy()
    answers[0, np.flatnonzero(batch.weights[0])[1]] += 1
    answers[1:3][batch.weights[1:3] == 0] = 5  # what is not asked for
    right, asked = task.metric(jnp.asarray(certain(answers % task.outputs, task.outputs)), batch)
    assert (float(right), float(asked)) == (7, 8)


def test_what_does_not_fit_is_left_out_aloud(folder):
    task = build(f"scan:path={folder}:split=length", 32 - 8)
    assert task.examples("test") < 200 and task.longer == 200 - task.examples("test")
    assert f"test: {task.longer} examples left out: they do not fit into seq_len=24" in task.reading()
    with pytest.raises(UsageError, match="the longest has 8 actions: use seq_len=18"):
        build(f"scan:path={folder}:split=length", 11)


@pytest.mark.parametrize(
    "line, says",
    [
        ("IN: jump", "is not like IN: jump twice OUT: I_JUMP I_JUMP"),
        ("IN: jumps OUT: I_JUMP", 'unknown word "jumps": did you mean "jump"'),
        ("IN: jump OUT: I_JUMB", 'did you mean "I_JUMP"'),
        ("IN: jump and jump and jump and jump and jump and OUT: I_JUMP", "1 to 9 words"),
        ("IN: \xff OUT: I_JUMP", "unknown word"),
    ],
)
def test_a_malformed_line_is_named(folder, line, says):
    (folder / "tasks_train_odd.txt").write_bytes(b"IN: run OUT: I_RUN\n\n" + line.encode("latin-1") + b"\n")
    (folder / "tasks_test_odd.txt").write_text("IN: walk OUT: I_WALK\n")
    with pytest.raises(UsageError) as caught:
        build(f"scan:path={folder}:split=odd", 32)
    assert f"scan: {folder / 'tasks_train_odd.txt'}, line 3" in str(caught.value) and says in str(caught.value)


def test_other_splits_are_named(folder):
    with pytest.raises(UsageError, match="length, simple"):
        build(f"scan:path={folder}:split=jump", 32)
    (folder / "tasks_test_length.txt.gz").unlink()
    with pytest.raises(UsageError, match=r"\(splits: simple\)"):
        build(f"scan:path={folder}:split=length", 32)
    (folder / "more").mkdir()
    (folder / "more" / "tasks_test_simple.txt").write_text("")
    with pytest.raises(UsageError, match="same name"):
        build(f"scan:path={folder}", 32)
    with pytest.raises(UsageError, match="no pair of files"):
        build(f"scan:path={folder / 'more'}", 32)


@pytest.mark.full
def test_a_command_is_read_from_the_command_line(folder, tmp_path, capsys, monkeypatch):
    """An encoder-decoder trains, is evaluated by whole answers, and decodes a command."""
    monkeypatch.chdir(tmp_path)
    words = [f"task=scan:path={folder}", "seq_len=32", "dim=16", "heads=2", "layers=1", "steps=3", "batch=8"]
    assert main(["train", *words, "eval_batches=1"]) == 0
    run = next((tmp_path / "runs").rglob("result.json")).parent
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "jump left", "--new", "4"]) == 0
    assert set(capsys.readouterr().out.split()) & set(SIGNS)


@pytest.mark.parametrize("split, sizes, longest", [("simple", (16728, 4182), 48), ("length", (16990, 3920), 48),
                                                   ("addprim_jump", (14670, 7706), 48)])  # fmt: skip
def test_the_published_files(shared, split, sizes, longest):
    task = build(f"scan:path={shared / 'data' / 'scan'}:split={split}", 64)
    assert (task.examples("train") + task.examples("validation") + task.dropped, task.examples("test")) == sizes
    assert max(task.describe()["longest"].values()) == longest and task.longer == 0
    rows = task.rows["test"][::97]
    for row in rows:
        command = task.decode(row[:SOURCE].tolist())
        assert task.decode(row[SOURCE:].tolist()).split() == meaning(command)
