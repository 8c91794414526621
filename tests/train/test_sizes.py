"""How large a config is before it trains: what is counted is what the trained run says, and parts add up."""

import json

import jax
import jax.numpy as jnp
import pytest
from test_train import tiny

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import edit
from xformers_lab.measure.flops import count_flops, flops_by_scope
from xformers_lab.measure.kept import kept_by_scope
from xformers_lab.report import sizes as shown
from xformers_lab.train import loop, sizes


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny("copy", tmp_path_factory.mktemp("runs"), eval_batches=1, steps=2)


@pytest.fixture(scope="module")
def counted(config):
    return sizes.of(config)


def test_a_config_is_as_large_as_its_run(config, counted, whole_ends):
    record = loop.run(config)
    tokens, training = config.train.batch * config.seq_len, counted["training_bytes"]
    assert counted["parameters"]["total"] == record["parameters"]
    assert counted["flops_per_token"]["training"]["total"] * tokens == record["flops"]
    assert training["activations"] + training["gradients"] == record["temp_bytes"]
    assert counted["decoding_bytes"]["cache"] == record["state_bytes"]


def test_parts_are_what_their_shapes_say(config, counted):
    L, D, T, V = config.model.layers, config.model.dim, config.seq_len, 11
    parts, flops = counted["parameters"]["parts"], counted["flops_per_token"]
    assert parts["ffn"] == L * (2 * 4 * D * D + 5 * D) and parts["attention"] == L * 4 * D * D
    assert (
        parts["embedding"] == V * D
        and parts["position"] == T * D
        and sum(parts.values()) == counted["parameters"]["total"]
    )
    assert parts["norm"] == 2 * D * (2 * L + 1)
    forward, training = flops["forward"]["parts"], flops["training"]["parts"]
    assert forward["ffn"] == L * 16 * D * D and training["ffn"] == 3 * forward["ffn"]
    assert forward["attention"] == L * (8 * D * D + 4 * T * D) and training["attention"] >= 3 * forward["attention"]
    assert counted["training_bytes"]["optimizer"] >= 2 * counted["training_bytes"]["parameters"], "two moments of Adam"


def test_several_configs_are_a_line_each(config, inline, capsys):
    words = ["task=copy", "seq_len=16", "layers=1", "batch=8", "heads=2", "dim=16,15"]
    assert main(["show", *words, "--json"]) == 5
    right, wrong = json.loads(capsys.readouterr().out)
    assert right["dim"] == "16" and right["parameters"]["total"] and wrong["dim"] == "15" and "heads" in wrong["reason"]
    assert main(["show", *words[:-1], "dim=15"]) == 2 and "heads" in capsys.readouterr().err
    assert main(["show", *words[:-1], "dim=16"]) == 0
    assert "training: activations" in capsys.readouterr().out


def test_how_a_layout_shares_parameters_out_is_shown_without_the_devices(config, counted, capsys):
    assert counted["layout"] == {"devices": 1, "here": 1, "axes": {}, "parameters": []}
    spread = sizes.of(edit(config, layout="fsdp:2+tensor:2", batch=8))
    layout, whole = spread["layout"], counted["training_bytes"]
    assert (layout["devices"], layout["axes"]) == (4, {"fsdp": 2, "tensor": 2})
    assert sum(row["bytes"] for row in layout["parameters"]) == 4 * counted["parameters"]["total"]
    on_each = sum(row["bytes_per_device"] for row in layout["parameters"])
    assert on_each == spread["training_bytes"]["parameters"] == spread["training_bytes"]["gradients"]
    assert on_each < 0.35 * whole["parameters"] and spread["training_bytes"]["optimizer"] < 0.35 * whole["optimizer"]
    assert spread["training_bytes"]["total"] is None and spread["decoding_bytes"] == counted["decoding_bytes"]
    shown.print_sizes(spread)
    page = capsys.readouterr().out
    assert "stack.periods.*.ffn.up.kernel" in page and "16/fsdp x 64/tensor" in page
    assert "4 devices: fsdp 2 x tensor 2" in page and "whole on every device: head.bias" in page
    assert "activations are not known: here is 1 device" in page


