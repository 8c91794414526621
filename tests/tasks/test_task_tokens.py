"""Subwords: what they spell, what they are trained on, what is kept of them, and what they score."""

import json
import math
import os
import pathlib
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from xformers_lab import files, spec
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import check_config
from xformers_lab.tasks import SPLITS, Setting, _tokens

TEXT = "the cat sat on the mat, the dog sat on the log; ärger über öl\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return files.cache("tokens")


@pytest.fixture
def book(tmp_path) -> pathlib.Path:
    path = tmp_path / "book.txt"
    rng = np.random.default_rng(0)
    words = TEXT.split()
    path.write_text(" ".join(words[place] for place in rng.integers(0, len(words), 3000)) + "\n")
    return path


def build(text: str, length: int = 16, batch: int = 4):
    return spec.build("task", text, Setting(length, batch))


def byte_level(text: str = TEXT, **options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    return tokenizer


def test_the_alphabet_is_that_of_the_library():
    assert set(_tokens._ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    encoding = byte_level(vocab_size=256).encode("é\0 ~")
    assert bytes(_tokens._ALPHABET[mark] for token in encoding.tokens for mark in token) == "é\0 ~".encode()


def test_tokens_spell_the_text_and_targets_follow_inputs(book):
    task = build(f"lm:path={book}:tokens=bpe:vocab=300")
    assert 256 < task.vocab == task.outputs <= 300
    for split in SPLITS:
        assert task.tokens.decode(task.ids[split]) == task.bytes[split].tobytes()
        batch = task.batch(split, 1)
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for ids, following in zip(batch.inputs, batch.targets, strict=True):
            spelled = task.tokens.decode([*ids.tolist(), int(following[-1])])
            assert spelled in task.bytes[split].tobytes() and len(spelled) > 17
    assert task.decode(task.encode("über the log")) == "über the log"


def test_the_splits_are_those_of_bytes(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number} {TEXT}")
    plain, subwords = build(f"lm:path={tmp_path}"), build(f"lm:path={tmp_path}:tokens=bpe:vocab=300")
    for split in SPLITS:
        assert plain.bytes[split].tobytes() == subwords.bytes[split].tobytes()
    assert plain.describe()["sha256"] == subwords.describe()["sha256"] and "tokens" not in plain.describe()
    assert plain.ids["train"] is plain.bytes["train"]


def test_only_the_training_split_is_trained_on(tmp_path):
    """The same training text gives the same tokenizer, whatever the held-out text is."""
    digests = set()
    for held in ("q" * 200, "zz zz " * 40):
        folder = tmp_path / held[0]
        folder.mkdir()
        (folder / "train.txt").write_text(TEXT * 20)
        for name in ("valid", "test"):
            (folder / f"{name}.txt").write_text(f"{name} {held}\n")
        task = build(f"lm:path={folder}:tokens=bpe:vocab=320")
        assert not any(b"qq" in spelling or b"zz" in spelling for spelling in task.tokens.spelled)
        digests.add(task.describe()["tokens"]["sha256"])
    assert len(digests) == 1


def test_bytes_that_are_no_utf8_are_tokens_of_their_own(tmp_path):
    (tmp_path / "book.txt").write_bytes(bytes(range(256)) * 20 + "ä".encode()[:1])
    task = build(f"lm:path={tmp_path / 'book.txt'}:tokens=bpe:vocab=300", 8)
    for split in SPLITS:
        assert task.tokens.decode(task.ids[split]) == task.bytes[split].tobytes()


def test_a_long_text_is_cut_between_lines_and_characters(monkeypatch):
    monkeypatch.setattr(_tokens, "_CHUNK", 16)
    text = (TEXT + "äöü" * 30 + "\n\nx").encode()
    chunks = list(_tokens._chunks(text))
    assert b"".join(chunks) == text and max(map(len, chunks)) <= 16
    assert all(chunk.decode() for chunk in chunks)
    tokens = _tokens.of("lm", "bpe", 300, lambda: [text])
    assert tokens.decode(tokens.encode(text).tolist()) == text


def test_what_is_made_is_kept_and_read_in_place(book, cache, monkeypatch):
    choice = f"lm:path={book}:tokens=bpe:vocab=300"
    first = build(choice)
    kept = sorted(cache.iterdir())
    assert [path.suffix for path in kept].count(".npy") == 3 and [path.suffix for path in kept].count(".json") == 1
    monkeypatch.setattr(tokenizers.trainers, "BpeTrainer", None)
    monkeypatch.setattr(_tokens.Tokens, "_encoded", None)
    again = build(choice)
    assert isinstance(again.ids["train"], np.memmap)
    assert again.describe()["tokens"] == first.describe()["tokens"]
    assert "(read from the cache)" in again.reading()[-1] and "(read" not in first.reading()[-1]
    for split in SPLITS:
        np.testing.assert_array_equal(first.ids[split], again.ids[split])


@pytest.mark.parametrize("harm", ["cut", "other", "junk", "large"])
def test_a_damaged_cache_is_made_again(book, cache, harm):
    choice = f"lm:path={book}:tokens=bpe:vocab=300"
    first = build(choice)
    expected = {split: np.array(ids) for split, ids in first.ids.items()}
    for path in cache.iterdir():
        content = path.read_bytes()
        if harm == "junk" or path.suffix == ".json":
            path.write_bytes(b"junk")
        elif harm == "cut":
            path.write_bytes(content[:-7])
        else:
            wrong = np.load(path)
            wrong[-1] = 60_000 if harm == "large" else int(np.argmax(first.tokens.sizes))
            np.save(path, np.append(wrong, wrong[-1:]))
    again = build(choice)
    for split in SPLITS:
        np.testing.assert_array_equal(expected[split], again.ids[split])
    assert isinstance(build(choice).ids["test"], np.memmap), "what was made again is kept"


def test_a_cache_that_cannot_be_written_is_done_without(book, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build(f"lm:path={book}:tokens=bpe:vocab=300").vocab > 256


@pytest.mark.full
def test_processes_that_race_end_with_the_same(book, tmp_path):
    program = (
        "from xformers_lab import spec; from xformers_lab.tasks import Setting; import sys, hashlib\n"
        "task = spec.build('task', sys.argv[1], Setting(16, 4))\n"
        "print(task.describe()['tokens']['sha256'], hashlib.sha256(task.ids['train'].tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", program, f"lm:path={book}:tokens=bpe:vocab=300"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and said[0] == said[1] and len(said[0]) > 100
    assert not list(files.cache("tokens").glob("*.tmp"))


def test_bits_per_byte_count_bytes(book):
    task = build(f"lm:path={book}:tokens=bpe:vocab=300")
    numbers = np.arange(task.examples("test"))
    batch = task.take("test", numbers)
    assert batch.weights.sum() == len(task.ids["test"]) - 1
    nats, covered = task.metric(jnp.zeros((*batch.targets.shape, task.outputs)), batch)
    first = len(task.tokens.spelled[task.ids["test"][0]])
    assert float(covered) == len(task.bytes["test"]) - first
    assert task.finish(float(nats) / float(covered)) == pytest.approx(task.chance, rel=1e-5)
    loss, weight = task.loss(jnp.zeros((*batch.targets.shape, task.outputs)), batch)
    assert float(weight) == batch.weights.sum()
    assert task.figures(float(loss) / float(weight)) == {"perplexity": pytest.approx(task.vocab, rel=1e-4)}
    assert task.figures(1e6) == {"perplexity": math.inf}


def test_a_model_of_frequencies_scores_the_unigram(book):
    for choice in ("bytes", "bpe:vocab=300"):
        task = build(f"lm:path={book}:tokens={choice}")
        counts = np.bincount(task.ids["train"], minlength=task.vocab) + 1.0
        batch = task.take("test", np.arange(task.examples("test")))
        logits = jnp.broadcast_to(jnp.log(counts / counts.sum()), (*batch.targets.shape, task.outputs))
        nats, covered = task.metric(logits, batch)
        unigram = task.describe()["unigram"]
        assert task.finish(float(nats) / float(covered)) == pytest.approx(unigram, abs=2e-3)
        assert unigram < task.chance


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
@pytest.mark.parametrize("tokens", ["bytes", "bpe:vocab=300"])
def test_overlapping_windows_score_each_token_once(tmp_path, stride, tokens):
    (tmp_path / "book.txt").write_text("".join(f"{number:04d} " for number in range(400)))
    task = build(f"lm:path={tmp_path / 'book.txt'}:tokens={tokens}:stride={stride}")
    ids, seen = np.asarray(task.ids["test"]), []
    for number in range(task.examples("test")):
        batch = task.take("test", np.array([number]))
        at = number * stride + 1 + np.nonzero(batch.weights[0])[0]
        np.testing.assert_array_equal(batch.targets[0][batch.weights[0] > 0], ids[at])
        if number and at[-1] < len(ids) - 1:
            assert len(at) == stride and np.nonzero(batch.weights[0])[0][0] == 16 - stride
        seen += at.tolist()
    assert seen == list(range(1, len(ids)))


def test_a_memory_refuses_windows_that_overlap():
    config = edit(Config(), task="lm:stride=8", memory="xl:length=16", seq_len=16, position="rope")
    config = edit(config, dim=16, heads=2, layers=1)
    with pytest.raises(UsageError, match="use task=lm without stride="):
        check_config(config)
    check_config(edit(config, task="lm"))


def test_a_tokenizer_of_a_file_or_the_hub(book, tmp_path, monkeypatch):
    tokenizer = byte_level(vocab_size=290, special_tokens=["<|end|>"])
    tokenizer.enable_truncation(4)
    path = tmp_path / "tok.json"
    tokenizer.save(str(path))
    task = build(f"lm:path={book}:tokens=(file:{path})")
    assert task.vocab == tokenizer.get_vocab_size() and len(task.ids["train"]) > 4
    assert task.encode("a<|end|>b")[1] == tokenizer.token_to_id("<|end|>")
    assert build(f"lm:path={book}:tokens={path}").describe()["tokens"] == task.describe()["tokens"]

    snapshot = tmp_path / "hub" / "models--nobody--made" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes(path.read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = build(f"lm:path={book}:tokens=(hub:nobody/made)")
    np.testing.assert_array_equal(hub.ids["test"], task.ids["test"])
    with pytest.raises(UsageError, match=r"not available: connect this machine .* tokens=\(file:PATH\)"):
        build(f"lm:path={book}:tokens=(hub:nobody/else)")


def test_a_tokenizer_that_loses_something_is_refused(book, tmp_path):
    words = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(UsageError, match="no byte-level tokenizer"):
        build(f"lm:path={book}:tokens={tmp_path / 'words.json'}")
    small = byte_level()
    small.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    small.save(str(tmp_path / "small.json"))
    book.write_text("The " * 2000)
    with pytest.raises(UsageError, match="does not spell the text back: 'The The"):
        build(f"lm:path={book}:tokens={tmp_path / 'small.json'}")


def test_chance_draws_of_a_tokenizer_are_turned_off(book, tmp_path):
    about = json.loads(byte_level(vocab_size=300).to_str())
    about["model"]["dropout"] = 0.9
    (tmp_path / "tok.json").write_text(json.dumps(about))
    tokens = _tokens.of("lm", str(tmp_path / "tok.json"), None, lambda: [])
    assert len({tokens.encode(TEXT.encode()).tobytes() for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("tokens=words", "use tokens=bytes, tokens=bpe"),
        ("tokens=(hub:)", "use tokens=bytes, tokens=bpe"),
        ("vocab=300", "vocab=300 is of tokens=bpe"),
        ("tokens=bpe:vocab=256", "use 257 to"),
        ("tokens=bpe:vocab=9999999", "use 257 to 1,048,576"),
        ("tokens=nowhere.json", "nowhere.json cannot be read: No such file"),
        ("tokens={}", "is no tokenizer.json"),
        ("stride=0", "use 1 to seq_len=16"),
        ("stride=17", "use 1 to seq_len=16"),
        ("tokens=bpe:vocab=300:stride=2.5", "whole number"),
    ],
)
def test_options_that_cannot_be_are_one_clear_message(book, tmp_path, options, says):
    (tmp_path / "junk.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        build(f"lm:path={book}:{options.format(tmp_path / 'junk.json')}")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_library_bytes_work_and_subwords_say_what_is_missing(book, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert build(f"lm:path={book}").vocab == 256
    with pytest.raises(UsageError, match=r"pip install 'xformers_lab\[text\]'"):
        build(f"lm:path={book}:tokens=bpe")


@pytest.mark.full
def test_a_run_tells_perplexity_beside_bits_per_byte(book, tmp_path, capsys):
    words = ["seq_len=16", "dim=16", "layers=1", "heads=2", "batch=8", "steps=30", "lr=0.01", "attention=full"]
    words += ["eval_batches=all", f"runs={tmp_path / 'runs'}"]
    assert main(["train", f"task=lm:path={book}:tokens=bpe:vocab=280:stride=4", *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    task = build(f"lm:path={book}:tokens=bpe:vocab=280:stride=4")
    assert record["aux"]["perplexity"] == pytest.approx(math.exp(record["loss"]), rel=1e-6)
    assert record["examples"] == record["examples_of"] == task.examples("test")
    scored = task.ids["test"][1:]
    bits = record["loss"] / math.log(2) * len(scored) / task.tokens.count(scored)
    assert record["metric"] == pytest.approx(bits, rel=1e-5) and record["metric"] < record["chance"]
    assert record["data"]["tokens"]["vocab"] == task.vocab
    assert main(["generate", record["run_dir"], "--prompt", "the cat", "--new", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert main(["eval", record["run_dir"]]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_real_book(shared):
    path = shared / "data" / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip("no tinyshakespeare here")
    plain, subwords = build(f"lm:path={path}"), build(f"lm:path={path}:tokens=bpe:vocab=1024")
    assert subwords.vocab == 1024 and 2 < subwords.tokens.bytes_per_token(subwords.ids["test"]) < 3
    assert subwords.describe()["unigram"] < plain.describe()["unigram"] < 5


# ---- labelled and masked texts -----------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path) -> pathlib.Path:
    """Documents of three classes, some of which stand twice."""
    path, rng, words = tmp_path / "rows.jsonl", np.random.default_rng(0), TEXT.split()
    rows = [{"text": " ".join(rng.choice(words, 12 + at % 5)), "label": at % 3} for at in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:20]]))
    return path


def test_labelled_documents_are_spelled_by_subwords_and_cut_off(labelled):
    subwords, plain = (build(f"text:path={labelled}:{how}", 12) for how in ("tokens=bpe:vocab=270", "overlap=drop"))
    assert subwords.vocab == 271 and plain.vocab == 257
    numbers = np.arange(subwords.examples("test"))
    batch = subwords.take("test", numbers)
    np.testing.assert_array_equal(batch.targets, plain.take("test", numbers).targets)
    assert batch.inputs.dtype == np.int32 and batch.inputs.max() < 271 and (batch.valid == (batch.inputs > 0)).all()
    for row, document in zip(batch.inputs, subwords.corpus.splits["test"][0], strict=True):
        spelled = subwords.decode(row.tolist())
        assert document.decode().startswith(spelled.rstrip("\ufffd")) and len(spelled) > 12
        assert subwords.encode(document.decode())[:12] == row.tolist()
    assert subwords.describe()["tokens"] == {"vocab": 270, "sha256": subwords.tokens.digest}
    assert "tokens" not in plain.describe() and any("270 of bpe" in line for line in subwords.reading())


def test_a_document_that_is_held_out_as_the_model_sees_it_is_dropped(tmp_path):
    """Its first tokens are those of one in the test split, and what follows is beyond the length."""
    (tmp_path / "test.csv").write_text(
        "text,label\n" + "".join(f"the cat sat on the mat {n},{n % 2}\n" for n in range(9))
    )
    seen = [f"the cat sat on the mat {n},{n % 2}\n" for n in (1, 2)] + ["the cat sat on the mat and more,0\n"]
    rows = [f"{n}{' dog log' * (3 + n % 7)},{n % 2}\n" for n in range(60)]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(seen + rows))
    kept = [build(f"text:path={tmp_path}:tokens=bpe:vocab=270", length) for length in (4, 64)]
    texts = [
        b"\n".join(text for part in ("train", "validation") for text in task.corpus.splits[part][0]) for task in kept
    ]
    assert [b"and more" in text for text in texts] == [False, True] and not any(b"mat 1" in text for text in texts)
    assert kept[0].tokens.digest == kept[1].tokens.digest, "the tokenizer is the same at every length"


def test_masked_subwords_are_those_of_the_labelled_documents(labelled):
    hidden, plain = (build(f"{name}:path={labelled}:tokens=bpe:vocab=270", 12) for name in ("mlm", "text"))
    assert hidden.tokenizer == plain.tokenizer and (hidden.vocab, plain.vocab, hidden.mask) == (272, 271, 271)
    seen = [hidden.batch("train", step) for step in range(20)]
    for step, batch in enumerate(seen):
        np.testing.assert_array_equal(batch.targets, plain.batch("train", step).inputs)
    inputs, chosen = (np.concatenate(parts) for parts in zip(*((b.inputs, b.weights > 0) for b in seen), strict=True))
    assert (inputs[chosen] == 271).mean() == pytest.approx(0.8, abs=0.1) and (inputs[~chosen] < 271).all()
    assert hidden.decode([*plain.encode("cat"), 271]) == "cat\ufffd"
    targets = np.concatenate([plain.ids["test"][number] for number in range(plain.examples("test"))])
    assert hidden.chance == pytest.approx((targets == hidden.likeliest - 1).mean())


def test_windows_of_masked_subwords(book):
    task, plain = build(f"mlm:of=lm:path={book}:tokens=bpe:vocab=270"), build(f"lm:path={book}:tokens=bpe:vocab=270")
    batch = task.take("test", np.arange(task.examples("test")))
    seen = batch.targets[batch.valid] - 1
    np.testing.assert_array_equal(seen, plain.ids["test"][: len(seen)])
    assert task.tokenizer != plain.tokenizer, "one begins at 1, the other at 0"


def test_a_published_preset_is_of_bytes(labelled):
    with pytest.raises(UsageError, match="tokens=bpe beside preset=lra, which has tokens=bytes"):
        build(f"text:path={labelled}:preset=lra:tokens=bpe", 4000)


@pytest.mark.full
def test_a_run_on_masked_subwords_hands_its_tokens_on(labelled, tmp_path, inline, capsys):
    """Pretraining, then fine-tuning by the same tokenizer; another one of as many tokens is refused."""
    words = ["seq_len=12", "dim=16", "layers=1", "heads=2", "steps=3", "batch=8", f"runs={tmp_path / 'runs'}", "--json"]
    of = lambda name, more="": f"task={name}:path={labelled}:tokens=bpe:vocab=270{more}"
    assert main(["train", of("mlm"), *words]) == 0
    first = json.loads(capsys.readouterr().out)["run_dir"]
    assert main(["train", of("text"), f"init={first}", *words]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["initialised"]["cut"] == {"params.embedding.embedding": [271, 271]}
    assert (
        record["initialised"]["fresh"] == ["params.head.bias", "params.head.kernel"]
        and record["initialised"]["taken"] > 5
    )
    other = labelled.with_name("other.jsonl")
    other.write_text(labelled.read_text().replace("cat", "cow").replace("mat", "mug"))
    assert main(["train", of("text").replace("rows", "other"), f"init={first}", *words]) == 2
    error = capsys.readouterr().err
    assert "270 subwords" in error and "give both the same tokens=" in error and "Traceback" not in error
