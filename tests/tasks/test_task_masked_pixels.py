"""Masked pixels: what is hidden, of which images, and what a model of them hands on to one that classifies."""

import math

import numpy as np
import pytest

from xformers_lab import config, spec
from xformers_lab.errors import UsageError
from xformers_lab.model import build_task, check_config, kind_of
from xformers_lab.tasks import SPLITS, Setting
from xformers_lab.tasks.masked_pixels import MASK
from xformers_lab.train import initial, loop

ROWS, COLUMNS = 4, 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Levels from 0 to 9, in two classes."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, x=rng.integers(0, 10, (300, ROWS, COLUMNS), np.uint8), y=np.arange(300) % 2)
    return path


def build(text: str, batch: int = 16, seed: int = 0):
    return spec.build("task", text, Setting(ROWS * COLUMNS, batch, seed))


def test_the_images_are_those_of_pixels(images):
    """Batch by batch, and level by level, so that a model goes on from them to what it classifies."""
    hidden, labelled = build(f"masked_pixels:path={images}"), build(f"pixels:path={images}")
    assert hidden.vocab == labelled.vocab + 1 and hidden.image == labelled.image == (ROWS, COLUMNS)
    assert hidden.tokenizer == labelled.tokenizer
    for split in SPLITS:
        assert hidden.examples(split) == labelled.examples(split)
        for step in range(3):
            np.testing.assert_array_equal(hidden.batch(split, step).targets, labelled.batch(split, step).inputs)
        numbers = np.arange(5)
        np.testing.assert_array_equal(hidden.take(split, numbers).targets, labelled.take(split, numbers).inputs)


@pytest.mark.parametrize("rate, many", [(0.01, 1), (0.15, 4), (0.5, 12), (1, 24)])
def test_a_share_of_the_pixels_is_hidden_anew_at_every_step(images, rate, many):
    task, often = build(f"masked_pixels:path={images}:rate={rate}", batch=100), 0
    for step in range(20):
        batch = task.batch("train", step)
        chosen = batch.weights > 0
        np.testing.assert_array_equal(chosen.sum(1), many)
        np.testing.assert_array_equal(batch.inputs == MASK, chosen)
        np.testing.assert_array_equal(batch.inputs[~chosen], batch.targets[~chosen])
        assert batch.targets.max() < task.outputs
        often += batch.weights.mean(0) / 20
    np.testing.assert_allclose(often, many / 24, atol=0.06)


def test_an_evaluation_hides_the_same_whatever_batch_and_seed(images):
    first, other = build(f"masked_pixels:path={images}"), build(f"masked_pixels:path={images}", batch=3, seed=7)
    numbers = np.arange(12)
    whole = first.take("test", numbers)
    for group in np.split(numbers, 4):
        np.testing.assert_array_equal(other.take("test", group[::-1]).inputs, whole.inputs[group[::-1]])
    assert (first.take("test", numbers).weights != first.take("validation", numbers).weights).any()


def test_a_guess_by_how_often_levels_come(images):
    """Ten levels, each as often as the others: a little more than their entropy, since others might have come too."""
    task = build(f"masked_pixels:path={images}")
    assert task.chance == 8 and math.log2(10) < task.describe()["unigram"] < math.log2(10) + 0.1


def test_an_example_is_shown_with_what_is_hidden(images):
    task = build(f"masked_pixels:path={images}:rate=0.5")
    shown = task.show(task.take("test", np.array([0])))
    assert shown["input"].count("?") == 12 and "?" not in shown["answer"]
    assert [len(line) for line in shown["input"].splitlines()] == [COLUMNS] * ROWS


def test_a_classifier_begins_with_a_model_of_it(images, tmp_path):
    """All but the head is taken, and of the table of tokens the rows of the levels."""
    words = f"seq_len={ROWS * COLUMNS} dim=16 heads=2 layers=1 batch=8 steps=1 eval_batches=1 runs={tmp_path}".split()
    ((hidden,), _) = config.sweep([f"task=masked_pixels:path={images}", *words])
    assert kind_of(hidden, check_config(hidden)) == "encoder"
    loop.run(hidden)
    words += ["model=encoder", f"init={config.folder(hidden)}"]
    ((classes,), _) = config.sweep([f"task=pixels:path={images}", *words])
    matched = initial.match(classes, build_task(classes))
    assert list(matched.cut.values()) == [[256, 256]] and all(".head." in name for name in matched.fresh)


@pytest.mark.parametrize("options, says", [("rate=0", "above 0 and at most 1"), ("rate=2", "above 0 and at most 1")])
def test_options_that_cannot_be_are_one_clear_message(images, options, says):
    with pytest.raises(UsageError) as caught:
        build(f"masked_pixels:path={images}:{options}")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_images_are_read_from_disk():
    with pytest.raises(UsageError, match=r"path=\.\.\."):
        build("masked_pixels")
