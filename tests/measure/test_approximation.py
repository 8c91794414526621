"""The error of a mechanism beside softmax attention on the same heads."""

import pytest

from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.measure import approximation

TINY = edit(Config(), seq_len=32, dim=16, heads=2, batch=2)


def error(attention, scale=1.0, **keys):
    return approximation.error(edit(TINY, attention=attention, **keys), scale)


def test_what_is_softmax_attention_has_none():
    assert error("full") == 0
    assert error("local:window=32") < 1e-6  # a window of all keys, computed in blocks


def test_what_approximates_it_has_some():
    assert error("performer:features=256", 0.3) < 0.5 * error("performer:features=4", 0.3)
    assert error("performer:features=256", 0.3) < 0.5 * error("performer:features=256", 1.5)


def test_it_is_a_function_of_the_seeds():
    assert error("performer") == error("performer") != error("performer", init_seed=1)
    assert error("performer") != error("performer", data_seed=1)


@pytest.mark.parametrize("attention", ["gla", "fnet"])
def test_what_has_no_keys_to_share_is_refused(attention):
    with pytest.raises(UsageError, match=attention):
        error(attention)


def test_from_the_command_line(capsys):
    words = ["attention=full,local:window=4", "seq_len=32", "dim=16", "batch=2"]
    assert main(["error", *words, "--scale", "0.5,1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["error", *words, "--scale", "0"]) == 2
    assert "above 0" in capsys.readouterr().err
    assert main(["error", *words, "--scale", "x"]) == 2
    assert "--scale" in capsys.readouterr().err
