"""Examples that a model answers wrong: which they are, and how they read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_train import tiny

from xformers_lab.config import edit
from xformers_lab.model import build_task
from xformers_lab.tasks import Batch, Setting, Task
from xformers_lab.train import loop, trained
from xformers_lab.train.wrong import GAP, LONGEST, MOST, Wrong, cut


class Digits(Task):
    vocab, outputs, chance = 10, 10, 0.1


class Classes(Digits):
    target = "sequence"

    def answer_name(self, answer: int) -> str:
        return f"class {'ab'[answer]}"


def test_scored_positions_alone_count_and_are_shown():
    wrong, targets = Wrong(Digits(Setting(4, 2))), np.array([[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]])
    weights = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], np.float32)
    said = np.array([[9, 2, 3, 9], [5, 6, 0, 8], [9, 9, 9, 9]])
    wrong(Batch(targets + 1, targets, weights, np.array([[True] * 3 + [False]] * 3)), said)
    assert wrong.rows == [{"input": "6 7 8", "answer": "6 7", "said": "6 0"}]


def test_classes_are_named_and_the_first_ones_kept():
    wrong = Wrong(Classes(Setting(2, 8)))
    inputs, targets = np.arange(16).reshape(8, 2) % 10, np.zeros(8, int)
    said = np.array([0, 1, 0, 1, 1, 1, 1, 1])
    for _ in range(2):
        assert wrong.wants()
        wrong(Batch(inputs, targets, np.ones(8, np.float32)), said)
    assert not wrong.wants() and len(wrong.rows) == MOST
    first = [" ".join(map(str, inputs[at])) for at in (1, 3, 4, 5, 6, 7)]
    assert [row["input"] for row in wrong.rows] == [*first, *first[:2]]
    assert wrong.rows[0]["answer"] == "class a" and wrong.rows[0]["said"] == "class b"


def test_long_texts_lose_their_middle():
    text = "".join(map(str, range(300)))
    assert len(cut(text)) == LONGEST and cut(text).split(GAP)[0] == text[: len(cut(text).split(GAP)[0])]
    assert text.endswith(cut(text).split(GAP)[1]) and cut("short") == "short" and cut("x" * LONGEST) == "x" * LONGEST


def test_a_task_that_cannot_show_an_answer_costs_no_run(caplog):
    class Mute(Digits):
        def decode(self, tokens):
            raise KeyError("no such token")

    wrong = Wrong(Mute(Setting(2, 1)))
    wrong(Batch(np.zeros((1, 2), int), np.zeros((1, 2), int), np.ones((1, 2))), np.ones((1, 2), int))
    assert wrong.rows == [] and not wrong.wants() and "wrong answers are not shown" in caplog.text


@pytest.mark.full
@pytest.mark.parametrize("task", ["copy", "listops"])
def test_a_run_keeps_them(task, tmp_path):
    """They are what the model itself says, in the order of the evaluation."""
    config = tiny(task, tmp_path, steps=2, eval_batches=2, batch=12)
    record = loop.run(config)
    assert json.loads(json.dumps(record["wrong"])) == record["wrong"] and 0 < len(record["wrong"]) <= MOST
    _, own, model = trained.load(record["run_dir"])
    batch = build_task(edit(config, batch=32)).batch("test", 0)
    valid = None if batch.valid is None else jnp.asarray(batch.valid)
    logits = model(jnp.asarray(batch.inputs), valid=valid)[0]
    expected = Wrong(own)
    expected(batch, np.asarray(logits).argmax(-1))
    assert record["wrong"] == expected.rows
    assert all(row["answer"] != row["said"] for row in record["wrong"])


def test_tasks_with_another_metric_have_none(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{number} bottles of beer on the wall.\n" for number in range(300)))
    assert "wrong" not in loop.run(tiny(f"lm:path={book}", tmp_path, steps=1, eval_batches=1))
