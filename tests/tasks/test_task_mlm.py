"""Masked language modelling: what is hidden, of which documents, and by what."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import check_config, kind_of
from xformers_lab.tasks import SPLITS, Setting
from xformers_lab.tasks.mlm import MASK

WORDS = ("ant", "bee", "cat")
ROWS = [{"text": f"{number} says {WORDS[number % 3]}, twice" * 4, "label": WORDS[number % 3]} for number in range(300)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def build(text: str, length: int = 64, batch: int = 16, seed: int = 0):
    return spec.build("task", text, Setting(length, batch, seed))


def test_the_documents_are_those_of_text(table):
    """Batch by batch, so that a model goes on from what it was trained on to what it classifies."""
    hidden, labelled = build(f"mlm:path={table}"), build(f"text:path={table}")
    assert hidden.vocab == labelled.vocab and hidden.target == "token" and labelled.target == "sequence"
    for split in SPLITS:
        assert hidden.examples(split) == labelled.examples(split)
        for step in range(3):
            one, other = hidden.batch(split, step), labelled.batch(split, step)
            np.testing.assert_array_equal(one.targets, other.inputs)
            np.testing.assert_array_equal(one.valid, other.valid)
        numbers = np.arange(5)
        np.testing.assert_array_equal(hidden.take(split, numbers).targets, labelled.take(split, numbers).inputs)


def test_of_the_chosen_bytes_most_are_hidden(table):
    task = build(f"mlm:path={table}", batch=200)
    masked = replaced = kept = total = 0
    for step in range(30):
        batch = task.batch("train", step)
        chosen = batch.weights > 0
        np.testing.assert_array_equal(batch.inputs[~chosen], batch.targets[~chosen])
        assert not (chosen & ~batch.valid).any() and (batch.targets != MASK).all()
        lengths = batch.valid.sum(1)
        np.testing.assert_array_equal(chosen.sum(1), np.maximum(np.rint(0.15 * lengths), 1))
        was, became = batch.targets[chosen], batch.inputs[chosen]
        masked += (became == MASK).sum()
        replaced += ((became != MASK) & (became != was)).sum()
        kept += (became == was).sum()
        total += chosen.sum()
        assert became.min() >= 1
    # A replacement may be the byte itself, one time in 255.
    assert masked / total == pytest.approx(0.8, abs=0.01)
    assert replaced / total == pytest.approx(0.1, abs=0.01)
    assert kept / total == pytest.approx(0.1, abs=0.01)


def test_each_place_is_chosen_as_often(table):
    task = build(f"mlm:path={table}:rate=0.25", batch=100)
    often = sum(task.batch("train", step).weights.sum(0) for step in range(60)) / 6000
    np.testing.assert_allclose(often, 0.25, atol=0.03)


def test_an_evaluation_hides_the_same_whatever_batch_and_seed(table):
    first, other = build(f"mlm:path={table}"), build(f"mlm:path={table}", batch=3, seed=7)
    numbers = np.arange(12)
    whole = first.take("test", numbers)
    for group in np.split(numbers, 4):
        part = other.take("test", group[::-1])
        np.testing.assert_array_equal(part.inputs, whole.inputs[group[::-1]])
        np.testing.assert_array_equal(part.weights, whole.weights[group[::-1]])
    assert (first.batch("train", 0).inputs != first.batch("train", 1).inputs).any()
    assert (first.take("test", numbers).weights != first.take("validation", numbers).weights).any()


def test_windows_of_any_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{number:04d} " for number in range(400)))
    task, plain = build(f"mlm:of=lm:path={path}"), build(f"lm:path={path}")
    for split in SPLITS:
        batch = task.take(split, np.arange(task.examples(split)))
        seen = batch.targets[batch.valid] - 1
        np.testing.assert_array_equal(seen, plain.bytes[split][: len(seen)])
        assert len(seen) >= len(plain.bytes[split]) - 1
        assert (batch.inputs[~batch.valid] == 0).all() and not batch.weights[~batch.valid].any()
    assert task.decode(task.encode("0123 ä")) == "0123 ä"
    space = plain.bytes["test"].tobytes().count(b" ") / len(plain.bytes["test"])
    zero = plain.bytes["test"].tobytes().count(b"0") / len(plain.bytes["test"])
    assert task.chance in (pytest.approx(space), pytest.approx(zero))


def test_an_encoder_learns_it(table):
    config = edit(Config(), task=f"mlm:path={table}", seq_len=64, dim=16, heads=2, layers=1, batch=4)
    assert kind_of(config, check_config(config)) == "encoder"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("rate=0", "above 0 and at most 1"),
        ("rate=1.5", "above 0 and at most 1"),
        ("of=lm:label_column=label", "use of=text"),
        ("of=texts", 'did you mean "text"'),
    ],
)
def test_options_that_cannot_be_are_one_clear_message(table, options, says):
    with pytest.raises(UsageError) as caught:
        build(f"mlm:path={table}:{options}")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_text_with_the_byte_of_the_mask_is_refused(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"abc \xff" * 2000)
    with pytest.raises(UsageError, match="the byte 0xff, which stands for the mask"):
        build(f"mlm:of=lm:path={tmp_path / 'book.txt'}")


def test_real_reviews(shared):
    path = shared / "data" / "sst2" / "train.tsv"
    if not path.is_file():
        pytest.skip("no sst2 here")
    task = build(f"mlm:path={path}:header=false:text_column=0:label_column=1")
    assert 0.1 < task.chance < 0.25 and task.decode([task.likeliest]) == " "
    batch = task.take("test", np.arange(8))
    assert (batch.inputs == MASK).any() and batch.weights.sum() >= 8
