"""A step of training compiles for TPUs that are not here, in every layout and with every kind of mechanism."""

import importlib.util

import pytest
from kinds import one_of_each_kind

import xformers_lab as xl
from xformers_lab.cli import main

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu here (the extra `plan`)"),
]
WORDS = ["task=listops", "seq_len=32", "batch=8", "dim=16", "heads=2", "layers=1"]
LAYOUTS = ["data", "fsdp", "tensor:2+data:2", "fsdp:2+tensor:2", "sequence", "data:2+sequence:2"]


def compiled(*words: str, **keys) -> dict:
    (row,) = xl.plan(*WORDS, *words, quiet=True, **keys)
    assert row["status"] == "ok" and row["fits"], row.get("reason")
    return row


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_compiles_for_a_tpu(layout):
    row = compiled(topology="v5e:2x2", layout=layout)
    kinds = {each["kind"] for each in row["collectives"]}
    assert row["devices"] == 4 and row["memory"] == 16 * 2**30 and row["estimate"]["seconds"] > 0
    assert kinds & {"all-reduce", "reduce-scatter"} and not any(each["uncounted"] for each in row["collectives"])
    assert "sequence" not in layout or "collective-permute" in kinds, "keys travel in a ring"


def test_experts_compile_for_a_tpu():
    row = compiled("ffn=moe:experts=4", topology="v5e:2x2", layout="experts")
    assert row["axes"] == {"experts": 4}


@pytest.mark.parametrize("attention", one_of_each_kind())
def test_every_kind_of_mechanism_compiles_for_a_tpu(attention):
    compiled(f"attention={attention}", topology="v5e:1x1")


@pytest.mark.parametrize("layout", ["data", "data:2+tensor:2"])
def test_splash_attention_runs_there(layout):
    """Long enough for the kernel, on each device's share of sequences and heads, with gradients that are exchanged."""
    words = "task=copy", "seq_len=256", "position=rope", "dim=128", f"layout={layout}", "topology=v5e:2x2"
    kernel, blocks = xl.plan(*WORDS[2:3], *WORDS[4:], *words, kernel="auto,blocks", quiet=True)
    assert (kernel["kernel"], blocks["kernel"]) == ("splash", "blocks")
    assert kernel["flops_per_token"] >= blocks["flops_per_token"]
    exchanged = [sum(each["bytes"] for each in row["collectives"]) for row in (kernel, blocks)]
    assert exchanged[0] == pytest.approx(exchanged[1], rel=0.2)


def test_decoding_compiles_for_a_tpu():
    prefill, token = xl.plan("task=copy", *WORDS[1:], topology="v6e:1x1", decode=True, quiet=True)
    assert prefill["status"] == token["status"] == "ok" and token["bytes"]["cache"] > 0


def test_what_is_too_large_for_a_chip_is_said_by_its_compiler():
    (row,) = xl.plan("task=copy", *WORDS[1:], seq_len=16384, batch=512, topology="v5e:1x1", quiet=True)
    assert row["fits"] is False and row["bytes"]["activations"] > 15 * 2**30 and "GiB" in row["why"]


def test_a_grid_that_nobody_builds_has_a_message(capsys):
    assert main(["plan", *WORDS[:2], "batch=63", "topology=v5e:3x3"]) == 2
    said = capsys.readouterr().err
    assert "topology=v5e:3x3: libtpu knows no such grid" in said and "SIGTERM" not in said
