"""bAbI's files: what is read of them, what is cut, and what counts as right."""

import gzip

import jax.numpy as jnp
import numpy as np
import pytest
from test_tasks import build, certain

from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS
from xformers_lab.tasks.babi import BLANK, QUESTION, UNHEARD, UNKNOWN

STORY = """1 Mary went to the kitchen.
2 John took the milk.
3 Where is Mary? \tkitchen\t1
4 Mary went to the office.
5 Where is Mary? \toffice\t4
1 John went to the garden.
2 What did John do?\tmilk,football\t1
"""
TEST = """1 Mary flew to the kitchen.
2 Where is Mary?\tkitchen\t1
1 John went to the garden.
2 Where is John?\tgarden\t1
1 John went to the office.
2 Where is John?\toffice\t1
"""
VALID = """1 John took the milk.
2 Where is John?\tkitchen\t1
"""


@pytest.fixture
def folder(tmp_path):
    """Task 1 with a validation split, compressed; task 2 with other words."""
    for number, words in ((1, "Mary"), (2, "Sandra")):
        for split, text in (("train", STORY), ("valid", VALID), ("test", TEST)):
            content = text.replace("Mary", words).encode()
            (tmp_path / f"qa{number}_some-facts_{split}.txt.gz").write_bytes(gzip.compress(content))
    return tmp_path


def shown(task, split):
    batch = task.take(split, np.arange(task.examples(split)))
    rows = [task.decode(row[real].tolist()) for row, real in zip(batch.inputs, batch.valid, strict=True)]
    return list(zip(rows, map(task.answer_name, batch.targets), strict=True))


def test_a_sequence_is_the_story_so_far_and_the_question(folder):
    task = build(f"babi:path={folder}", 32)
    assert shown(task, "train") == [
        ("mary went to the kitchen . john took the milk . where is mary ?", "kitchen"),
        ("mary went to the kitchen . john took the milk . mary went to the office . where is mary ?", "office"),
        ("john went to the garden . what did john do ?", "milk,football"),
    ]
    batch = task.take("train", np.arange(3))
    assert (batch.valid == (batch.inputs != BLANK)).all()
    marked = [task.decode(row[of_row].tolist()) for row, of_row in zip(batch.inputs, batch.marked, strict=True)]
    assert marked == ["where is mary ?", "where is mary ?", "what did john do ?"] and task.marks == 5
    text = "Mary went to the kitchen. John took the milk. Where is Mary?"
    assert task.encode(text) == batch.inputs[0][batch.valid[0]].tolist() and task.encode(text)[-1] == QUESTION
    with pytest.raises(ValueError, match='"flew" is no word'):
        task.encode("Mary flew.")


def test_words_and_answers_are_of_the_training_split(folder):
    task = build(f"babi:path={folder}:overlap=keep", 32)
    assert "flew" not in task.words and task.answers == ("(unheard)", "kitchen", "milk,football", "office")
    assert task.chance == 1 / 3
    batch = task.take("test", np.arange(3))
    assert (batch.inputs == UNKNOWN).sum() == 1
    assert batch.targets.tolist() == [1, UNHEARD, 3]
    right, asked = task.metric(jnp.asarray(certain(batch.targets, task.outputs)), batch)
    assert (float(right), float(asked)) == (2, 3), "what training lacks is never right"
    assert "test: answers that the training data lack, which count as wrong: 1" in task.reading()
    assert "test: stories with words that the training data lack: 1" in task.reading()


def test_several_tasks_share_words_and_answers(folder):
    task = build(f"babi:path={folder}:number=1+2", 32)
    assert {"mary", "sandra"} <= set(task.words)
    assert task.examples("train") == 6 and "2 files together" in task.reading()[0]
    assert task.tokenizer != build(f"babi:path={folder}", 32).tokenizer


