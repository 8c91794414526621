"""The task translate: what a model is given and asked, from files as they are, and a sentence translated."""

import gzip
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.tasks import SPLITS, Setting
from xformers_lab.tasks.translate import BEGIN, BLANK, END


def build(text: str, length: int = 40, batch: int = 4):
    return spec.build("task", f"translate:{text}", Setting(length, batch))


def write(folder, pairs: dict[str, list[tuple[str, str]]]):
    for split, sentences in pairs.items():
        for language, side in (("de", 0), ("en", 1)):
            text = "".join(f"{pair[side]}\n" for pair in sentences)
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


PAIRS = {
    "train": [(f"Hund {n}", f"dog {n}") for n in range(50)] + [("Über", "over"), ("x" * 30, "y"), ("y", "x" * 30)],
    "val": [(f"Katze {n}", f"cat {n}") for n in range(9)],
    "test_2016": [(f"Haus {n}", f"house {n}") for n in range(8)] + [("Hund 7", "dog 7")],
    "test_2017": [("Baum", "tree")],
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs"), PAIRS)


def test_a_sequence_is_source_and_translation(folder):
    task, examples = build(f"path={folder}"), {}
    for split in SPLITS:
        for step in range(20):
            batch = task.batch(split, step)
            for inputs, targets, weights in zip(batch.inputs, batch.targets, batch.weights, strict=True):
                assert inputs[20] == BEGIN
                source, target = inputs[:20], targets[weights > 0]
                assert target[-1] == END and (weights[:20] == 0).all() and (inputs[21:][weights[21:] == 0] <= END).all()
                assert (inputs[1:] == targets[:-1]).all()
                examples.setdefault(split, set()).add((task.decode(source.tolist()), task.decode(target.tolist())))
                # The target is a run that begins at BEGIN.
                assert np.nonzero(weights)[0].tolist() == list(range(20, 20 + len(target)))
    fitting = lambda pairs: {pair for pair in pairs if max(map(len, pair)) < 20}
    assert examples["train"] == fitting(PAIRS["train"]) - {("Hund 7", "dog 7")}
    assert examples["validation"] == set(PAIRS["val"])
    assert examples["test"] == set(PAIRS["test_2016"] + PAIRS["test_2017"])


def test_it_says_what_was_left_out(folder):
    description = build(f"path={folder}").describe()
    assert (description["train_pairs"], description["validation_pairs"], description["test_pairs"]) == (50, 9, 10)
    assert (description["too_long"], description["copies_dropped"], description["languages"]) == (2, 1, "de-en")
    turned = build(f"path={folder}:source=en:target=de")
    source = turned.batch("test", 0).inputs[0, :20]
    assert turned.decode(source.tolist()).split()[0] in ("house", "dog", "tree")


def test_subwords_of_both_languages(folder):
    """The same pairs in fewer tokens, scored by the same bytes."""
    plain, task = build(f"path={folder}"), build(f"path={folder}:tokens=bpe:vocab=270")
    assert task.vocab == task.outputs == 273
    spelled = set(task.tokens.spelled)
    assert b"Hund" in spelled and b"dog" in spelled and not any(b"tree" in token for token in spelled)
    pairs = {}
    for name, one in (("plain", plain), ("task", task)):
        batch = one.take("test", np.arange(one.examples("test")))
        nats, covered = one.metric(jnp.zeros((*batch.targets.shape, one.outputs)), batch)
        assert one.finish(float(nats) / float(covered)) == pytest.approx(one.chance, rel=1e-5)
        texts = [one.decode(row[weight > 0].tolist()) for row, weight in zip(batch.targets, batch.weights, strict=True)]
        assert float(covered) == sum(len(text.encode()) + 1 for text in texts)
        pairs[name] = [(one.decode(row[:20].tolist()), text) for row, text in zip(batch.inputs, texts, strict=True)]
    assert pairs["plain"] == pairs["task"] and plain.chance == pytest.approx(np.log2(259))
    assert (plain.describe()["too_long"], task.describe()["too_long"]) == (2, 0), "x 30 times is a few subwords"
    prompt = task.encode("Hund 3")
    assert len(prompt) == 21 and prompt[-1] == BEGIN and task.decode(prompt) == "Hund 3" and prompt.count(BLANK) > 16
    assert "bytes per token of the training split" in task.reading()[-1]


def test_subwords_let_longer_pairs_fit(tmp_path):
    pairs = {split: [(f"{'und ' * 9}{split} {n}", f"{'and ' * 9}{n}") for n in range(20)] for split in PAIRS}
    write(tmp_path, pairs)
    with pytest.raises(UsageError, match="at most 20 bytes and a translation of at most 19"):
        build(f"path={tmp_path}")
    assert build(f"path={tmp_path}:tokens=bpe:vocab=300").describe()["too_long"] == 0


def test_what_is_generated_is_scored_by_sacrebleu(folder):
    import sacrebleu

    task = build(f"path={folder}", length=60)
    numbers = np.array([3, 0, 5])
    batch = task.take("test", numbers)
    wanted = [task.decode(row[weight > 0].tolist()) for row, weight in zip(batch.targets, batch.weights, strict=True)]
    asked = []

    def produce(prompts, new):
        asked.append((prompts, new))
        return [[*task.encode(text)[: len(text)], END] for text in ("house 3 is far away", wanted[1], "no")]

    scores = task.generated("test", numbers, produce)
    said = ["house 3 is far away", wanted[1], "no"]
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score, abs=1e-4)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score, abs=1e-4)
    assert 0 < scores["chrf"] < 100 and "tok:13a" in scores["bleu_signature"] and "nc:6" in scores["chrf_signature"]
    [(prompts, new)] = asked
    assert prompts == batch.inputs[:, :31].tolist() and new == 29
    answers = [row[weight > 0].tolist() for row, weight in zip(batch.targets, batch.weights, strict=True)]
    assert task.generated("test", numbers, lambda prompts, new: answers)["chrf"] == 100


