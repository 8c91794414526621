"""The tasks over real text: where it comes from, how it is split, and what is said when it cannot be had."""

import gzip
import json
import os
import pathlib
import sys
import sysconfig
import time
import zipfile

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from xformers_lab import spec
from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Setting, lm

DATA = ROOT.parent / "shared" / "data"
WORDS = ("ant", "bee", "cat")
ROWS = [{"text": f"{number} says {WORDS[number % 3]}, twice", "label": WORDS[number % 3]} for number in range(120)]


@pytest.fixture(autouse=True)
def _no_home(tmp_path, monkeypatch):
    """What `datasets` prepares goes to the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def build(text: str, length: int = 32, batch: int = 8, seed: int = 0):
    return spec.build("task", text, Setting(length, batch, seed))


def shared(name: str) -> pathlib.Path:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not here")
    return DATA / name


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """A table of the kind that the suffix names."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        quote = lambda value: '"' + str(value).replace('"', '""') + '"'
        lines = [separator.join(rows[0])] + [separator.join(map(quote, row.values())) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


def texts(task, split: str) -> set[bytes]:
    return set(task.corpus.splits[split][0])


# ---- lm ---------------------------------------------------------------------------------------------------------


def test_the_default_corpus_is_the_standard_librarys_source():
    lm.corpus.cache_clear()
    start = time.perf_counter()
    task = build("lm")
    assert time.perf_counter() - start < 3
    described = task.describe()
    assert described["documents"] > 100 and described["train_bytes"] > 10**6
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    holders = {}
    for name in ("ast.py", "argparse.py", "json/decoder.py", "test/test_ast.py", "idlelib/pyshell.py"):
        if (root / name).is_file():
            content = (root / name).read_bytes()
            holders[name] = [split for split in SPLITS if content in task.bytes[split].tobytes()]
    assert all(len(holders.pop(name)) == 1 for name in ("ast.py", "argparse.py", "json/decoder.py"))
    assert not any(holders.values()), "no tests, no applications"


def test_windows_come_from_their_own_split_and_targets_follow_inputs():
    task = build("lm", 50)
    for split in SPLITS:
        content = task.bytes[split].tobytes()
        batch = task.batch(split, 4)
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for ids, following in zip(batch.inputs, batch.targets, strict=True):
            assert bytes(ids.tolist()) + bytes([following[-1]]) in content


def test_bits_per_byte():
    task = build("lm")
    batch = task.batch("train", 0)
    for logits, bits in [
        (np.zeros((8, 32, 256)), 8.0),
        (60.0 * np.eye(256)[batch.targets], 0.0),
        (np.where(np.arange(256) < 128, 0.0, -np.inf) * np.ones((8, 32, 1)), 7.0),
    ]:
        if bits == 7.0 and batch.targets.max() > 127:
            continue
        total, weight = task.metric(jnp.asarray(logits), batch)
        assert task.finish(float(total) / float(weight)) == pytest.approx(bits, abs=1e-4)


def test_a_single_file_is_cut_by_position(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(256)) * 10)
    task = build(f"lm:path={path}", 16)
    assert [len(task.bytes[split]) for split in SPLITS] == [2304, 128, 128]
    assert b"".join(task.bytes[split].tobytes() for split in SPLITS) == path.read_bytes()


def test_a_folder_is_split_by_file_and_copies_count_once(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"<{number}>" + "x" * 20)
        (tmp_path / f"copy{number}.txt").write_text(f"<{number}>" + "x" * 20)
    (tmp_path / ".hidden").write_text("secret")
    task = build(f"lm:path={tmp_path}", 8)
    assert task.files == 60
    held = {split: task.bytes[split].tobytes() for split in SPLITS}
    for number in range(60):
        assert sum(b"<%d>" % number in content for content in held.values()) == 1
    assert not any(b"secret" in content for content in held.values())


