"""Packed rows in whole models: no document is told of another, and each is what it is alone."""

import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, check_config
from xformers_lab.nn.documents import places
from xformers_lab.nn.plan import Plan
from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.train.state import merge
from xformers_lab.train.state import split as parts
from xformers_lab.train.step import run as run_model

SIZES = {"seq_len": 24, "dim": 16, "heads": 2, "layers": 2, "batch": 2}
LENGTHS = np.array([[9, 4, 8], [3, 14, 5]])
QUICK = ("full", "local:window=5", "topk:keys=4")
KEEPING = [name for name in spec.names("attention") if spec.entry("attention", name).accepts("documents")]


class Packed(Task):
    """Rows of three documents of random tokens."""

    vocab, outputs, chance, packed = 11, 11, 1 / 11, True

    def batch(self, split: Split, step: int) -> Batch:
        random, shape = np.random.default_rng(step), (len(LENGTHS), SIZES["seq_len"])
        tokens, targets = random.integers(1, 11, (2, *shape)).astype(np.int32)
        documents = np.stack([np.searchsorted(np.cumsum(of_row), np.arange(shape[1]), "right") for of_row in LENGTHS])
        valid = documents < LENGTHS.shape[1]
        return Batch(tokens, targets, valid.astype(np.float32), valid, documents=documents.astype(np.int32))


def built(**words):
    task = Packed(Setting(SIZES["seq_len"], SIZES["batch"]))
    model = build_model(edit(Config(), **(SIZES | {"model": "decoder"} | words)), task, Plan())
    graph, *variables = parts(model)
    run = jax.jit(lambda variables, batch: run_model(merge(graph, *variables), batch)[0])
    return task, functools.partial(run, variables)


def changed(batch: Batch, document: int, filler: int = 0) -> Batch:
    """The batch with other tokens in every document but one."""
    own = batch.documents == document
    return Batch(
        np.where(own, batch.inputs, filler).astype(np.int32),
        batch.targets,
        batch.weights,
        batch.valid,
        documents=batch.documents,
    )


def alone(batch: Batch) -> tuple[Batch, np.ndarray]:
    """Every document in a row of its own, and which rows and places they had, (documents, T) each."""
    documents, T = np.asarray(batch.documents), SIZES["seq_len"]
    rows = [(row, document) for row in range(len(documents)) for document in range(LENGTHS.shape[1])]
    at = [(row, np.flatnonzero(documents[row] == document)) for row, document in rows]
    place = lambda array: np.stack([np.pad(array[row, where], (0, T - len(where))) for row, where in at])
    inputs, targets, weights, valid = (
        place(np.asarray(x)) for x in (batch.inputs, batch.targets, batch.weights, batch.valid)
    )
    return Batch(inputs, targets, weights, valid), np.array([(row, where[0], len(where)) for row, where in at])


def few(names: list[str]) -> list[tuple]:
    """(names, marks) of parameters: every third is one of CI's."""
    return [(one.values, one.marks) for one in kinds.every_third(names)]


@pytest.mark.parametrize("words", [
    *({"attention": name, "position": "none"} for name in QUICK),
    {"conv": 4, "qk_norm": "rms", "position": "none"},
    pytest.param({"position": "rope+none"}, marks=pytest.mark.full),
    pytest.param({"attention": "full+local:window=5", "log_n": 8}, marks=pytest.mark.full),
    pytest.param({"value_residual": "learned", "layers": 3}, marks=pytest.mark.full),
    pytest.param({"conv": 3, "qk_norm": "l2", "attention": "topk:keys=4"}, marks=pytest.mark.full),
    *(
        pytest.param({"attention": name, "position": "rope"}, marks=[pytest.mark.full, *marks])
        for (name,), marks in few(KEEPING)
    ),
    *(
        pytest.param({"position": name}, marks=[pytest.mark.full, *marks])
        for (name,), marks in few([name for name in spec.names("position") if name not in ("conv", "tupe")])
    ),
    *(
        pytest.param({"depth": name, "layers": 3, "norm": "pre"}, marks=[pytest.mark.full, *marks])
        for (name,), marks in few([name for name in spec.names("depth") if spec.entry("depth", name).documents_apart])
    ),
    *(
        pytest.param({"ffn": name}, marks=pytest.mark.full)
        for name in ("none", "glu", "hash", "product_key", "all_attention")
    ),
    *(
        pytest.param({"attention": f"{name}+full", "layers": 4}, marks=pytest.mark.full)
        for name in ("realformer", "lazyformer")
    ),
    pytest.param({"depth": "universal:act=true", "position": "sinusoidal"}, marks=pytest.mark.full),
], ids=lambda words: " ".join(f"{key}={value}" for key, value in words.items()))  # fmt: skip
def test_no_document_is_told_of_the_others(words):
    task, run = built(**words)
    batch = task.batch("train", 0)
    before = np.asarray(run(batch))
    for document in range(LENGTHS.shape[1]):
        after = np.asarray(run(changed(batch, document)))
        own = batch.documents == document
        np.testing.assert_allclose(after[own], before[own], rtol=1e-5, atol=1e-5)
        assert np.abs(after - before)[~own & np.asarray(batch.valid)].max() > 1e-3


