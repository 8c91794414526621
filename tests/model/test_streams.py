"""Parameters, data and dropout are drawn from seeds of their own, where a config has them."""

import jax
import numpy as np
import pytest
from flax import nnx

from xformers_lab.config import Config, decisive, edit, identity, sweep
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task

SMALL = {"task": "copy", "seq_len": 9, "dim": 8, "layers": 1, "batch": 4}


def drawn(**changes) -> tuple[bytes, bytes]:
    """The parameters and the first batch of a config."""
    config = edit(Config(), **SMALL, **changes)
    task = build_task(config)
    params = jax.tree.leaves(nnx.state(build_model(config, task), nnx.Param))
    return b"".join(np.asarray(leaf).tobytes() for leaf in params), np.asarray(task.batch("train", 0).inputs).tobytes()


def test_each_stream_has_its_seed():
    of = {seed: drawn(seed=seed) for seed in (0, 1)}
    assert of[0][0] != of[1][0] and of[0][1] != of[1][1]
    assert drawn(seed=0, init_seed=1) == (of[1][0], of[0][1])
    assert drawn(seed=0, data_seed=1) == (of[0][0], of[1][1])
    assert drawn(seed=5, init_seed=0, data_seed=1) == (of[0][0], of[1][1])
    assert drawn(seed=1, init_seed=0, data_seed=0) == of[0]


def test_seeds_that_are_equal_are_the_same_run():
    config = edit(Config(), seed=3)
    same = [
        edit(config, **changes) for changes in ({"init_seed": 3}, {"data_seed": 3}, {"init_seed": 3, "data_seed": 3})
    ]
    assert {identity(each) for each in same} == {identity(config)}
    others = [{"init_seed": 0}, {"data_seed": 0}, {"init_seed": 0, "data_seed": 0}, {"seed": 0, "data_seed": 3}]
    others.append({"seed": 0, "init_seed": 3, "data_seed": 3})  # dropout is drawn from seed
    assert len({identity(edit(config, **changes)) for changes in [{}, *others]}) == 1 + len(others)
    assert decisive(edit(config, data_seed=0))["data_seed"] == 0


def test_seeds_are_typed_and_swept():
    assert [config.data_seed for config in sweep(["data_seed=0..2"])[0]] == [0, 1, 2]
    assert edit(Config(), init_seed="none").init_seed is None
    for wrong in (-1, 2**32, "x"):
        with pytest.raises(UsageError, match="init_seed"):
            edit(Config(), init_seed=wrong)
