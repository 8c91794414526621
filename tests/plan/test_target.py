"""What a plan is for: words that name it, messages for those that do not, published figures."""

import importlib.util

import pytest

from xformers_lab.cli import main
from xformers_lab.doctor import peaks
from xformers_lab.errors import UsageError
from xformers_lab.plan import exceeded, roofline, target
from xformers_lab.plan.target import Target, targets


@pytest.fixture
def libtpu(monkeypatch):
    """As if libtpu were installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_words_name_targets(libtpu):
    assert targets(["v5e:2x2", "v3:2x2"], ["tpu"]) == [
        Target("tpu", "v5e:2x2", 4, "TPU v5 lite"),
        Target("tpu", "v3:2x2", 8, "TPU v3"),
    ]
    (cpu, gpu) = targets([], ["cpu", "gpu:8"])
    assert cpu.devices("fsdp:2+tensor:2") == 4 and cpu.devices("data") == 1 and gpu.devices("data") == 8
    assert cpu.peaks is None and gpu.peaks is None


@pytest.mark.parametrize(
    "topologies, platforms, said",
    [
        ([], [], "plan for what"),
        (["v5r:2x2"], [], 'did you mean "v5'),
        (["v5e"], [], "topology=v5e:2x2"),
        (["v5e:2x"], [], "topology=v5e:2x2"),
        (["v5e:99999x99999"], [], "at most"),
        (["v5e:2x2"], ["cpu:4"], "leave one out"),
        ([], ["tpu"], "say which one: topology="),
        ([], ["cpo:4"], 'did you mean "cpu"'),
        ([], ["cpu:none"], "whole number"),
        ([], ["gpu:0"], "1 to"),
    ],
)
def test_words_that_name_none_have_one_message(libtpu, topologies, platforms, said):
    with pytest.raises(UsageError, match=said):
        targets(topologies, platforms)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "task=copy", "topology=v5e:2x2"]) == 2
    assert "pip install 'xformers_lab[plan]'" in capsys.readouterr().err


def test_words_of_a_target_are_no_keys_of_a_config(capsys):
    assert main(["show", "task=copy", "attention=full", "topology=v5e:2x2"]) == 2
    assert 'unknown key "topology"' in capsys.readouterr().err


def test_every_generation_has_what_a_plan_needs():
    for name, generation in peaks.generations().items():
        published = peaks.published(generation.kind)
        assert published is not None and published.memory and published.bandwidth, name
        assert published.flops["bfloat16"] > 1e13


def test_messages_of_the_compiler_tell_how_much_was_needed():
    temporary = "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
    needed = exceeded.needed(f"RESOURCE_EXHAUSTED: {temporary}(23.55G) exceeds available HBM (15.75G).", 2**30)
    assert needed is not None and "15.75 GiB" in needed.why
    assert (needed.activations, needed.total) == (round(23.55 * 2**30), round(23.55 * 2**30) + 2**30)
    whole = exceeded.needed("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded by 4G", 2**30)
    assert whole is not None and (whole.activations, whole.total) == (round(19.5 * 2**30), round(20.5 * 2**30))
    assert exceeded.needed("Ran out of memory in memory space vmem. Used 20M of 16M vmem", 0) is None


def test_an_estimate_is_the_longest_of_its_parts():
    chip = peaks.Peaks({"bfloat16": 100e12}, True, {}, memory=2**34, bandwidth=1e12, links=1e11)
    exchanged = [{"kind": "all-reduce", "bytes": 10**9}, {"kind": "all-gather", "bytes": 10**9}]
    one = roofline.estimate(chip, "bfloat16", 1e12, 5 * 10**9, exchanged, 1000)
    assert one == {
        "compute_seconds": 0.01,
        "memory_seconds": 0.005,
        "exchange_seconds": 0.03,
        "seconds": 0.03,
        "tokens_per_second": pytest.approx(1000 / 0.03),
    }
    alone = roofline.estimate(chip, "float32", 1e12, 10**9, [], 10)
    assert alone is not None and alone["seconds"] == 0.01, "float32 runs on the units of bfloat16"
    assert roofline.estimate(chip, "bfloat16", None, 1, [], 1) is None
    assert roofline.estimate(None, "bfloat16", 1.0, 1, [], 1) is None
    assert target.Target("cpu", "cpu").peaks is None
