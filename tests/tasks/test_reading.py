"""What is read from files that people have: which split, which rows, which strings, and what is said of the rest."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Mapping

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from xformers_lab import spec
from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Setting
from xformers_lab.tasks._reading import compressed, names
from xformers_lab.train import jobs


def build(text: str, length: int = 32, batch: int = 4):
    return spec.build("task", text, Setting(length, batch))


def refused(text: str, length: int = 32) -> str:
    with pytest.raises(UsageError) as caught:
        build(text, length)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and "Traceback" not in message
    return message


def documents(task) -> dict[str, list[str]]:
    return {split: [text.decode() for text in task.corpus.splits[split][0]] for split in SPLITS}


def everything(task) -> list[str]:
    return [text for of_split in documents(task).values() for text in of_split]


def said(task) -> str:
    return "\n".join(task.reading())


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
TEXT = b"".join(b"line %d of a text\n" % number for number in range(200))
ROWS = [(f"document {number}", "pos" if number % 2 else "neg") for number in range(200)]


def table(rows, separator=",", header=("text", "label")) -> str:
    return "".join(separator.join(row) + "\n" for row in ([header] if header else []) + list(rows))


def put(folder, contents: Mapping[str, str | bytes]):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---- 1: compressed files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("named", [True, False], ids=["named so", "named otherwise"])
def test_compressed_text_is_read_as_text(tmp_path, suffix, named):
    plain, packed = tmp_path / "plain.txt", tmp_path / f"packed.txt{suffix if named else ''}"
    plain.write_bytes(TEXT)
    packed.write_bytes(PACKERS[suffix](TEXT))
    for split in SPLITS:
        np.testing.assert_array_equal(*(build(f"lm:path={path}").bytes[split] for path in (plain, packed)))


@pytest.mark.parametrize("suffix", PACKERS)
def test_folders_of_compressed_text(tmp_path, suffix):
    """Folders by split, class folders, tables, pairs of sentences; several members of one file are all read."""
    pack = PACKERS[suffix]
    parts = [b"a train line\n" * 9, b"a valid line\n" * 9, b"a test line\n" * 9]
    put(tmp_path / "lm", {f"{name}.txt{suffix}": pack(part) for name, part in zip(SPLITS, parts, strict=True)})
    task = build(f"lm:path={tmp_path / 'lm'}", 8)
    assert [task.bytes[split].tobytes() for split in SPLITS] == parts
    put(tmp_path / "text", {f"{label}/{text}.txt{suffix}": pack(text.encode()) for text, label in ROWS})
    assert sorted(everything(build(f"text:path={tmp_path / 'text'}"))) == sorted(text for text, _ in ROWS)
    path = put(tmp_path, {f"rows.csv{suffix}": pack(table(ROWS).encode())}) / f"rows.csv{suffix}"
    assert sorted(everything(build(f"text:path={path}"))) == sorted(text for text, _ in ROWS)
    if suffix != ".zst":
        path.write_bytes(pack(table(ROWS[:100]).encode()) + pack(table(ROWS[100:], header=None).encode()))
        assert len(everything(build(f"text:path={path}"))) == 200
    sides = {f"{split}.{language}{suffix}": pack(b"%s %s\n" % (split.encode(), language.encode()) * 2)
             for split in SPLITS for language in ("de", "en")}  # fmt: skip
    put(tmp_path / "pairs", sides)
    assert build(f"translate:path={tmp_path / 'pairs'}").corpus.splits["test"] == [(b"test de", b"test en")] * 2


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_bomb_is_refused_and_does_not_fill_memory(tmp_path, monkeypatch, suffix):
    (tmp_path / f"bomb{suffix}").write_bytes(PACKERS[suffix](bytes(8 * 2**20)))
    monkeypatch.setattr(compressed, "LIMIT", 3 * 2**20)
    assert "expands to more than 3,145,728 bytes" in refused(f"lm:path={tmp_path / f'bomb{suffix}'}")
    assert len(compressed.content("lm", tmp_path / f"bomb{suffix}", 2**23)) == 2**23


def test_what_is_no_text_is_refused_by_its_content(tmp_path):
    archive, tar = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    with tarfile.open(fileobj=tar, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    for content, message in {
        archive.getvalue(): "a zip archive",
        tar.getvalue(): "a tar archive",
        gzip.compress(tar.getvalue()): "a tar archive",
        gzip.compress(gzip.compress(TEXT)): "compressed twice",
        gzip.compress(TEXT)[:-9]: "cannot read",
        gzip.compress(TEXT) + b"rest": "cannot read",
        bz2.compress(TEXT)[:-9]: "cannot read",
        lzma.compress(TEXT)[:-9]: "cannot read",
        lzma.compress(TEXT, lzma.FORMAT_ALONE): "compressed by lzma",
        zstd(TEXT)[:-9]: "cannot read",
        b"7z\xbc\xaf\x27\x1c" + bytes(90): "a 7z archive",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "git lfs pull",
        TEXT.decode().encode("utf-16"): "UTF-16",
    }.items():
        for name in ("c.txt", "c.txt.gz"):
            assert message in refused(f"lm:path={put(tmp_path, {name: content}) / name}")
    assert "a zip archive" in refused(f"lm:path={put(tmp_path / 'f', {'a.txt': TEXT, 'b.zip': archive.getvalue()})}")


# ---- 2: named splits ---------------------------------------------------------------------------------------------

PARTS = {"train": b"a train line\n" * 9, "validation": b"a valid line\n" * 9, "test": b"a test line\n" * 9}
FILES = {"train.txt": PARTS["train"], "valid.txt": PARTS["validation"], "test.txt": PARTS["test"]}


@pytest.mark.parametrize("extra", [
    {"notes.txt": "of my own"},
    {"prepare.py": "print()", "get.sh": "curl"},
    {"all.zip": b"PK\x03\x04" + bytes(40)},
    {"train.txt.raw": "rawer", "valid.txt.raw": "raw", "test.txt.raw": "raw"},
    {"vocab.json": "{}", "merges.txt": "a b"},
    {"README.md": "read me", "LICENSE": "free", "SOURCE.md": "there"},
    {"old/train_old.txt": "old"},
    {"unsupervised.txt": "more"},
    {"train_notes.txt": "notes", "test_notes.txt": "notes"},
    {"test_hard.txt": "hard"},
    {"data.tar.gz": gzip.compress(b"a" * 257 + b"ustar" + bytes(300), mtime=0)},
    {"backup/train.txt": "old", "backup/test.txt": "old"},
    {"stats.csv": "a,b\n1,2\n"},
], ids=str)  # fmt: skip
def test_named_splits_win_over_other_files(tmp_path, extra):
    task = build(f"lm:path={put(tmp_path, {**FILES, **extra})}", 8)
    assert {split: task.bytes[split].tobytes() for split in SPLITS} == PARTS
    assert all(name.partition(".")[0] in said(task) for name in extra)
    assert "ignored" in said(task) and task.describe()["reading"]["notes"]


@pytest.mark.parametrize("layout", [
    {"wiki.train.tokens": "train", "wiki.valid.tokens": "validation", "wiki.test.tokens": "test", "notes.txt": ""},
    {"train/a/1": "train", "valid/a/1": "validation", "test/b/2": "test", "extra/b": ""},
    {"corpus-train/1.txt": "train", "corpus-dev/1.txt": "validation", "corpus-test/2.txt": "test", "run.sh": ""},
    {"my_train.txt": "train", "my_dev.txt": "validation", "my_test.txt": "test", "other.txt": ""},
    {"train": "train", "valid": "validation", "test": "test", "notes": "", "notes.txt": ""},
    {"train/1.txt": "train", "valid.txt": "validation", "test.txt": "test", "notes.txt": ""},
    {"Train.txt": "train", "VALID.TXT": "validation", "testSet.txt": "test"},
], ids=str)  # fmt: skip
def test_names_of_splits(tmp_path, layout):
    put(tmp_path, {name: PARTS.get(split, b"else") for name, split in layout.items()})
    task = build(f"lm:path={tmp_path}", 8)
    assert {split: task.bytes[split].tobytes() for split in SPLITS} == PARTS


@pytest.mark.parametrize("layout", [
    {"train1.txt": "train", "train2.txt": "train", "valid.txt": "validation", "test.txt": "test"},
    {"train.txt": "train", "valid.txt": "validation", "test_in.txt": "test", "test_out.txt": "test", "notes.txt": ""},
    {"train.de": "train", "train.en": "train", "valid.de": "validation", "test.en": "test"},
    {"train.de": "train", "train.de.bpe": "", "test.de": "test", "test_1.de": "test"},
    {"a_train.txt": "train", "b_train.txt": "train", "a_dev.txt": "validation", "a_test.txt": "test"},
], ids=str)  # fmt: skip
def test_files_of_one_split_are_read_together_and_it_says_so(tmp_path, layout):
    put(tmp_path, {name: f"{name} of {split}\n" * 9 for name, split in layout.items()})
    task = build(f"lm:path={tmp_path}:overlap=keep", 8)
    for name, split in layout.items():
        assert (f"{name} of" in task.bytes[split or "train"].tobytes().decode()) == bool(split)
    assert "2 files together" in said(task) and ("ignored" in said(task)) == ("" in layout.values())


def test_a_folder_of_code_is_no_data_set_of_named_splits(tmp_path):
    put(tmp_path, {f"{name}.py": f"code of {name}\n" * 9 for name in ("train", "test", *map(str, range(60)))})
    task = build(f"lm:path={tmp_path}", 8)
    assert task.files == 62 and "ignored" not in said(task)


def test_of_many_files_one_may_be_called_test(tmp_path):
    put(tmp_path, {f"{name}.txt": f"text of {name}\n" * 9 for name in ("test", *map(str, range(60)))})
    assert build(f"lm:path={tmp_path}", 8).files == 61


def test_two_forms_of_the_train_data_are_refused(tmp_path):
    put(tmp_path, {f"wiki.{name}.{form}": name * 9 for name in ("train", "test") for form in ("raw", "tokens")})
    assert "keep one form" in refused(f"lm:path={tmp_path}", 8)


@pytest.mark.parametrize("task, names", [
    ("lm", ["valid.txt", "test.txt"]),
    ("lm", ["valid.txt", "test.txt", "notes.txt"]),
    ("lm", ["dev/a", "test/b"]),
    ("lm", ["test.txt", "corpus.txt"]),
    ("lm", ["test/1.txt", "corpus.txt"]),
    ("text", ["valid.csv", "test.csv"]),
    ("text", ["dev/pos/1", "dev/neg/1", "test/pos/1", "test/neg/2"]),
    ("translate", ["valid.de", "valid.en", "test.de", "test.en"]),
], ids=str)  # fmt: skip
def test_without_train_data_it_says_so(tmp_path, task, names):
    put(tmp_path, {name: table(ROWS) if name.endswith(".csv") else name * 9 for name in names})
    assert "no train data" in refused(f"{task}:path={tmp_path}", 8)


# ---- 3: layouts --------------------------------------------------------------------------------------------------


def texts_of(split: str) -> list[tuple[str, str]]:
    return [(f"{split} {number}", "pos" if number % 2 else "neg") for number in range(60)]


@pytest.mark.parametrize("pattern", ["news-{}/{}/{}", "{}/{}/{}", "{}_data/{}/{}.txt", "bydate-{}/{}/sub/{}"])
def test_folders_of_splits_of_folders_of_classes(tmp_path, pattern):
    for split in ("train", "test"):
        put(tmp_path, {pattern.format(split, label, n): text for n, (text, label) in enumerate(texts_of(split))})
    put(tmp_path, {"README": "read me", "scripts/a.py": "print()"})
    task = build(f"text:path={tmp_path}")
    assert task.corpus.classes == ("neg", "pos")
    assert sorted(documents(task)["test"]) == sorted(text for text, _ in texts_of("test"))
    assert all(text.startswith("train") for split in ("train", "validation") for text in documents(task)[split])
    assert "README" in said(task) and "scripts" in said(task)


def test_class_folders_that_are_called_like_splits(tmp_path):
    put(tmp_path, {f"{label}/{n}.txt": f"{label} {n}" for label in ("train", "car", "plane") for n in range(40)})
    assert build(f"text:path={tmp_path}").corpus.classes == ("car", "plane", "train")
    inner = {f"{split}/{label}/{n}.txt": f"{split} {label} {n}" for split in ("train", "test")
             for label in ("train", "test", "car") for n in range(40)}  # fmt: skip
    task = build(f"text:path={put(tmp_path / 'deep', inner)}")
    assert task.corpus.classes == ("car", "test", "train") and len(documents(task)["test"]) == 120


@pytest.mark.parametrize("beside", ["test/{}.txt", "images/{}.txt", "train/{}.txt"])
def test_what_has_no_class_folders_beside_train_data_that_have_is_ignored(tmp_path, beside):
    put(tmp_path, {f"train/{label}/{n}": text for n, (text, label) in enumerate(ROWS)})
    put(tmp_path, {beside.format(n): f"unlabelled {n}" for n in range(9)})
    task = build(f"text:path={tmp_path}")
    assert task.corpus.classes == ("neg", "pos") and len(everything(task)) == 200 and "ignored" in said(task)


@pytest.mark.parametrize("names, counts", [
    ({"reviews_train.csv": "train", "reviews_test.csv": "test"}, (60, 60)),
    ({"in_domain_train.csv": "train", "in_domain_dev.csv": "validation", "out_of_domain_dev.csv": "validation"},
     (60, None)),
    ({"train.csv": "train", "test_in.csv": "test", "test_out.csv": "test"}, (60, 120)),
    ({"data/train-00000-of-00002.csv": "train", "data/train-00001-of-00002.csv": "train", "data/test-0.csv": "test"},
     (120, 60)),
    ({"train.csv": "train", "test.csv": "test", "classes.txt": "neg\npos", "readme.txt": "!", "vocab.json": '{"a": 1}'},
     (60, 60)),
    ({"train.csv": "train", "test.csv": "test", "sample_submission.csv": "id,label\n1,2\n", "get.py": "print()"},
     (60, 60)),
], ids=str)  # fmt: skip
def test_tables_named_by_split(tmp_path, names, counts):
    for name, split in names.items():
        rows = [(f"{name} {text}", label) for text, label in texts_of(split)]
        put(tmp_path, {name: table(rows) if split in SPLITS else split})
    task = build(f"text:path={tmp_path}", 64)
    sizes = {split: len(texts) for split, texts in documents(task).items()}
    assert (
        sizes["train"] + (0 if "validation" in names.values() else sizes["validation"]) == counts[0]
        or counts[1] is None
    )
    if counts[1] is not None:
        assert sizes["test"] == counts[1]
    else:
        assert sizes["validation"] == 120
    pooled = [split for split in SPLITS if list(names.values()).count(split) > 1]
    assert all(f"{split}: " in said(task) and "2 files together" in said(task) for split in pooled)
    assert all(name in said(task) for name, split in names.items() if split not in SPLITS)


def test_a_table_beside_what_speaks_of_it(tmp_path):
    put(tmp_path, {"rows.csv": table(ROWS), "classes.txt": "neg\npos\n", "readme.txt": "read me"})
    for task in ("text", "lm"):
        built = build(f"{task}:path={tmp_path}")
        assert "ignored: classes.txt, readme.txt" in said(built)
        assert sum(entry["rows"] == 200 for entry in built.describe()["reading"]["splits"]) == 3


@pytest.mark.parametrize("test", [
    "index\ttext\n" + "".join(f"{n}\tsecret {n}\n" for n in range(30)),
    "text\tlabel\n" + "".join(f"secret {n}\t\n" for n in range(30)),
    "text\tlabel\n" + "".join(f"secret {n}\t-1\n" for n in range(30)),
], ids=["no column", "empty", "-1"])  # fmt: skip
def test_a_test_split_without_labels_counts_as_missing(tmp_path, test):
    put(tmp_path, {"train.tsv": table(ROWS, "\t"), "dev.tsv": table(texts_of("dev"), "\t"), "test.tsv": test})
    task = build(f"text:path={tmp_path}")
    assert not any("secret" in text for text in everything(task)) and len(documents(task)["validation"]) == 60
    assert "test: test.tsv has no labels" in said(task)
    assert [entry["of"] for entry in task.describe()["reading"]["splits"]] == ["train", "validation", "train"]


def test_splits_of_one_kind_are_pooled_aloud_and_none_is_dropped(tmp_path):
    """newstest is test data; pairs of no split beside those of a split are refused."""
    stems = ("train", "newsdev2013", "newstest2013", "newstest2014", "test_2016")
    put(tmp_path, {f"{stem}.{language}": f"{stem} {language}\n" * 3 for stem in stems for language in ("de", "en")})
    task = build(f"translate:path={tmp_path}:overlap=keep", 64)
    assert len(task.corpus.splits["test"]) == 9
    assert "3 files together: newstest2013.de + .en, newstest2014.de + .en, test_2016.de + .en" in said(task)
    put(tmp_path, {"europarl.de": "eins\n", "europarl.en": "one\n"})
    assert "europarl.de is of no split" in refused(f"translate:path={tmp_path}", 64)


def test_other_files_beside_pairs_are_named(tmp_path):
    put(
        tmp_path,
        {f"{split}.{language}": f"{split} {n}\n" for split in SPLITS for n, language in enumerate(("de", "en"))},
    )
    put(tmp_path, {"train.fr": "un\n", "vocab.json": "{}", "lonely.de": "eins\n"})
    task = build(f"translate:path={tmp_path}")
    assert "ignored: lonely.de, train.fr, vocab.json" in said(task)


def test_splits_of_a_saved_data_set_are_pooled_not_dropped(tmp_path):
    part = lambda name: datasets.Dataset.from_list([{"text": f"{name} {n}", "label": n % 2} for n in range(40)])
    parts: dict[str | datasets.NamedSplit, datasets.Dataset] = {
        name: part(name) for name in ("train", "test_in", "test_out", "unsupervised")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    task = build(f"text:path={tmp_path / 'saved'}")
    assert len(documents(task)["test"]) == 80
    assert "2 files together: test_in, test_out" in said(task) and "ignored: split unsupervised" in said(task)


@pytest.mark.parametrize("name, split", {
    "train": "train", "in_domain_train.tsv": "train", "train-00000-of-00001.parquet": "train", "trainData": "train",
    "labeledTrainData.tsv": "train", "TRAIN": "train", "20news-bydate-train": "train", "X_train": "train",
    "test_2016_flickr": "test", "newstest2014": "test", "newsdev2016": "validation", "valid1": "validation",
    "out_of_domain_dev": "validation", "wiki.test.tokens": "test", "qa1_single-supporting-fact_test": "test",
    "latest": None, "strain": None, "contest": None, "development": None, "notes": None, "": None, "2013": None,
    "train_without_test": "train",
}.items())  # fmt: skip
def test_which_split_a_name_speaks_of(name, split):
    assert names.split_of(name) == split


@pytest.mark.parametrize("task, option", [("lm", ":column=text"), ("lm", ""), ("text", "")])
def test_tables_named_by_split_win_over_other_files(tmp_path, task, option):
    put(tmp_path, {"train.csv": table(ROWS), "test.csv": table(texts_of("test")), "notes.txt": "of my own"})
    put(tmp_path, {"docs/a.txt": "more", "docs/b.txt": "of it", "all.zip": b"PK\x03\x04", "prepare.py": "print()"})
    built = build(f"{task}:path={tmp_path}{option}")
    assert [entry["rows"] for entry in built.describe()["reading"]["splits"]] == [200, 200, 60]
    assert "ignored: all.zip, docs/a.txt, docs/b.txt, notes.txt and 1 more" in said(built)


def test_splits_without_class_folders_are_no_classes(tmp_path):
    put(tmp_path, {f"{split}/{n}.txt": f"{split} {n}" for split in ("train", "test") for n in range(40)})
    assert "no sub-folder with documents" in refused(f"text:path={tmp_path}")


# ---- 4: lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_alone(tmp_path, odd, end):
    pairs = [(f"Satz {n}{odd}zwei" if n == 7 else f"Satz {n}", f"sentence {n}") for n in range(300)]
    put(tmp_path, {f"train.{language}": "".join(pair[side] + end for pair in pairs)
                   for side, language in enumerate(("de", "en"))})  # fmt: skip
    task = build(f"translate:path={tmp_path}", 64)
    read = {(a.decode(), b.decode()) for split in SPLITS for a, b in task.corpus.splits[split]}
    assert read == set(pairs)
    rows = [(text, "pos" if n % 2 else "neg") for n, (text, _) in enumerate(pairs)]
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        path = put(tmp_path, {f"rows{suffix}": table(rows, separator).replace("\n", end)}) / f"rows{suffix}"
        assert sorted(everything(build(f"text:path={path}"))) == sorted(text for text, _ in rows)
    lines = "".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) + end for text, label in rows)
    path = put(tmp_path, {"rows.jsonl": lines}) / "rows.jsonl"
    assert sorted(everything(build(f"text:path={path}"))) == sorted(text for text, _ in rows)


def test_a_byte_order_mark_is_dropped_everywhere(tmp_path):
    mark = codecs.BOM_UTF8
    put(tmp_path / "lm", {name: mark + content for name, content in FILES.items()})
    task = build(f"lm:path={tmp_path / 'lm'}", 8)
    assert {split: task.bytes[split].tobytes() for split in SPLITS} == PARTS
    put(tmp_path, {"one.txt": mark + TEXT, "packed.txt.gz": gzip.compress(mark + TEXT)})
    assert all(build(f"lm:path={tmp_path / name}").bytes["train"].tobytes().startswith(b"line 0")
               for name in ("one.txt", "packed.txt.gz"))  # fmt: skip
    objects = [{"text": text, "label": label} for text, label in ROWS]
    for name, content in {
        "rows.csv": table(ROWS),
        "rows.tsv": table(ROWS, "\t"),
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in objects),
        "rows.json": json.dumps(objects),
    }.items():
        path = put(tmp_path, {name: mark + content.encode()}) / name
        assert sorted(everything(build(f"text:path={path}"))) == sorted(text for text, _ in ROWS)
    put(tmp_path / "text", {f"{label}/{text}.txt": mark + text.encode() for text, label in ROWS})
    assert "\ufeff" not in "".join(everything(build(f"text:path={tmp_path / 'text'}")))
    put(
        tmp_path / "pairs",
        {f"{split}.{side}": mark + b"%s\n" % split.encode() for split in SPLITS for side in ("de", "en")},
    )
    assert build(f"translate:path={tmp_path / 'pairs'}").corpus.splits["train"] == [(b"train", b"train")]


def test_lines_that_all_end_in_carriage_returns_are_refused(tmp_path):
    put(tmp_path, {"rows.csv": table(ROWS).replace("\n", "\r"), "train.de": "a\rb\r", "train.en": "a\rb\r"})
    assert "carriage return alone" in refused(f"text:path={tmp_path / 'rows.csv'}")
    assert "carriage return alone" in refused(f"translate:path={tmp_path}")


# ---- 5: fields ---------------------------------------------------------------------------------------------------


def test_a_quote_in_a_tsv_is_a_letter(tmp_path):
    rows = [(f'"bare {n}' if n in (50, 100) else f'says "{n}"', label) for n, (_, label) in enumerate(ROWS)]
    path = put(tmp_path, {"rows.tsv": table(rows, "\t")}) / "rows.tsv"
    task = build(f"text:path={path}")
    assert sorted(everything(task)) == sorted(text for text, _ in rows)
    assert "200 rows in 201 lines" in said(task)


@pytest.mark.parametrize("opened, closed, line", [
    ('"bare {}', '"bare {}', 52),
    ('"bare {}', 'size {}"', 52),
    ('"bare {}', "plain {}", 52),
    ('"{}" he said', "{}", 52),
])  # fmt: skip
def test_a_quoted_field_of_a_csv_that_swallows_rows_is_refused_with_its_line(tmp_path, opened, closed, line):
    rows = [((opened if n == 50 else closed if n == 100 else "text {}").format(n), label)
            for n, (_, label) in enumerate(ROWS)]  # fmt: skip
    path = put(tmp_path, {"rows.csv": table(rows)}) / "rows.csv"
    message = refused(f"text:path={path}")
    assert f"line {line}:" in message and str(path) in message and "double the quotes" in message


@pytest.mark.parametrize("content, message", [
    (table(ROWS, ";"), "are fields apart by ';'"),
    (table(ROWS, "\t"), "are fields apart by '\\t'"),
    ("text,text,label\n" + "a,b,c\n" * 9, 'two columns "text"'),
    ("label,text\n" + 'pos, "a, b"\n' * 9, "line 2 has 3 fields"),
    (table(ROWS).encode("utf-16"), "UTF-16"),
    ("a" * 200_000 + "\n" + "b\n", "header=false"),
], ids=["semicolons", "tabs", "twice", "blank before a quote", "wide", "long"])  # fmt: skip
def test_what_else_is_wrong_with_a_csv(tmp_path, content, message):
    path = put(tmp_path, {"rows.csv": content}) / "rows.csv"
    assert message in refused(f"text:path={path}") and len(refused(f"text:path={path}")) < 600


def test_odd_columns_of_a_csv_are_no_trouble(tmp_path):
    """Those of an index and of trailing commas have no names; a field may be long."""
    rows = [(str(n), text, label, "") for n, (text, label) in enumerate([*ROWS, ("x" * 200_000, "pos")])]
    path = put(tmp_path, {"rows.csv": table(rows, header=("", "text", "label", ""))}) / "rows.csv"
    assert len(everything(build(f"text:path={path}"))) == 201


def test_tables_of_one_split_have_the_same_columns(tmp_path):
    put(tmp_path, {"train_a.csv": table(ROWS), "train_b.csv": table(ROWS, header=("sentence", "label"))})
    message = refused(f"text:path={tmp_path}")
    assert f"train_b.csv has other columns than {tmp_path / 'train_a.csv'}" in message


@pytest.mark.parametrize("task, header", [("text:text_column=text", "label,text"), ("lm:column=text", "number,text")])
def test_a_quoted_field_at_the_end_of_a_row_that_swallows_rows(tmp_path, task, header):
    rows = [(label if "label" in header else str(n), {50: '"bare', 60: 'size 5"'}.get(n, f"text {n}"))
            for n, (_, label) in enumerate(ROWS)]  # fmt: skip
    path = put(tmp_path, {"rows.csv": table(rows, header=header.split(","))}) / "rows.csv"
    name, _, column = task.partition(":")
    assert "line 52: a quoted field" in refused(f"{name}:path={path}:{column}")


def test_quoted_fields_of_a_csv(tmp_path):
    rows = [(f'he said ""{n}"", twice\nand left\r\n{n}', label) for n, (_, label) in enumerate(ROWS)]
    path = put(tmp_path, {"rows.csv": table([(f'"{text}"', label) for text, label in rows])}) / "rows.csv"
    task = build(f"text:path={path}", 64)
    assert sorted(everything(task)) == sorted(text.replace('""', '"') for text, _ in rows)
    assert "200 rows in 601 lines" in said(task)


@pytest.mark.parametrize("content, line", [
    (table([(f"hello, {n}", label) for n, (_, label) in enumerate(ROWS)]), 2),
    (table(ROWS) + "short\n", 202),
    (table(ROWS[:9]) + "a,b,c,d\n" + table(ROWS, header=None), 11),
])  # fmt: skip
def test_a_ragged_table_is_refused_with_its_line(tmp_path, content, line):
    path = put(tmp_path, {"rows.csv": content}) / "rows.csv"
    assert f"line {line} has" in refused(f"text:path={path}")
    path = put(tmp_path, {"rows.tsv": content.replace(",", "\t")}) / "rows.tsv"
    assert f"line {line} has" in refused(f"text:path={path}")


@pytest.mark.parametrize("task, options", [("text", ""), ("lm", ""), ("translate", ":source=de:target=en")])
@pytest.mark.parametrize("rows", [[("good film", "1"), ("bad film", "0")] * 9, [("same", "same"), ("other", "same")]])
def test_a_table_without_header_is_told_to_say_so(tmp_path, task, options, rows):
    path = put(tmp_path, {"rows.csv": table(rows, header=None)}) / "rows.csv"
    assert "header=false" in refused(f"{task}:path={path}{options}")


def test_tables_without_header(tmp_path):
    path = put(tmp_path, {"rows.tsv": table(ROWS, "\t", header=None)}) / "rows.tsv"
    assert len(everything(build(f"text:path={path}:header=false:text_column=0:label_column=1"))) == 200
    assert build(f"lm:path={path}:header=false:column=0").describe()["documents"] == 200
    task = build(f"translate:path={path}:header=false:source=0:target=1:overlap=keep")
    assert sum(map(len, task.corpus.splits.values())) == 200


def test_columns_may_be_joined(tmp_path):
    rows = [(f"title {n}", "" if n == 3 else f"body {n}", label) for n, (_, label) in enumerate(ROWS)]
    path = put(tmp_path, {"rows.csv": table(rows, header=("title", "body", "label"))}) / "rows.csv"
    joined = sorted(title + ("\n" + body if body else "") for title, body, _ in rows)
    assert sorted(everything(build(f"text:path={path}:text_column=title+body"))) == joined
    assert build(f"lm:path={path}:column=title+body").describe()["documents"] == 200
    assert 'did you mean "body"' in refused(f"text:path={path}:text_column=title+bdy")
    path = put(tmp_path, {"bare.csv": table(rows, header=None)}) / "bare.csv"
    assert sorted(everything(build(f"text:path={path}:header=false:text_column=0+1:label_column=2"))) == joined


@pytest.mark.parametrize("content", [
    [{"text": text, "label": label} for text, label in ROWS],
    {"data": [{"text": text, "label": label} for text, label in ROWS]},
    {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]},
], ids=["array", "array in an object", "object of arrays"])  # fmt: skip
def test_json_arrays(tmp_path, content):
    path = put(tmp_path, {"rows.json": json.dumps(content, indent=1)}) / "rows.json"
    assert sorted(everything(build(f"text:path={path}"))) == sorted(text for text, _ in ROWS)


def test_names_of_classes_are_kept_in_their_order(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["world", "art"])}
    )
    rows = [{"text": text, "label": int(label == "pos")} for text, label in ROWS]
    part = datasets.Dataset.from_list(rows, features=features)
    part.to_parquet(str(tmp_path / "rows.parquet"))
    part.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        task = build(f"text:path={path}")
        assert task.corpus.classes == ("world", "art")
        texts, labels = task.corpus.splits["train"]
        known = {text.encode(): int(label == "pos") for text, label in ROWS}
        assert [known[text] for text in texts] == labels.tolist()


def test_parquet_with_nulls(tmp_path):
    texts, labels = zip(*ROWS, strict=True)
    numbers = [int(label == "pos") for label in labels]
    path = tmp_path / "rows.parquet"
    write = lambda texts, labels: pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "label": labels}), str(path)
    )
    write(texts, [*numbers[:-1], None])
    assert 'column "label", row 200 has no label' in refused(f"text:path={path}")
    write([*texts[:-1], None], numbers)
    assert 'column "text", row 200 is missing' in refused(f"text:path={path}")
    write(texts, [float(number) for number in numbers])
    assert build(f"text:path={path}").corpus.classes == ("0", "1")


# ---- 6: types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, separator", [(".csv", ","), (".tsv", "\t")])
def test_cells_are_strings_and_only_an_empty_one_is_missing(tmp_path, suffix, separator):
    words = ["NA", "null", "None", "nan", "N/A", "inf", "007", "1e5", "True", "-1", "0x1f", "12", "1.50"]
    rows = [(word, "pos" if n % 2 else "neg") for n, word in enumerate(words)] * 9
    path = put(tmp_path, {f"rows{suffix}": table(rows, separator)}) / f"rows{suffix}"
    assert set(everything(build(f"text:path={path}:overlap=keep"))) == set(words)
    rows = [(f"document {n}", ("NA", "None", "null")[n % 3]) for n in range(90)]
    path = put(tmp_path, {f"rows{suffix}": table(rows, separator)}) / f"rows{suffix}"
    assert build(f"text:path={path}").corpus.classes == ("NA", "None", "null")


def test_words_after_many_numbers(tmp_path):
    rows = [(str(n), str(n % 2)) for n in range(10_000)] + [(f"word {n}", str(n % 2)) for n in range(9)]
    path = put(tmp_path, {"rows.csv": table(rows)}) / "rows.csv"
    assert set(everything(build(f"text:path={path}"))) == {text for text, _ in rows}


def test_labels_are_stripped(tmp_path):
    rows = [(text, f" {label}" if n % 3 else f"{label} ") for n, (text, label) in enumerate(ROWS)]
    path = put(tmp_path, {"rows.csv": table(rows)}) / "rows.csv"
    assert build(f"text:path={path}").corpus.classes == ("neg", "pos")
    path.write_text(table([(text, {"neg": " 10", "pos": "9 "}[label]) for text, label in ROWS]))
    assert build(f"text:path={path}").corpus.classes == ("9", "10")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_that_only_held_out_data_have_are_refused(tmp_path, suffix):
    rows = {"train": ROWS, "test": [*texts_of("test"), ("odd", "neutral"), ("odder", "neutral")]}
    for split, of_split in rows.items():
        lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in of_split)
        put(tmp_path, {f"{split}{suffix}": table(of_split) if suffix == ".csv" else lines})
    message = refused(f"text:path={tmp_path}")
    assert "the test data have labels that the train data lack, in 2 rows: neutral" in message
    folders = {"train/a/1": "1", "train/b/2": "2", "train/a/3": "3", "train/b/4": "4", "test/c/1": "5", "test/a/2": "6"}
    assert "labels that the train data lack" in refused(f"text:path={put(tmp_path / 'folders', folders)}")


def test_minus_one_in_part_of_the_rows_is_a_warning(tmp_path):
    rows = [(text, "-1" if n < 20 else str(n % 2)) for n, (text, _) in enumerate(ROWS)]
    task = build(f"text:path={put(tmp_path, {'rows.csv': table(rows)}) / 'rows.csv'}")
    assert task.corpus.classes == ("-1", "0", "1")
    assert "warning: label -1 in 20 of 200 rows" in said(task)
    assert "warning" not in said(build(f"text:path={put(tmp_path, {'r.csv': table(ROWS)}) / 'r.csv'}"))


# ---- 7: overlap --------------------------------------------------------------------------------------------------


def copied(task) -> int:
    return sum(entry["copies"] for entry in task.describe()["reading"]["splits"])


def test_documents_are_compared_as_the_model_sees_them(tmp_path):
    """Cut to seq_len and without blanks around."""
    same = [(f"{n:03} " + "x" * 40 + " train", label) for n, (_, label) in enumerate(ROWS)]
    test = [(f"{n:03} " + "x" * 40 + " test ", label) for n, (_, label) in enumerate(ROWS[:30])] + texts_of("test")
    put(tmp_path, {"train.csv": table(same), "valid.csv": table(texts_of("valid")), "test.csv": table(test)})
    task = build(f"text:path={tmp_path}", 32)
    assert len(documents(task)["train"]) == 170 and copied(task) == task.describe()["copies_dropped"] == 30
    assert "30 copies of held-out data dropped" in said(task)
    task = build(f"text:path={tmp_path}:overlap=keep", 32)
    assert (
        len(documents(task)["train"]) == 200 and copied(task) == 30 and "30 copies of held-out data kept" in said(task)
    )
    assert "30 of train stand in a held-out split too" in refused(f"text:path={tmp_path}:overlap=refuse", 32)
    assert copied(build(f"text:path={tmp_path}:overlap=refuse", 64)) == 0
    assert "overlap" in refused(f"text:path={tmp_path}:overlap=maybe")
    put(tmp_path, {"test.csv": table([(f'" {text}  "', label) for text, label in ROWS[:9]])})
    put(tmp_path, {"train.csv": table(ROWS)})
    assert copied(build(f"text:path={tmp_path}")) == 9


def test_pairs_and_images_and_texts_are_compared_too(tmp_path):
    sides = {"train": range(40), "val": range(50, 60), "test": range(5)}
    put(tmp_path / "pairs", {f"{split}.{side}": "".join(f" {side} {n} \n" for n in numbers)
                             for split, numbers in sides.items() for side in ("de", "en")})  # fmt: skip
    task = build(f"translate:path={tmp_path / 'pairs'}")
    assert [len(task.rows[split][0]) for split in SPLITS] == [35, 10, 5] and copied(task) == 5
    assert copied(build(f"translate:path={tmp_path / 'pairs'}:overlap=keep")) == 5
    assert "5 of train stand" in refused(f"translate:path={tmp_path / 'pairs'}:overlap=refuse")
    images = np.arange(60 * 4, dtype=np.uint8).reshape(60, 2, 2)
    labels = np.arange(60) % 2
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "train.npz", image=images, label=labels)
    np.savez(tmp_path / "images" / "test.npz", image=images[:10], label=labels[:10])
    assert copied(build(f"pixels:path={tmp_path / 'images'}", 4)) == 10
    assert "stand in a held-out split" in refused(f"pixels:path={tmp_path / 'images'}:overlap=refuse", 4)
    shared = b"this very line stands in both of them\n"
    put(tmp_path / "lm", {**FILES, "train.txt": PARTS["train"] + shared, "test.txt": PARTS["test"] + shared})
    task = build(f"lm:path={tmp_path / 'lm'}", 32)
    assert task.bytes["train"].tobytes() == PARTS["train"] and copied(task) == 1
    assert shared in build(f"lm:path={tmp_path / 'lm'}:overlap=keep", 32).bytes["train"].tobytes()
    assert "1 of train" in refused(f"lm:path={tmp_path / 'lm'}:overlap=refuse", 32)
    put(tmp_path / "rows", {"train.csv": table(ROWS), "valid.csv": table(texts_of("v")), "test.csv": table(ROWS[:7])})
    assert copied(build(f"lm:path={tmp_path / 'rows'}")) == 7


def test_a_split_that_copies_empty_says_so(tmp_path):
    put(tmp_path, {"train.csv": table(ROWS), "test.csv": table(ROWS)})
    assert "were dropped for being held out too: overlap=keep" in refused(f"text:path={tmp_path}")


# ---- 8: stale data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, separator", [(".csv", ","), (".tsv", "\t"), (".jsonl", "")])
def test_a_file_written_anew_with_its_old_time_is_read_anew(tmp_path, suffix, separator):
    path = tmp_path / f"rows{suffix}"
    lines = lambda rows: "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    for word in ("first", "other"):
        rows = [(f"{word} {n}", label) for n, (_, label) in enumerate(ROWS)]
        path.write_text(lines(rows) if suffix == ".jsonl" else table(rows, separator))
        os.utime(path, (10**9, 10**9))
        assert all(text.startswith(word) for text in everything(build(f"text:path={path}")))
        assert build(f"lm:path={path}").bytes["train"].tobytes().startswith(word.encode())


# ---- 9: errors ---------------------------------------------------------------------------------------------------


def test_errors_name_the_file_and_the_line(tmp_path):
    put(tmp_path, {
        "header.csv": "text,label\n",
        "latin.csv": table(ROWS).encode() + b"\xff,pos\n",
        "latin.tsv": table(ROWS, "\t").encode() + b"\xff\tpos\n",
        "bad.jsonl": '{"text": "a", "label": 1}\n{"text": \n',
        "deep.jsonl": "[" * 100_000,
        "deep.json": "[" * 100_000,
        "empty.csv": "",
        "blank.csv": "\n\n\n",
        "missing.csv": table([*ROWS, ("text", "")]),
        "escape.csv": "\x1b[31mred,\x1b[31mred\n1,2\n",
    })  # fmt: skip
    for name, words in {
        "header.csv": "line 1", "latin.csv": "line 202", "latin.tsv": "line 202", "bad.jsonl": "line 2",
        "deep.jsonl": "nested too deeply", "deep.json": "nested too deeply", "empty.csv": "empty",
        "blank.csv": "empty", "missing.csv": "line 202", "escape.csv": "header=false",
    }.items():  # fmt: skip
        message = refused(f"text:path={tmp_path / name}")
        assert name in message and words in message, message


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nothing.csv")
    for name in ("loop", "gone.csv"):
        for task in ("lm", "text", "translate", "pixels"):
            assert "is a link to" in refused(f"{task}:path={tmp_path / name}")
    put(tmp_path / "folder", {**{f"{n}.txt": f"text {n}\n" * 9 for n in range(60)}})
    (tmp_path / "folder" / "more").symlink_to(tmp_path / "folder")
    assert "links that are not followed: more" in said(build(f"lm:path={tmp_path / 'folder'}", 8))
    put(tmp_path / "splits", {"train.csv": table(ROWS)})
    (tmp_path / "splits" / "test.csv").symlink_to(tmp_path / "splits" / "test.csv")
    assert "links that are not followed: test.csv" in said(build(f"text:path={tmp_path / 'splits'}"))


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


IMAGES = npy(np.arange(60 * 4, dtype=np.uint8).reshape(60, 2, 2))
LABELS = npy(np.arange(60) % 2)
HUGE = npy(np.zeros((60, 2, 2), np.uint8)).replace(b"(60, 2, 2)", b"(10**9, 2)")


@pytest.mark.parametrize("member, message", [
    ({"image.npy": IMAGES.replace(b"(60, 2, 2)", b"(9999999999, 2, 2)")[:200]}, "cannot read"),
    ({"image.npy": IMAGES.replace(b"(60, 2, 2), }         ", b"(600000000, 2, 2), }  ")}, "but holds 240 bytes"),
    ({"image.npy": IMAGES.replace(b"(60, 2, 2), }", b"(-6, 2, 2), }")}, "cannot read"),
    ({"image.npy": HUGE}, "cannot read"),
    ({"image.npy": b"no array"}, "cannot read"),
    ({"image.npy": b""}, "cannot read"),
    ({"image.npy": npy(np.array([{}] * 60, object))}, "cannot read"),
    ({"image.npy": npy(np.array(["a"] * 60))}, "as many labels"),
    ({}, "as many labels"),
], ids=str)  # fmt: skip
def test_odd_members_of_an_npz(tmp_path, member, message):
    def write(members):
        with zipfile.ZipFile(tmp_path / "images.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return f"pixels:path={tmp_path / 'images.npz'}"

    assert message in refused(write({"label.npy": LABELS, **member}), 4)
    task = build(write({"label.npy": LABELS, "image.npy": IMAGES, "notes.txt": b"mine", "folder/": b""}), 4)
    assert sum(map(len, (labels for _, labels in task.corpus.splits.values()))) == 60
    assert "ignored: notes.txt, folder/" in said(task)


def test_an_npz_bomb_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "images.npz", image=np.zeros((60, 256, 256), np.uint8), label=np.arange(60) % 2)
    monkeypatch.setattr(compressed, "LIMIT", 2**20)
    assert "expands to more than" in refused(f"pixels:path={tmp_path / 'images.npz'}", 256 * 256)


# ---- what is said ------------------------------------------------------------------------------------------------


def test_a_record_says_what_was_read_in_one_line_for_each_split(tmp_path):
    put(tmp_path, {"train.csv": table(ROWS), "test.csv": table([*texts_of("test"), *ROWS[:3]]), "notes.txt": "mine"})
    task = build(f"text:path={tmp_path}")
    reading = json.loads(json.dumps(task.describe()["reading"]))
    train, validation, test = reading["splits"]
    assert (train["names"], train["rows"], train["lines"], train["classes"], train["copies"]) == (
        ["train.csv"],
        200,
        201,
        2,
        3,
    )
    assert (validation["of"], test["rows"], test["lines"], test["bytes"]) == (
        "train",
        63,
        64,
        len(table([*texts_of("test"), *ROWS[:3]])),
    )
    assert train["examples"] + validation["examples"] == 197
    lines = task.reading()
    assert [line.partition(":")[0] for line in lines] == [*SPLITS, "ignored"]
    assert "train.csv: 200 rows in 201 lines" in lines[0] and "3 copies of held-out data dropped" in lines[0] + lines[1]


def test_rows_that_are_dropped_are_counted(tmp_path):
    put(tmp_path, {f"{split}.{side}": f"{split}\n\n{split} {side} two\n" for split in SPLITS for side in ("de", "en")})
    task = build(f"translate:path={tmp_path}", 64)
    assert "train.de + .en: 3 rows in 3 lines" in said(task) and "1 dropped: a side is blank" in said(task)
    assert [entry["rows_dropped"] for entry in task.describe()["reading"]["splits"]] == [{"a side is blank": 1}] * 3
    path = put(tmp_path, {"rows.csv": table([("", "x"), *ROWS])}) / "rows.csv"
    assert "1 dropped: blank" in said(build(f"lm:path={path}"))


def test_how_data_were_read_is_no_part_of_what_identifies_them(tmp_path):
    task = build(f"lm:path={put(tmp_path, FILES)}", 8)
    other = build(f"lm:path={put(tmp_path, {'notes.txt': 'mine'})}", 8)
    assert task.describe()["reading"] != other.describe()["reading"]
    assert jobs.fingerprint(task) == jobs.fingerprint(other)


def test_generated_tasks_read_nothing():
    assert build("copy").reading() == [] and "reading" not in build("copy").describe()


def test_a_folder_of_one_text_is_read_like_the_text(tmp_path):
    text = "".join(f"line {number}\n" for number in range(2000))
    (tmp_path / "input.txt").write_text(text)
    (tmp_path / "SOURCE.md").write_text("where it is from\n")
    folder, file = (
        spec.build("task", f"lm:path={path}", Setting(64, 4)) for path in (tmp_path, tmp_path / "input.txt")
    )
    assert folder.describe()["sha256"] == file.describe()["sha256"]
    assert "ignored: SOURCE.md" in folder.reading()