def test_without_sacrebleu_it_says_what_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(UsageError, match=r"pip install 'xformers_lab\[text\]'"):
        build(f"path={folder}").generated("test", np.arange(2), lambda prompts, new: prompts)


def test_columns_of_a_table(tmp_path):
    rows = [{"de": f"Hund {n}", "en": f"dog {n}"} for n in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = build(f"path={tmp_path / 'pairs.jsonl'}").describe()
    assert sum(counts[f"{split}_pairs"] for split in SPLITS) == 100 and counts["test_pairs"] > 0
    with pytest.raises(UsageError, match="source=fr: no such column"):
        build(f"path={tmp_path / 'pairs.jsonl'}:source=fr")


def test_a_name_that_two_folders_have_is_no_quiet_choice(tmp_path):
    for folder in ("news", "talks"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, {"train": [(f"{folder} {n}", f"{n}") for n in range(20)]})
    with pytest.raises(UsageError, match="have the same name"):
        build(f"path={tmp_path}")


def test_what_cannot_be_read_is_one_message(tmp_path):
    (tmp_path / "train.de").write_text("eins\nzwei\n")
    with pytest.raises(UsageError, match="no pair of files"):
        build(f"path={tmp_path}")
    (tmp_path / "train.en").write_text("one\n")
    with pytest.raises(UsageError, match=r"2 lines and .* 1: they must be pairs"):
        build(f"path={tmp_path}")
    (tmp_path / "train.en").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="use a larger seq_len"):
        build(f"path={tmp_path}", length=6)


@pytest.mark.full
@pytest.mark.parametrize("model", ["encoder_decoder", "seq2seq:look=dot"])
def test_blanks_are_not_looked_at(folder, model):
    """A sentence that blanks fill up gives what it gives to a model that reads no more than this sentence."""
    config = edit(Config(), task=f"translate:path={folder}", model=model, seq_len=40, dim=16, heads=2, layers=1)
    task = build_task(config)
    built, inputs = build_model(config, task), task.batch("test", 0).inputs
    row = next(row for row in inputs if (row[:20] == BLANK).any())
    length = int((row[:20] != BLANK).sum())
    filled = built(jnp.asarray(row[None]))[0][:, 20:]
    built.source = length
    alone = built(jnp.asarray(np.concatenate([row[:length], row[20:]])[None]))[0][:, length:]
    np.testing.assert_allclose(filled, alone, atol=1e-5)


@pytest.mark.full
def test_a_sentence_is_translated_from_the_command_line(folder, tmp_path, capsys):
    """The model learns ten translations by heart, and its answer ends by itself."""
    known, held = ([(f"{de} {n}", f"{en} {n}") for n in range(10)] for de, en in (("Hund", "dog"), ("Katze", "cat")))
    write(tmp_path, {"train": known, "val": held[:5], "test": held[5:]})
    words = [f"task=translate:path={tmp_path}", f"runs={tmp_path / 'runs'}", "seq_len=20", "dim=32", "layers=1"]
    words += ["heads=2", "batch=10", "steps=200", "warmup=0.1", "lr=0.01", "eval_batches=1", "attention=full"]
    assert main(["train", *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(["generate", record["run_dir"], "--prompt", "Hund 4", "--new", "9"]) == 0
    assert capsys.readouterr().out.splitlines() == ["Hund 4", "dog 4"]
    prompts = [word for one in ("Hund 4", "Hund 17", "Hund 9") for word in ("--prompt", one)]
    assert main(["generate", record["run_dir"], *prompts, "--new", "9", "--temperature", "0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in rows][::2] == ["dog 4", "dog 9"]
    assert main(["generate", record["run_dir"], "--prompt", "Hund 4 Hund 5", "--new", "9"]) == 2
    assert "a sentence of 13 bytes, but the model reads 10" in capsys.readouterr().err
    # What it knows by heart it translates, greedily or by a search; of the others it knows nothing.
    for beams, split in (("1", "train"), ("3", "train"), ("1", "test")):
        words = ["eval", record["run_dir"], "--split", split, "--beams", beams, "--texts", "7", "--json"]
        assert main(words) == 0
        scores = json.loads(capsys.readouterr().out)["generated"]
        assert (scores["examples"], scores["beams"]) == (7 if split == "train" else 5, int(beams))
        assert (scores["chrf"] == 100) == (split == "train") and "nrefs:1" in scores["bleu_signature"]
    assert main(["eval", record["run_dir"], "--texts", "7"]) == 2
    assert "give --beams" in capsys.readouterr().err
    assert main(["eval", record["run_dir"], "--beams", "0"]) == 2
    assert "beams=0: at least 1" in capsys.readouterr().err


def test_multi30k(shared):
    path = shared / "data" / "multi30k"
    if not path.is_dir():
        pytest.skip("no multi30k here")
    task = build(f"path={path}", length=200, batch=8)
    counts = task.describe()
    assert counts["train_pairs"] > 20_000 and counts["validation_pairs"] > 800 and counts["test_pairs"] > 1600
    tokens = task.batch("train", 0).inputs
    assert (tokens[:, 100] == BEGIN).all() and (tokens[:, 99] == BLANK).any()
