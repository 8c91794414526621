"""Rows of whole documents: what stands where, that every token is predicted once, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as draw

from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_task
from xformers_lab.tasks import SPLITS, Setting, _packing
from xformers_lab.tasks.lm import Lm, _cut
from xformers_lab.train import prefetch

T = 16


@settings(max_examples=40, deadline=None)
@given(draw.lists(draw.integers(0, 60), max_size=40), draw.integers(1, 20))
def test_every_token_but_the_first_of_a_document_is_predicted_once(lengths, length):
    lengths = np.array(lengths, np.int64)
    rows = _packing.pack(lengths, length)
    places, documents = rows.take(np.arange(rows.count))
    start = np.cumsum(lengths) - lengths
    wanted = [at for begin, many in zip(start, lengths, strict=True) for at in range(begin, begin + many - 1)]
    held = places >= 0
    assert sorted(places[held].tolist()) == wanted and (rows.targets == np.array(wanted, int) + 1).all()
    assert rows.padding == round(1 - held.mean(), 4) if rows.count else rows.padding == 1
    for row, numbers in zip(places, documents, strict=True):
        # One document follows another, none stands in two places of a row, and padding comes last.
        assert (np.diff(numbers) >= 0).all() and numbers[0] == 0
        for number in range(numbers[-1] + 1):
            own = row[numbers == number]
            assert (own < 0).all() or (np.diff(own) == 1).all()
    # A document is cut only where it is longer than a row, and rows are not wasted.
    cuts = np.maximum(-(-np.maximum(lengths - 1, 0) // length), 0).sum()
    assert sum(len(np.unique(numbers[row >= 0])) for row, numbers in zip(places, documents, strict=True)) == cuts
    half = (places >= 0).sum(1) * 2 <= length
    assert half.sum() <= 1


@pytest.fixture
def table(tmp_path):
    """Documents of every length, short ones and long ones."""
    texts = [chr(97 + number % 26) * (1 + number * 7 % 50) + f" {number}" for number in range(200)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def rebuilt(task: Lm, split) -> list[str]:
    """Pieces of documents as rows hold them, each with its last target."""
    batch = task.take(split, np.arange(task.examples(split)))
    found = []
    assert batch.documents is not None and batch.valid is not None
    for row in range(len(batch.inputs)):
        for number in range(batch.documents[row].max() + 1):
            own = (batch.documents[row] == number) & batch.valid[row]
            if own.any():
                tokens = batch.inputs[row][own].tolist()
                targets = batch.targets[row][own].tolist()
                assert tokens[1:] == targets[:-1]
                found.append(task.decode([*tokens, targets[-1]]))
    return found


def test_rows_hold_the_documents_of_their_split(table):
    path, texts = table
    task = Lm(Setting(T, 3), path=str(path), packed=True)
    whole = [text for split in SPLITS for text in rebuilt(task, split) if text.endswith("\n") and len(text) <= T + 1]
    assert sorted(text for text in whole if text[:-1] in texts) == sorted(f"{t}\n" for t in texts if len(t) <= T)
    batch = task.batch("train", 5)
    for field in ("inputs", "targets", "weights", "valid", "documents"):
        assert np.array_equal(getattr(batch, field), getattr(task.batch("train", 5), field))
    assert np.asarray(batch.documents).dtype == np.int32
    assert np.asarray(task.take("test", np.arange(task.examples("test"))).documents).max() > 0
    prefetch.check(task, batch, "train batch 5")
    # One pass takes every row once, in an order that the seed decides.
    count = task.examples("train")
    rows = np.concatenate([task.batch("train", step).inputs for step in range(-(-count // 3))])[:count]
    every = task.take("train", np.arange(count)).inputs
    assert sorted(map(tuple, rows)) == sorted(map(tuple, every))
    other = Lm(Setting(T, 3, seed=1), path=str(path), packed=True)
    assert not np.array_equal(other.batch("train", 0).inputs, task.batch("train", 0).inputs)


def test_the_data_say_how_much_is_padding(table):
    task = Lm(Setting(T, 3), path=str(table[0]), packed=True)
    batch = task.take("train", np.arange(task.examples("train")))
    share = 1 - np.asarray(batch.weights).mean()
    assert task.describe()["packed"]["train"] == {"rows": len(batch.inputs), "padding": round(float(share), 4)}
    assert any(line.startswith(f"train: packed into {len(batch.inputs)} rows of {T}, ") for line in task.reading())
    assert "packed" not in Lm(Setting(T, 3), path=str(table[0])).describe()
    assert not task.segments


def test_subwords_are_packed_too_and_score_the_bytes_they_stand_for(table):
    pytest.importorskip("tokenizers")
    task = Lm(Setting(T, 3), path=str(table[0]), tokens="bpe", vocab=270, packed=True)
    assert "".join(rebuilt(task, "test")) and task.chance < 8.1
    batch = task.take("test", np.arange(task.examples("test")))
    logits = jnp.zeros((*batch.inputs.shape, task.vocab))
    nats, stood = task.metric(logits, batch)
    assert task.finish(float(nats) / float(stood)) == pytest.approx(task.chance, rel=1e-5)


def test_files_of_a_folder_stay_documents_where_lines_are_dropped_and_a_split_is_missing(tmp_path):
    shared = "this line is held out too, and long enough to count"
    for split, count in (("train", 10), ("test", 2)):
        (tmp_path / split).mkdir()
        for number in range(count):
            more = f"{shared}\n" if number == 1 else ""
            (tmp_path / split / f"{number}.txt").write_text(f"{split} {number}\n{more}")
    task = Lm(Setting(T, 2), path=str(tmp_path), packed=True)
    held = [*rebuilt(task, "train"), *rebuilt(task, "validation")]
    assert set(held) == {f"train {number}\n" for number in range(10)}


@pytest.mark.parametrize("end, first, second", [
    (0, [], [b"ab", b"cde"]), (1, [b"a"], [b"b", b"cde"]), (2, [b"ab"], [b"cde"]), (4, [b"ab", b"cd"], [b"e"]),
    (5, [b"ab", b"cde"], []),
])  # fmt: skip
def test_a_cut_parts_documents_by_bytes(end, first, second):
    assert _cut([b"ab", b"cde"], end) == (first, second)


@pytest.mark.parametrize("words, says", [
    ("", "is one text: use a table or a folder of files, or packed=false"),
    (":stride=4", "stride=4 is of windows, and packed=true has none"),
])  # fmt: skip
def test_what_cannot_be_packed_is_one_clear_message(tmp_path, words, says):
    path = tmp_path / "book.txt"
    path.write_text("one text alone\n" * 50)
    with pytest.raises(UsageError, match=says):
        build_task(edit(Config(), task=f"lm:path={path}:packed=true{words}", seq_len=T))


def test_a_split_without_a_prediction_is_refused(tmp_path):
    for split, text in (("train", "long enough"), ("valid", ""), ("test", "well")):
        (tmp_path / split).mkdir()
        for number in range(2):
            (tmp_path / split / f"{number}.txt").write_text(text and f"{text} {number}")
    with pytest.raises(UsageError, match=r"the validation split of .* has no document of 2 bytes or more"):
        build_task(edit(Config(), task=f"lm:path={tmp_path}:packed=true", seq_len=T))
