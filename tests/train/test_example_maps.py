"""Attention maps in the record of a run."""

import numpy as np
import pytest
from test_train import tiny

from xformers_lab.train import example_maps, loop

pytestmark = pytest.mark.usefixtures("whole_ends")


def test_a_small_run_has_maps_of_its_first_example(tmp_path):
    record = loop.run(tiny("copy", tmp_path, steps=1, eval_batches=1, position="rope"))
    kept = record["maps"]
    weights = np.array(kept["layers"])
    assert weights.shape == (1, 2, 16, 16) and kept["queries"] == 16 and not kept["implied"]
    assert not weights[..., ~np.tri(16, dtype=bool)].any()
    np.testing.assert_allclose(weights.sum(-1) / 255, 1, atol=0.05)
    assert kept["tokens"][0] == "0" and len(kept["tokens"]) == 16


@pytest.mark.full
def test_what_is_no_mean_of_values_leaves_the_run_as_it_is(tmp_path):
    record = loop.run(tiny("copy", tmp_path, steps=1, eval_batches=1, position="rope", attention="rwkv"))
    assert record["status"] == "ok" and set(record["maps"]) == {"reason"} and "no map" in record["maps"]["reason"]
    assert ".py" not in record["maps"]["reason"]  # it is no mistake of anybody's


@pytest.mark.full
def test_a_record_without_room_for_maps_says_why(tmp_path):
    record = loop.run(tiny("copy", tmp_path, steps=1, eval_batches=1, seq_len=example_maps.LONGEST + 2))
    assert record["maps"] == {"reason": example_maps.TOO_LARGE} and "64 tokens" in example_maps.TOO_LARGE


def test_only_small_maps_are_kept():
    assert example_maps.small(64, 2, 8) and not example_maps.small(64, 3, 8) and not example_maps.small(65, 1, 1)
