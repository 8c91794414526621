"""What a model generates for examples of a split, and what its task counts of it."""

import numpy as np
import pytest

from xformers_lab import generate
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.train import generated


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for name, count in (("train", 20), ("valid", 4), ("test", 5)):
        for language, word in (("de", "Hund"), ("en", "dog")):
            (folder / f"{name}.{language}").write_text("".join(f"{word} {name[0]}{n}\n" for n in range(count)))
    return folder


def made(folder, model: str):
    config = edit(
        Config(), task=f"translate:path={folder}", seq_len=20, model=model, dim=16, heads=2, layers=1, batch=2
    )
    task = build_task(config)
    return config, task, build_model(config, task)


@pytest.mark.parametrize("model", [pytest.param("encoder_decoder", marks=pytest.mark.full), "decoder"])
def test_each_example_gets_what_generating_gives_it(folder, model, monkeypatch):
    """The shuffled order's first examples, each with its own prompt, however many are generated side by side."""
    config, task, built = made(folder, model)
    monkeypatch.setattr(generated, "_TOGETHER", 2)
    said = {}

    def counted(split, numbers, produce):
        said[split] = numbers, produce(task.take(split, numbers).inputs[:, :11].tolist(), 6)
        return {"known": 1}

    monkeypatch.setattr(task, "generated", counted)
    scores = generated.scores(config, task, built, "test", 1, 3)
    assert scores == {"beams": 1, "examples": 3, "examples_of": 5, "known": 1}
    numbers, texts = said["test"]
    np.testing.assert_array_equal(numbers, np.random.Generator(np.random.PCG64(0)).permutation(5)[:3])
    prompts = task.take("test", numbers).inputs[:, :11].tolist()
    heads, sources = generate.apart(built, prompts, begin=task.begin)
    for row, text in enumerate(texts):
        alone = {"sources": [sources[row]] if sources else None, "new": 6, "length": 20, "stop": task.stop}
        assert text == generate.generate(built, [heads[row]], **alone)[0]
    assert generated.scores(config, task, built, "test", 1, 999)["examples"] == 5


@pytest.mark.full
def test_a_search_is_that_of_beam_search(folder):
    config, task, built = made(folder, "encoder_decoder")
    texts = []
    scores = generated.scores(config, task, built, "validation", 2, 2)
    numbers = np.random.Generator(np.random.PCG64(0)).permutation(4)[:2]
    heads, sources = generate.apart(built, task.take("validation", numbers).inputs[:, :11].tolist(), begin=task.begin)
    for head, source in zip(heads, sources, strict=True):
        texts += [generate.beam_search(built, head, source=source, beams=2, new=9, length=20, stop=task.stop)[0]]
    assert scores | task.generated("validation", numbers, lambda prompts, new: texts) == scores


def test_what_cannot_be_generated_is_one_clear_message(folder):
    task = build_task(edit(Config(), task=f"translate:path={folder}", seq_len=20))
    with pytest.raises(UsageError, match="beams=0: at least 1"):
        generated.check(task, 0, 1)
    with pytest.raises(UsageError, match="texts=0: at least 1"):
        generated.check(task, 1, 0)
    with pytest.raises(UsageError, match="task copy scores no generated texts"):
        generated.check(build_task(edit(Config(), task="copy", seq_len=20)), 2, 1)