@pytest.mark.parametrize("names", [("train.txt", "valid.txt", "test.txt"), ("train/a.raw", "val/a.raw", "test/b.raw")])
def test_a_folder_named_by_split_keeps_its_splits(tmp_path, names):
    texts = [b"a train line\n" * 9, b"a valid line\n" * 9, b"a test line\n" * 9]
    for name, text in zip((*names, "README.md", "train.copy"), (*texts, b"read me", texts[2]), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    task = build(f"lm:path={tmp_path}", 8)
    assert [task.bytes[split].tobytes() for split in SPLITS] == texts and task.files == 3
    (tmp_path / names[1]).unlink()
    task = build(f"lm:path={tmp_path}", 8)
    train, validation, test = (task.bytes[split].tobytes() for split in SPLITS)
    assert test == texts[2] and texts[0].endswith(validation) and len(validation) == 12
    assert texts[0].startswith(train[:-1]) and len(train) + len(validation) == len(texts[0]) + 1


def test_adding_a_file_moves_no_other_file(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"<{number}>" + "x" * 20)
    before = build(f"lm:path={tmp_path}", 8).bytes
    (tmp_path / "0000.txt").write_text("new" * 9)
    after = build(f"lm:path={tmp_path}", 8).bytes
    for split in SPLITS:
        assert set(before[split].tobytes().split()) <= set(after[split].tobytes().split())


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_a_table_is_split_by_document(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    task = build(f"lm:path={path}:column=text", 16)
    lines = [set(task.bytes[split].tobytes().decode().splitlines()) for split in SPLITS]
    assert set.union(*lines) == {row["text"] for row in ROWS} and sum(map(len, lines)) == len(ROWS)


def test_a_saved_data_set_keeps_its_splits(tmp_path):
    parts = {"train": ROWS[:80], "validation": ROWS[80:100], "test": ROWS[100:]}
    datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in parts.items()}).save_to_disk(
        str(tmp_path / "saved")
    )
    task = build(f"lm:path={tmp_path / 'saved'}", 16)
    for split in SPLITS:
        assert task.bytes[split].tobytes().decode().splitlines() == [row["text"] for row in parts[split]]


def test_real_books():
    task = build(f"lm:path={shared('tinyshakespeare/input.txt')}", 64)
    assert sum(map(len, task.bytes.values())) == 1_115_394
    assert b"ROMEO" in task.bytes["train"].tobytes()


# ---- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_documents_of_a_table(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    task = build(f"text:path={path}", 20)
    assert task.corpus.classes == WORDS and task.outputs == 3 and task.chance == pytest.approx(1 / 3)
    assert set.union(*(texts(task, split) for split in SPLITS)) == {row["text"].encode() for row in ROWS}
    assert sum(len(texts(task, split)) for split in SPLITS) == len(ROWS)
    batch = task.batch("train", 0)
    for ids, valid, label in zip(batch.inputs, batch.valid, batch.targets, strict=True):
        document = bytes((ids[valid] - 1).tolist())
        (whole,) = [row for row in ROWS if row["text"].encode()[:20] == document]
        assert whole["label"] == WORDS[label] and valid.sum() == min(20, len(whole["text"]))