def test_shares_and_bytes_are_shown(counted):
    rows = {row["part"]: row for row in shown.by_part(counted)}
    assert rows["total"]["share"] == "100.0 %" and rows["rest"]["parameters"] == "\N{EN DASH}"
    assert rows["attention"]["per layer"] == "1k" and rows["embedding"]["per layer"] == "\N{EN DASH}"
    share = shown.attention_share(counted["parameters"])
    assert share is not None
    assert float(rows["attention"]["share"].split()[0]) == pytest.approx(100 * share, abs=0.05)
    hidden = counted | {
        "flops_per_token": {"forward": None, "training": None},
        "decoding_bytes": {"why_not": "it reads both sides"},
    }
    assert shown.line(hidden)["FLOPs/token"] == shown.line(hidden)["decoding keeps"] == "\N{EN DASH}"
    assert {row["FLOPs/token"] for row in shown.by_part(hidden)} == {"\N{EN DASH}"}
    assert [row["bytes"] for row in shown.in_bytes(hidden)][-1] == "training: total"
    shown.print_sizes(hidden)
    (row,) = shown.lines([({"attention": "full"}, counted)])
    assert row["attention"] == "full" and row["parameters: attention"] == rows["attention"]["share"]


def test_a_scope_has_its_backward_pass_and_its_loops():
    def layer(x, w):
        with jax.named_scope("attention"):
            y = jax.lax.map(lambda row: row @ w, x)  # a loop within the scope, which repeats no name inside
        with jax.named_scope("attention_norm"):
            return y @ w, None

    def loss(x, w):
        return jax.lax.scan(layer, x, w)[0].sum() + (x @ w[0]).sum()

    x, w = jnp.zeros((4, 8)), jnp.zeros((3, 8, 8))
    one, step = 2 * 4 * 8 * 8, jax.grad(loss, argnums=(0, 1))
    assert flops_by_scope(loss, x, w, scopes=["attention"]) == {"attention": 3 * one, "rest": 4 * one}
    parts = flops_by_scope(step, x, w, scopes=["attention"])
    assert parts["attention"] == 9 * one and sum(parts.values()) == count_flops(step, x, w)


def test_kept_bytes_are_of_the_scope_that_made_them():
    def layer(x, w):
        with jax.named_scope("attention"):
            y = jnp.sin(x @ w)  # its cosine
            y = jax.lax.map(jax.checkpoint(lambda row: jnp.tanh(jnp.cos(row))), y)  # what it is computed from again
        return jnp.exp(y), None  # itself, and the layer's input for the product

    loss = lambda w, x: jax.lax.scan(layer, x, w)[0].sum()
    one = 3 * 4 * 8 * 4
    assert kept_by_scope(loss, jnp.zeros((3, 8, 8)), jnp.zeros((4, 8)), scopes=["attention"]) == {
        "attention": 2 * one,
        "rest": 2 * one,
    }


def test_what_waits_for_the_backward_pass_grows_with_the_batch_of_a_part(config, counted):
    kept = counted["kept_bytes"]
    assert kept["total"] == sum(kept["parts"].values()) and kept["parts"]["ffn"] > 0
    longer = sizes.of(edit(config, seq_len=2 * config.seq_len))["kept_bytes"]["parts"]
    assert longer["ffn"] == pytest.approx(2 * kept["parts"]["ffn"], rel=0.001)  # but for vectors of biases
    assert longer["attention"] >= 1.9 * kept["parts"]["attention"] > 0
    halved = sizes.of(edit(config, accumulate=2))["kept_bytes"]["parts"]
    assert halved["ffn"] == pytest.approx(kept["parts"]["ffn"] / 2, rel=0.001)


@pytest.mark.full
def test_a_model_that_keeps_a_best_and_one_that_cannot_decode(config):
    encoder = edit(config, task="listops", model="encoder", select="best", eval_every=1)
    counted = sizes.of(encoder)
    assert "both sides" in counted["decoding_bytes"]["why_not"] or "one answer" in counted["decoding_bytes"]["why_not"]
    assert configs.get(encoder, "layers") == counted["layers"]
