"""Long Range Arena: its published sizes as presets, and each known defect of its released pipeline as a test of ours.

The defects are those of google-research/long-range-arena at cd31e5c; numbers with # are its issues.
"""

import json
from typing import Any

import jax
import numpy as np
import pytest
from test_tasks import build, solve_pathfinder

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS
from xformers_lab.tasks.listops import TOKENS, decode, evaluate

# ---- presets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reviews(tmp_path):
    """Documents of 5,000 bytes and more, of two classes."""
    rows = [{"text": f"{number} " + "word " * 1000, "label": "good" if number % 2 else "bad"} for number in range(60)]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def squares(tmp_path):
    """Images of 32x32 pixels in ten classes, much of them black."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (120, 32, 32)) * (generator.random((120, 32, 32)) < 0.5)
    path = tmp_path / "squares.npz"
    np.savez(path, image=image.astype(np.uint8), label=np.arange(120) % 10)
    return path


@pytest.mark.parametrize("length", [2000, 2048])
def test_listops_in_published_sizes(length):
    batch = build("listops:preset=lra", length, 8).batch("train", 0)
    sizes = np.asarray(batch.valid).sum(1)
    assert batch.inputs.shape == (8, length) and sizes.min() >= 500 and sizes.max() <= 2000


def test_a_longer_sequence_only_pads():
    short, long = (build("listops:preset=lra", length, 4).batch("test", 1) for length in (2000, 2048))
    np.testing.assert_array_equal(np.pad(short.inputs, ((0, 0), (0, 48))), long.inputs)
    np.testing.assert_array_equal(short.targets, long.targets)


@pytest.mark.parametrize("length", [4000, 4096])
def test_text_in_published_sizes(reviews, length):
    batch = build(f"text:path={reviews}:preset=lra", length, 4).batch("train", 0)
    assert (np.asarray(batch.valid).sum(1) == 4000).all() and batch.inputs.shape == (4, length)


def test_pixels_in_published_sizes(squares):
    task = build(f"pixels:path={squares}:preset=lra", 1024, 4)
    assert (task.image, task.vocab, task.outputs) == ((32, 32), 256, 10)


@pytest.mark.parametrize("length, side", [(1024, 32), (4096, 64), (16384, 128), (65536, 256)])
def test_pathfinder_and_path_x_in_published_sizes(length, side):
    task = build("pathfinder:preset=lra", length, 2)
    assert task.image == (side, side) and task.describe()["dashes"] == 14
    batch = task.batch("test", 0)
    assert [solve_pathfinder(task, ids) for ids in batch.inputs] == batch.targets.tolist()


@pytest.mark.parametrize(
    "text, length, says",
    [
        ("listops:preset=lra", 1999, "such as seq_len=2048"),
        ("listops:preset=lra:max_depth=5", 2000, "which has max_depth=10: leave one of them out"),
        ("listops:preset=lra:max_length=1000", 2000, "which has max_length=2000"),
        ("listops:preset=published", 2000, "lra"),
        ("text:path={reviews}:preset=lra", 1024, "such as seq_len=4096"),
        ("text:path={reviews}:preset=lra:max_length=10", 4096, "which has max_length=4000"),
        ("text:path={reviews}:max_length=65", 64, "use 1 to 64"),
        ("pixels:path={squares}:preset=lra:shrink=2", 256, "which has shrink=1"),
        ("pathfinder:preset=lra", 256, "seq_len=1024, seq_len=4096, seq_len=16384"),
        ("pathfinder:preset=lra:dashes=6", 1024, "which has dashes=14"),
        ("pathfinder:dash=0", 1024, "use 1 or more of each"),
    ],
)
def test_what_does_not_fit_a_preset_is_refused(reviews, squares, text, length, says):
    with pytest.raises(UsageError, match=says):
        build(text.format(reviews=reviews, squares=squares), length)


def test_other_images_are_not_the_presets(tmp_path):
    np.savez(tmp_path / "x.npz", image=np.arange(120 * 16, dtype=np.uint8).reshape(-1, 4, 4), label=np.arange(120) % 10)
    with pytest.raises(UsageError, match="32x32 pixels in 10 classes"):
        build(f"pixels:path={tmp_path}:preset=lra", 16)


# ---- defects -----------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_no_set_in_any_order():
    """listops/input_pipeline.py makes it with list(set(...)), another order in every process: a model that was reloaded
    saw permuted tokens (#15, #60). That batches are the same in any process, test_tasks.py shows of every task."""
    assert list(TOKENS).index("[MIN") == 11 and len(set(TOKENS)) == len(TOKENS) == 16
    task = build("listops")
    assert task.decode(task.encode("[MAX 4 [MIN 2 9 ] 0 ]")) == "[MAX 4 [MIN 2 9 ] 0 ]"


def test_brackets_reach_the_model():
    """The released tokenizer dropped them, so that the value did not follow from what was read (#20)."""
    batch = build("listops:preset=lra", 2000, 4).batch("train", 2)
    closing = (batch.inputs == TOKENS.index("]")).sum(1)
    assert (closing == (batch.inputs >= TOKENS.index("[MIN")).sum(1) - closing).all() and closing.min() > 50


def test_nothing_is_cut_off_an_expression():
    """Lengths were counted without the parentheses that were written, so that texts ran past 2,000 and were cut off
    (#6, #14): here every row is a whole expression, whose value is its label."""
    batch = build("listops:preset=lra", 2000, 8).batch("validation", 0)
    assert [evaluate(decode(row)) for row in batch.inputs] == batch.targets.tolist()


def test_validation_is_not_the_test_split(tmp_path):
    """text_classification/input_pipeline.py takes IMDb's test data for validation, too."""
    for split, many in (("train", 100), ("test", 50)):
        rows = [{"text": f"{split} {number}", "label": number % 2} for number in range(many)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = build(f"text:path={tmp_path}")
    assert task.examples("test") == 50 and task.examples("train") + task.examples("validation") == 100
    seen = {split: {row.tobytes() for row in task.take(split, np.arange(task.examples(split))).inputs}
            for split in SPLITS}  # fmt: skip
    assert not seen["validation"] & seen["test"] and not seen["train"] & (seen["validation"] | seen["test"])


def test_black_pixels_are_no_padding(squares):
    """Its models take every token 0 for padding, `inputs > 0` in models/transformer/transformer.py, and so look at
    nothing of the black of an image and of a Pathfinder's background."""
    for task in (build(f"pixels:path={squares}", 1024), build("pathfinder", 256)):
        batch = task.batch("train", 0)
        assert (batch.inputs == 0).sum() > 100 and batch.valid is None


def test_every_held_out_example_is_scored(squares):
    """Its batches drop the remainder of validation and test (image/ and matching/input_pipeline.py)."""
    from xformers_lab.train import evaluation

    task = build(f"pixels:path={squares}", 1024, 7)
    sample = evaluation.sample(task, lambda batch: task, "test", "all", None, False)
    batches = [sample.batch(number) for number in range(sample.batches)]
    rows = [row.tobytes() for batch in batches for row in np.asarray(batch.inputs)[np.asarray(batch.counted)]]
    assert len(rows) == task.examples("test") % 7 + 7 * (task.examples("test") // 7) == len(set(rows)) > 0


@pytest.mark.parametrize("length", [1024, 16384])
def test_pictures_answer_what_is_asked(length):
    """A released copy of Path-X could not be learned by what solves the other sizes (#38), and empty files were passed
    over in silence. Ours are drawn: each is whole, with its label found by flood fill, and classes are equal."""
    task = build("pathfinder:preset=lra", length, 16 if length == 1024 else 4)
    for split in SPLITS:
        batch = task.batch(split, 5)
        assert (batch.inputs.sum(1) > 40).all()
        assert [solve_pathfinder(task, ids) for ids in batch.inputs] == batch.targets.tolist()


@pytest.mark.full
def test_an_encoder_is_not_causal():
    """Its Sparse Transformer masks the future in classification, where every token may see all others."""
    from xformers_lab import config as configs
    from xformers_lab.model import build_model, build_task

    config = configs.single(["task=parity", "model=encoder", "attention=strided", "seq_len=16", "layers=1", "dim=16",
                             "heads=2", "batch=1"])  # fmt: skip
    model: Any = build_model(config, build_task(config))
    inputs = np.zeros((1, 16), np.int32)
    x = model.embedding(inputs)
    first = lambda x: model.stack(x, _context(model))[0][0, 0].sum()
    assert np.abs(np.asarray(jax.grad(first)(x)))[0, 1:].max() > 0


def _context(model):
    from xformers_lab.depth import Context

    return Context(model.position, None, model.predict, tokens=None)
