"""A model takes the arrays that a task gives, numpy's, and jax's alike."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.model import build_model, build_task

TASKS = {"encoder": "listops", "bag": "listops"}


@pytest.mark.full
@pytest.mark.parametrize("kind", [name for name in spec.names("model") if name != "vit"])  # vit needs files
def test_numpy_arrays_are_taken(kind):
    task = TASKS.get(kind, "copy")
    config = edit(Config(), task=task, model=kind, dim=16, heads=2, seq_len=16, layers=1, batch=2)
    task = build_task(config)
    model: Any = build_model(config, task)
    inputs = np.asarray(task.batch("train", 0).inputs)
    valid = np.arange(inputs.shape[1]) < np.array([[inputs.shape[1]], [inputs.shape[1] - 1]])
    out, expected = model(inputs, valid=valid)[0], model(jnp.asarray(inputs), valid=jnp.asarray(valid))[0]
    np.testing.assert_array_equal(out, expected)
