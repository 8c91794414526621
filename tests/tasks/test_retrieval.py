"""Two documents in one sequence: pairs as a table has them, or built of labelled documents."""

import json

import numpy as np
import pytest
from test_tasks import build, digest, task_documents

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS
from xformers_lab.tasks.retrieval import SEPARATOR, _partners


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    """A number and the same with a mark, together where it is odd; train and test share a pair."""
    for split, numbers in (("train", range(0, 40)), ("valid", range(100, 120)), ("test", [0, *range(200, 220)])):
        rows = [{"label": number % 2, "text1": f"{number}", "text2": f"{number}!"}
                for number in numbers]  # fmt: skip
        write(tmp_path / f"{split}.jsonl", rows)
    return tmp_path


@pytest.fixture
def documents(tmp_path):
    rows = [{"text": f"{number} {'xyz'[number % 3]}", "label": "abc"[number % 3]} for number in range(200)]
    return write(tmp_path / "documents.jsonl", rows)


def test_a_sequence_is_two_documents_with_a_separator(pairs):
    task = build(f"retrieval:path={pairs}", 16)
    batch = task.take("validation", np.arange(20))
    for number, (row, valid, answer) in enumerate(zip(batch.inputs, batch.valid, batch.targets, strict=True), 100):
        assert (row == SEPARATOR).sum() == 1 and valid.sum() == (row > 0).sum()
        assert task_documents(row) == (b"%d" % number, b"%d!" % number)
        assert answer == number % 2
    shown = task.show(task.take("validation", np.array([3])))
    assert shown == {"first": "103", "second": "103!", "answer": "together"}


def test_documents_are_cut_to_half(tmp_path):
    rows = [{"label": number % 2, "text1": f"{number}" + "a" * 90, "text2": "b" * 90} for number in range(300)]
    batch = build(f"retrieval:path={write(tmp_path / 'x.jsonl', rows)}:overlap=keep", 32).batch("test", 0)
    assert [list(map(len, task_documents(row))) for row in batch.inputs] == [[15, 15]] * len(batch.inputs)


def test_a_training_pair_with_a_document_that_is_held_out_is_dropped(pairs):
    task = build(f"retrieval:path={pairs}", 16)
    assert (task.examples("train"), task.examples("validation"), task.examples("test")) == (39, 20, 21)
    seen = {split: set(task.documents[split]) for split in SPLITS}
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    assert "1 copy of held-out data dropped" in task.reading()[0]
    assert build(f"retrieval:path={pairs}:overlap=keep", 16).examples("train") == 40
    with pytest.raises(UsageError, match="1 of train stand in a held-out split"):
        build(f"retrieval:path={pairs}:overlap=refuse", 16)


def test_pairs_of_one_table_share_no_document_between_splits(tmp_path):
    rows = [{"label": n % 2, "text1": f"a{n % 80}", "text2": f"b{n % 70}"} for n in range(400)]
    task = build(f"retrieval:path={write(tmp_path / 'pairs.jsonl', rows)}", 16)
    seen = {split: set(task.documents[split]) for split in SPLITS}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"] and task.dropped > 0


def test_the_table_of_long_range_arena_has_no_header(tmp_path):
    """label, two numbers, two texts: its new_aan_pairs files."""
    lines = [f"{n % 2}.0\tP{n}\tQ{n}\tfirst {n}\tsecond {n}" for n in range(300)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    choice = f"retrieval:path={tmp_path}/pairs.tsv:header=false:label_column=0:first_column=3:second_column=4"
    task = build(choice, 40)
    assert task.show(task.take("test", np.array([0])))["first"].startswith("first ")


def test_built_pairs_are_of_their_split_and_balanced(documents):
    task = build(f"retrieval:path={documents}", 32, batch=64)
    of = {f"{number} {'xyz'[number % 3]}".encode(): number % 3 for number in range(200)}
    seen = {}
    for split in SPLITS:
        batches = [task.batch(split, step) for step in range(10)] + [task.take(split, np.arange(task.examples(split)))]
        for batch in batches:
            for row, answer in zip(batch.inputs, batch.targets, strict=True):
                first, second = task_documents(row)
                assert first != second and answer == (of[first] == of[second])
                seen.setdefault(split, set()).update((first, second))
        assert abs(np.concatenate([batch.targets for batch in batches[:10]]).mean() - 0.5) < 0.1
        assert abs(batches[-1].targets.sum() - task.examples(split) / 2) <= 0.5
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    assert sum(map(len, seen.values())) == 200


def test_held_out_pairs_do_not_follow_the_seed(documents):
    one, other = (build(f"retrieval:path={documents}", 32, seed=seed) for seed in (0, 1))
    numbers = np.arange(one.examples("test"))
    assert digest(one.take("test", numbers)) == digest(other.take("test", numbers))
    assert digest(one.batch("train", 0)) != digest(other.batch("train", 0))


def test_partners_are_uniform():
    rng = np.random.default_rng(0)
    classes = np.array([0, 1, 0, 2, 1, 2, 0])
    drawn = _partners(rng, classes, np.full(6000, 2), np.arange(6000) % 2)
    together, apart = drawn[drawn[:, 2] == 1, 1], drawn[drawn[:, 2] == 0, 1]
    assert np.bincount(together, minlength=7)[[0, 6]].min() > 1350 and set(together) == {0, 6}
    assert np.bincount(apart, minlength=7)[[1, 3, 4, 5]].min() > 650 and set(apart) == {1, 3, 4, 5}


def test_copies_and_documents_alone_are_left_out_aloud(tmp_path):
    rows = [{"text": f"{number // 2}", "label": "ab"[number // 2 % 2]} for number in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "test.jsonl", [{"text": f"t{n}", "label": "ab"[n > 4]} for n in range(9)])
    task = build(f"retrieval:path={tmp_path}", 16)
    assert any("documents left out: copies within the split" in line for line in task.reading())
    write(tmp_path / "test.jsonl", [{"text": f"t{n}", "label": "ab"[n > 7]} for n in range(9)])
    with pytest.raises(UsageError, match="fewer than two classes"):
        build(f"retrieval:path={tmp_path}", 16)


@pytest.mark.parametrize("name, line", [("pairs.csv", 302), ("pairs.jsonl", 301), ("pairs.parquet", None)])
def test_a_label_that_is_none_is_refused_with_its_line(tmp_path, name, line):
    rows = [{"label": str(n % 2), "text1": f"a{n}", "text2": f"b{n}"} for n in range(300)]
    rows.append({"label": "perhaps", "text1": "a", "text2": "b"})
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("label,text1,text2\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    elif name.endswith("jsonl"):
        write(path, rows)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UsageError) as caught:
        build(f"retrieval:path={path}", 16)
    where = f"{path}, line {line}" if line else str(path)
    assert f"retrieval: {where}: " in str(caught.value) and "is 'perhaps'" in str(caught.value)


def test_columns_of_the_other_kind_are_refused(documents, pairs):
    with pytest.raises(UsageError, match="of a table of pairs, and this is none"):
        build(f"retrieval:path={documents}:first_column=text", 16)
    with pytest.raises(UsageError, match="of labelled documents, and these are pairs"):
        build(f"retrieval:path={pairs}:text_column=text1", 16)


def test_real_reviews_in_long_range_arenas_sizes(shared):
    path = shared / "data" / "sst2"
    task = build(f"retrieval:path={path}:header=false:text_column=0:label_column=1:preset=lra", 8192, 4)
    assert task.examples("test") == 1821 and task.batch("train", 0).inputs.shape == (4, 8192)