def test_every_document_comes_once_a_pass(tmp_path):
    task = build(f"text:path={write(tmp_path / 'rows.csv', ROWS)}", 64, 7)
    count = len(texts(task, "train"))
    rows = np.concatenate([task.batch("train", step).inputs for step in range(2 * count // 7 + 1)])
    first, second = rows[:count], rows[count : 2 * count]
    assert len(np.unique(first, axis=0)) == len(np.unique(second, axis=0)) == count
    assert (first != second).any(), "passes differ in order"


def test_the_sources_test_data_stay_test_data(tmp_path):
    write(tmp_path / "train.csv", ROWS[:100] + ROWS[110:])
    write(tmp_path / "test.csv", ROWS[100:])
    task = build(f"text:path={tmp_path}")
    assert texts(task, "test") == {row["text"].encode() for row in ROWS[100:]}
    assert texts(task, "train") | texts(task, "validation") == {row["text"].encode() for row in ROWS[:100]}
    assert not texts(task, "train") & texts(task, "validation") and texts(task, "validation")
    assert task.describe()["copies_dropped"] == 10


def test_copies_of_a_document_stay_in_one_split(tmp_path):
    task = build(f"text:path={write(tmp_path / 'rows.jsonl', ROWS + ROWS + ROWS)}")
    assert sum(len(texts(task, split)) for split in SPLITS) == len(ROWS)
    assert sum(len(task.corpus.splits[split][1]) for split in SPLITS) == 3 * len(ROWS)


def test_a_folder_of_classes(tmp_path):
    for row in ROWS:
        (tmp_path / row["label"]).mkdir(exist_ok=True)
        (tmp_path / row["label"] / f"{row['text'][:3].strip()}.txt").write_text(row["text"])
    task = build(f"text:path={tmp_path}")
    assert task.corpus.classes == WORDS
    assert sum(len(texts(task, split)) for split in SPLITS) == len(ROWS)


def test_the_layout_of_imdbs_archive(tmp_path):
    for number in range(100):
        for part, label in [("train", "pos"), ("train", "neg"), ("train", "unsup"), ("test", "pos"), ("test", "neg")]:
            (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / part / label / f"{number}.txt").write_text(f"{part} {label} {number}")
    (tmp_path / "train" / "urls_pos.txt").write_text("http://")
    (tmp_path / "README").write_text("read me")
    task = build(f"text:path={tmp_path}")
    assert task.corpus.classes == ("neg", "pos")
    assert len(texts(task, "test")) == 200 and all(text.startswith(b"test") for text in texts(task, "test"))
    assert len(texts(task, "train")) + len(texts(task, "validation")) == 200
    assert texts(task, "validation")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 1], ("0", "1")),
        ([10, 9, -2], ("-2", "9", "10")),
        ([True, False], ("False", "True")),
        ([1.0, 2.0], ("1", "2")),
    ],
)
def test_kinds_of_labels(tmp_path, labels, classes):
    rows = [{"review": f"document {number}", "sentiment": labels[number % len(labels)]} for number in range(90)]
    assert build(f"text:path={write(tmp_path / 'rows.parquet', rows)}").corpus.classes == classes


def test_a_split_with_hidden_labels_counts_as_missing(tmp_path):
    rows = [{"sentence": f"document {number}", "label": number % 2} for number in range(100)]
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "test.csv", [{"sentence": f"secret {number}", "label": -1} for number in range(20)])
    task = build(f"text:path={tmp_path}")
    assert task.corpus.classes == ("0", "1") and not any(b"secret" in text for text in texts(task, "test"))


def test_a_csv_without_header(tmp_path):
    path = tmp_path / "rows.csv.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(f'{number % 4 + 1},"title","body {number}"\n' for number in range(80))
    task = build(f"text:path={path}:header=false:label_column=0:text_column=2")
    assert task.outputs == 4 and sum(len(texts(task, split)) for split in SPLITS) == 80


def test_real_reviews(tmp_path):
    with zipfile.ZipFile(shared("movie_reviews/movie_reviews.zip")) as archive:
        archive.extractall(tmp_path)
    task = build(f"text:path={tmp_path / 'movie_reviews'}:overlap=keep", 1024)
    sizes = [len(task.corpus.splits[split][1]) for split in SPLITS]
    assert task.corpus.classes == ("neg", "pos") and sum(sizes) == 2000
    assert abs(sizes[1] - 200) < 60 and abs(sizes[2] - 200) < 60


def test_real_sentences():
    task = build(f"text:path={shared('sst2/train.tsv')}:header=false:text_column=0:label_column=1", 300)
    assert task.outputs == 2 and sum(len(task.corpus.splits[split][1]) for split in SPLITS) == 6920


def test_without_the_datasets_library_files_work_and_the_hub_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "book.txt").write_text("plain text " * 200)
    assert build(f"lm:path={tmp_path / 'book.txt'}").batch("train", 0).inputs.shape == (8, 32)
    assert build(f"text:path={write(tmp_path / 'rows.csv', ROWS)}").outputs == 3
    for choice in ("text", "lm:hub=Salesforce/wikitext"):
        with pytest.raises(UsageError, match="pip install datasets"):
            build(choice)


# ---- bad input --------------------------------------------------------------------------------------------------

