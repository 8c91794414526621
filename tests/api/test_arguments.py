"""Words, keys, mappings and configs say the same; what is wrong is said as on the command line."""

import numpy as np
import pytest

from xformers_lab import config as configs
from xformers_lab.api.arguments import items
from xformers_lab.config import Config, Study, edit
from xformers_lab.errors import UsageError

WORDS = ["task=copy", "attention=full,local:window=64", "seq_len=32,64", "seeds=2", "tune=lr,weight_decay", "dim=16"]


def study(*what, **keys):
    return configs.study(items(what, keys))


@pytest.mark.parametrize(
    "given",
    [
        [{"task": "copy", "attention": ["full", "local:window=64"], "seq_len": (32, 64), "dim": 16}],
        [{"task": "copy", "model": {"attention": "full,local:window=64", "dim": 16}, "seq_len": "32..64:x2"}],
        ["task=copy", {"attention": ["full", "local:window=64"]}, "seq_len=32,64", {"model.dim": 16}],
        [edit(Config(), task="copy", dim=16), {"attention": ["full", "local:window=64"], "seq_len": range(32, 96, 32)}],
        ["task=sort", "attention=full,local:window=64", {"seq_len": np.array([32, 64])}, {"task": "copy", "dim": 16}],
    ],
)
def test_whatever_they_are_said_in_they_are_the_same(given):
    expected = configs.study(WORDS)
    assert expected[2] == Study(tune="lr,weight_decay", seeds=2) and len(expected[0]) == 8
    got = study(*given, seeds=2, tune=["lr", "weight_decay"])
    assert set(got[0]) == set(expected[0]) and got[1:] == expected[1:]
    again = configs.study(configs.spelled(items(given, {"seeds": 2, "tune": ["lr", "weight_decay"]})))
    assert set(again[0]) == set(got[0]) and again[1:] == got[1:]


def test_a_list_of_configs_is_a_recipe():
    grid, varied, _ = study([Config(task="copy"), {"task": "copy", "attention": "linear"}], dim=16, seq_len=[16, 32])
    assert [(one.model.attention, one.seq_len, one.model.dim) for one in grid] == [
        ("full", 16, 16),
        ("full", 32, 16),
        ("linear", 16, 16),
        ("linear", 32, 16),
    ]
    assert varied == ["seq_len", "attention"]


def test_a_config_behind_words_wins_with_all_its_keys():
    words = configs.spelled(["task=copy", "dim=16", Config(seq_len=128)])
    assert configs.single(words) == Config(seq_len=128)
    assert configs.spelled([Config(seq_len=128)]) == ["seq_len=128"]


def test_text_with_a_comma_is_one_value_where_it_stands_in_a_list(tmp_path):
    (tmp_path / "a,b.txt").write_text("some text " * 100)
    path = f"lm:path={tmp_path}/a,b.txt"
    (config,), _, _ = study(task=[path])
    again = configs.single(configs.spelled(items((), {"task": [path]})))
    assert config.task == path and configs.identity(again) == configs.identity(config)


@pytest.mark.parametrize(
    ("what", "keys", "message"),
    [
        ((), {"attention": "ful"}, 'no attention "ful": did you mean "full"'),
        ((), {"atention": "full"}, 'unknown key "atention": did you mean "attention"'),
        ((), {"seq_len": "long"}, "seq_len wants a whole number|seq_len=long wants a whole number"),
        ((), {"seq_len": []}, '"seq_len" is an empty list'),
        ((), {"seeds": 2, "seed": 0}, "both say which seeds"),
        (("task=copy",), {"steps": 0}, "steps must be at least 1"),
        (("full",), {}, '"full" is not key=value or @file'),
        ((3,), {}, "3 is a int, not a word"),
        ((Study,), {}, "a class of your own is a value: attention=Study"),
        (([3],), {}, "3 is a int"),
    ],
)
def test_what_is_wrong_is_one_message(what, keys, message):
    with pytest.raises(UsageError, match=message):
        study(*what, **keys)