@pytest.mark.parametrize("length, left, cut, lost", [(21, 3, 0, 0), (20, 2, 1, 0), (14, 1, 2, 1), (10, 1, 3, 2)])
def test_the_first_sentences_of_what_does_not_fit_are_left_out_aloud(folder, length, left, cut, lost):
    task = build(f"babi:path={folder}", length)
    text, answer = shown(task, "train")[1]
    assert text.endswith("where is mary ?") and text.count(".") == left and answer == "office"
    assert task.cut["train"] == cut
    note = (
        f"train: stories cut on the left to fit into seq_len={length}: {cut}, of which without a fact that the answer "
    )
    note += f"needs: {lost}"
    assert (note in " ".join(task.reading())) is (cut > 0)
    with pytest.raises(UsageError, match="seq_len=3 does not hold the question alone: use 5 or more"):
        build(f"babi:path={folder}", 3)


def test_copies_of_held_out_questions_are_dropped(folder):
    (folder / "qa1_some-facts_train.txt.gz").write_bytes(gzip.compress((STORY + TEST).encode()))
    task = build(f"babi:path={folder}", 32)
    assert task.examples("train") == task.dropped == 3
    with pytest.raises(UsageError, match="3 of train stand in a held-out split"):
        build(f"babi:path={folder}:overlap=refuse", 32)


def test_validation_is_taken_by_whole_stories(tmp_path):
    many = "".join(
        f"1 Mary took {' '.join(f'{number:03}')} apples.\n2 What has Mary?\tapples\t1\n"
        "3 Mary ate.\n4 What has Mary?\tapples\t1 3\n"
        for number in range(200)
    )
    (tmp_path / "qa7_counting_train.txt").write_text(many)
    (tmp_path / "qa7_counting_test.txt").write_text(TEST)
    task = build(f"babi:path={tmp_path}:number=7", 32)
    stories = {split: {text.split(" apples")[0] for text, _ in shown(task, split)} for split in ("train", "validation")}
    assert len(stories["validation"]) > 5 and not stories["train"] & stories["validation"]
    assert task.examples("train") == 2 * len(stories["train"])


@pytest.mark.parametrize(
    "line, says",
    [
        ("Mary went home.", "line 2 is not like 1 Mary went home."),
        ("2", "line 2 is not like"),
        ("2 .", "line 2 is not like"),
        ("2 Where is Mary?\thome\t9", "line 2: supporting fact 9 is no sentence before it"),
        ("2 Wh\xe9re?\thome\t1", "line 2 is no UTF-8"),
    ],
)
def test_a_malformed_line_is_named(folder, line, says):
    (folder / "qa3_odd_test.txt").write_text(TEST)
    (folder / "qa3_odd_train.txt").write_bytes(b"1 Mary went home.\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(UsageError) as caught:
        build(f"babi:path={folder}:number=3", 32)
    assert str(folder / "qa3_odd_train.txt") in str(caught.value) and says in str(caught.value)


def test_files_that_are_missing_or_there_twice_are_named(folder):
    with pytest.raises(UsageError, match=r"no files of task 4 like qa4_NAME_train\.txt"):
        build(f"babi:path={folder}:number=4", 32)
    (folder / "qa2_some-facts_train.txt.gz").unlink()
    with pytest.raises(UsageError, match=r"no train file of task 2: add qa2_NAME_train\.txt"):
        build(f"babi:path={folder}:number=1+2", 32)
    (folder / "en").mkdir()
    (folder / "en" / "qa1_train.txt").write_text(STORY)  # as the folders with validation splits name it
    with pytest.raises(UsageError, match="are of one task and split"):
        build(f"babi:path={folder}", 32)


@pytest.mark.full
def test_it_trains_from_the_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"task=babi:path={folder}", "seq_len=24", "dim=16", "heads=2", "layers=1", "steps=3", "batch=4"]
    assert main(["train", *words]) == 0


def test_the_published_files(shared):
    path = shared / "data" / "babi_en10k"
    if not path.is_dir():
        pytest.skip("no ../shared/data/babi_en10k here")
    task = build(f"babi:path={path}:number=1+4", 80)
    assert task.examples("test") == 2000 and sum(map(task.examples, SPLITS)) + task.dropped == 22000
    assert all(not cut for cut in task.cut.values()) and len(task.answers) == 7
    for text, answer in shown(build(f"babi:path={path}", 80), "test")[::97]:
        *moves, question = text.rstrip(" ?").split(" . ")
        assert [move.split()[-1] for move in moves if move.split()[0] == question.split()[-1]][-1] == answer
    assert build(f"babi:path={path}:number=2", 64).cut["test"] > 500