# Scores of distances, and positions that begin anew.
@pytest.mark.parametrize("words", [
    {"position": "learned"},
    {"position": "rope", "conv": 4, "qk_norm": "rms"},
    pytest.param({"attention": "full+local:window=5", "position": "none", "log_n": "learned"}, marks=pytest.mark.full),
    *(
        pytest.param({"position": name}, marks=[pytest.mark.full, *marks])
        for (name,), marks in few(["none", "sinusoidal", "rope", "alibi", "t5", "xl", "shaw", "deberta", "randomized"])
    ),
    *(
        pytest.param({"attention": name, "position": "learned"}, marks=[pytest.mark.full, *marks])
        for (name,), marks in few(["local:window=5", "softcap", "differential:lambda_init=0.3", "mla", "collaborative"])
    ),
    pytest.param({"depth": "universal", "position": "sinusoidal"}, marks=pytest.mark.full),
    pytest.param({"depth": "reversible", "position": "sinusoidal", "layers": 3}, marks=pytest.mark.full),
], ids=lambda words: " ".join(f"{key}={value}" for key, value in words.items()))  # fmt: skip
def test_a_packed_document_is_what_it_is_alone(words):
    task, run = built(**words)
    batch = task.batch("train", 0)
    apart, at = alone(batch)
    packed, single = np.asarray(run(batch)), np.asarray(run(apart))
    for document, (row, first, count) in enumerate(at):
        together = packed[row, first : first + count]
        np.testing.assert_allclose(together, single[document, :count], rtol=2e-4, atol=2e-5)
    (loss, weight), (expected, of) = (task.loss(jnp.asarray(x), b) for x, b in ((packed, batch), (single, apart)))
    assert float(weight) == float(of) == LENGTHS.sum()
    np.testing.assert_allclose(float(loss), float(expected), rtol=1e-5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 6), ("valid", 3), ("test", 3)):
        (folder / split).mkdir()
        for number in range(count):
            (folder / split / f"{number}.txt").write_text(f"{split} {number} " * (number + 2))
    return f"lm:path={folder}:packed=true"


@pytest.mark.parametrize("words, says", [
    ({"attention": "linear"}, "linear cannot keep the documents of packed data apart: its sums are over all"),
    ({"attention": "full+fnet", "layers": 2, "model": "decoder"}, "fnet"),
    ({"attention": "retnet"}, "its state passes from one document to the next"),
    ({"position": "conv"}, "position=conv cannot keep .* it looks at the tokens before"),
    ({"position": "tupe"}, "do not begin anew with each document"),
    ({"depth": "hourglass", "layers": 3}, "depth=hourglass cannot"),
    ({"depth": "mixture_of_depths"}, "depth=mixture_of_depths cannot"),
    ({"memory": "xl", "position": "xl"}, "use task=lm without stride= or packed="),
    ({"ffn": "moe"}, "ffn=moe cannot"),
    ({"depth": "macaron", "ffn": "moe"}, "ffn=moe cannot"),
    ({"norm": "pre:normaliser=powernorm"}, "norm=pre:normaliser=powernorm cannot keep .* statistics"),
    ({"model": "lstm"}, "model=lstm cannot keep"),
    ({"model": "bytenet"}, "model=bytenet cannot keep"),
    ({"model": "bag"}, "model=bag cannot keep"),
])  # fmt: skip
def test_what_mixes_documents_refuses_them_before_anything_compiles(corpus, words, says):
    with pytest.raises(UsageError, match=says) as error:
        check_config(edit(Config(), **(SIZES | {"task": corpus} | words)))
    assert "\n" not in str(error.value)


def test_positions_begin_anew_with_each_document():
    documents = jnp.array([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1]])
    assert places(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]]


def test_compare_refuses_with_one_message_before_it_trains(corpus, capsys, tmp_path, inline):
    words = [f"{key}={value}" for key, value in SIZES.items()]
    assert main(["compare", f"task={corpus}", "attention=full,linear", f"runs={tmp_path}", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("linear cannot keep the documents of packed data apart") == 1 and "Traceback" not in err
    assert not list(tmp_path.glob("*/result.json"))
