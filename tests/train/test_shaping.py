"""What label smoothing and the z-loss add: by definition, to the training loss alone."""

import numpy as np
import pytest
from test_train import TASK, tiny

from xformers_lab import config as configs
from xformers_lab.config import Config, edit, identity
from xformers_lab.errors import UsageError
from xformers_lab.model import check_config
from xformers_lab.tasks import Batch, Setting, Task
from xformers_lab.train import loop, records, shaping


def test_it_is_cross_entropy_with_smoothed_targets():
    rng = np.random.default_rng(0)
    logits, targets = 3 * rng.normal(size=(2, 5, 7)).astype(np.float32), rng.integers(0, 7, (2, 5))
    batch = Batch(targets, targets, rng.random((2, 5)).astype(np.float32))
    task, weights = Task(Setting(5, 2)), np.asarray(batch.weights)
    size = np.log(np.exp(logits).sum(-1))
    wanted = 0.8 * np.eye(7)[targets] + 0.2 / 7
    smoothed = (wanted * (size[..., None] - logits)).sum(-1)
    for words, expected in (
        ({"label_smoothing": 0.2}, smoothed),
        ({"label_smoothing": 0.2, "z_loss": 0.5}, smoothed + 0.5 * size**2),
    ):
        shape = shaping.of(edit(Config(), **words).train)
        assert shape is not None
        total = task.loss(logits, batch)[0] + shape(logits, batch)  # type: ignore[arg-type]
        np.testing.assert_allclose(total, (expected * weights).sum(), rtol=1e-5)
    assert shaping.of(Config().train) is None


@pytest.mark.full
def test_reported_is_the_task_s_loss(tmp_path):
    """Of the first step, whose parameters are the same; what is minimised is more, and is followed."""
    path = tmp_path / "uneven.py"
    path.write_text(TASK)
    first = {}
    for words in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        config = tiny(str(path), tmp_path, steps=2, eval_batches=1, warmup=0, **words)
        loop.run(config)
        first[bool(words)] = records.read(configs.folder(config))
    plain, shaped = first[False], first[True]
    assert shaped[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6) and "total" not in plain[0]
    assert shaped[0]["total"] > shaped[0]["loss"] and shaped[0]["grad_norm"] != plain[0]["grad_norm"]
    assert shaped[1]["loss"] != plain[1]["loss"]


def test_ids_stay_and_other_losses_are_refused(tmp_path):
    assert identity(edit(Config(), label_smoothing=0, z_loss=0)) == identity(Config())
    assert identity(edit(Config(), z_loss=1e-4)) != identity(Config())
    path = tmp_path / "uneven.py"
    path.write_text(f"{TASK}\n    def loss(self, logits, batch):\n        return super().loss(logits, batch)\n")
    with pytest.raises(UsageError, match=r"z_loss=0\.0001: task .*uneven\.py has a loss that is no cross-entropy"):
        check_config(tiny(str(path), z_loss=1e-4))
    check_config(tiny(str(path)))