MALFORMED = {
    "empty.csv": (b"", "cannot be read"),
    "header_only.csv": (b"text,label\n", "cannot be read"),
    "unclosed.csv": (b'text,label\n"oh,1\n', "cannot be read"),
    "latin.csv": (b"text,label\n\xff\xfe,1\n", "cannot be read"),
    "junk.parquet": (b"junk", "cannot be read"),
    "junk.json": (b"{junk", "cannot be read"),
    "scalar.jsonl": (b"3\n", "cannot be read"),
    "no_label.csv": (b"text,label\n" + b"a,1\nb,0\n" * 20 + b"c,\n", "row 41 has no label"),
    "no_text.csv": (b"text,label\n" + b"a,1\nb,0\n" * 20 + b",1\n", 'column "text", row 41 is missing'),
    "lists.jsonl": (b'{"text": ["a"], "label": 1}\n', "is list, not text"),
    "nan.jsonl": (b'{"text": "a", "label": 1.0}\n{"text": "b", "label": NaN}\n', "row 2 has no label"),
    "halves.jsonl": (b'{"text": "a", "label": 1.5}\n{"text": "b", "label": 1.0}\n', "row 1 is 1.5"),
    "one_class.csv": (b"text,label\n" + b"a,1\nb,1\n" * 20, "1 class(es) in 40 documents"),
    "all_classes.csv": (b"text,label\na,1\nb,2\nc,3\n", "3 classes in 3 documents"),
    "few.csv": (b"text,label\na,1\nb,2\nc,1\nd,2\n", "give more documents"),
    "odd_columns.csv": (b"words,kind\na,1\n", "text_column=... (columns: words, kind)"),
    "notes.txt": (b"hello", 'unknown kind ".txt"'),
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_a_malformed_file_is_one_clear_message(tmp_path, name):
    content, says = MALFORMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        build(f"text:path={tmp_path / name}")
    assert says in str(caught.value) and "\n" not in str(caught.value) and "text" in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("text:path={}/rows.csv:text_column=txet", 'did you mean "text"'),
        ("text:path={}/rows.csv:label_column=lable", 'did you mean "label"'),
        ("text:path={}/rows.csv:label_column=text", "cannot be both text and label"),
        ("text:path=", "path= is empty"),
        ("lm:path=", "path= is empty"),
        ("lm:path=/dev/null", "neither a file nor a folder"),
        ("lm:path={}/" + "long" * 99, "cannot be opened"),
        ("text:path={}/row.csv", 'did you mean "rows.csv"'),
        ("text:path={}/rows.jsonl:header=false", "header=false is for csv"),
        ("text:path={}/mixed", "mixes csv and json"),
        ("text:path={}/separators", "mixes csv and tsv"),
        ("text:path={}/beside", "of no split beside files that are"),
        ("text:path={}/untrained", "no train data"),
        ("text:path={}/classes", "too many to learn"),
        ("text:path={}/nothing", "no sub-folder with documents"),
        ("text:path={}/classes:text_column=text", "is no table"),
        ("text:path={}/blank", "blank/a/1.txt is empty: every document needs text"),
        ("text:hub={}", "use path="),
        ("lm:path={}/rows.csv:column=txet", 'did you mean "text"'),
        ("lm:path={}/note.txt:column=text", "is no csv"),
        ("lm:path={}/nothing", "folder without files"),
        ("lm:path={}/note.txt", "seq_len=32 needs 33"),
        ("lm:path={}/rows.csv:colum=text", 'did you mean "column"'),
    ],
)
def test_wrong_places_are_one_clear_message(tmp_path, choice, says):
    write(tmp_path / "rows.csv", ROWS)
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "note.txt").write_text("a short note")
    for name in ("mixed", "beside", "untrained", "nothing", "classes/a", "classes/b", "blank/a", "separators"):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path / "mixed" / "train.csv", ROWS)
    write(tmp_path / "mixed" / "test.jsonl", ROWS)
    (tmp_path / "separators/train.csv").write_text("text,label\n")
    (tmp_path / "separators/test.tsv").write_text("text\tlabel\n")
    write(tmp_path / "beside" / "train.csv", ROWS)
    write(tmp_path / "beside" / "more.csv", ROWS)
    write(tmp_path / "untrained" / "validation.csv", ROWS)
    write(tmp_path / "untrained" / "test.csv", ROWS)
    (tmp_path / "classes/a/1.txt").write_text("one")
    (tmp_path / "classes/b/2.txt").write_text("two")
    (tmp_path / "blank/a/1.txt").write_text("")
    with pytest.raises(UsageError) as caught:
        build(choice.format(tmp_path))
    assert says in str(caught.value) and "\n" not in str(caught.value)
