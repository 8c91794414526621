"""A plan says of devices that are not here what a run on them would have: programs are those of training."""

import json
import re

import jax
import pytest
from conftest import ROOT
from test_train import tiny

import xformers_lab as xl
from xformers_lab import config as configs
from xformers_lab import hardware
from xformers_lab.cli import main
from xformers_lab.config import edit
from xformers_lab.nn import platform
from xformers_lab.nn.plan import Plan, plan_of
from xformers_lab.nn.size import Size
from xformers_lab.plan import work
from xformers_lab.report import plans
from xformers_lab.train import sizes

WORDS = ["task=copy", "seq_len=16", "layers=1", "batch=8", "heads=2", "dim=16"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny("copy", tmp_path_factory.mktemp("runs"), batch=8)


def planned(capsys, *words: str, code: int = 0) -> list[dict]:
    assert main(["plan", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_plan_for_the_cpu_is_what_its_training_takes(config, inline):
    (row,) = xl.plan(config, platform="cpu", quiet=True)
    counted = sizes.of(config)
    training = counted["training_bytes"]
    assert row["status"] == "ok" and row["fits"] is True and row["devices"] == 1 and row["axes"] == {}
    assert row["flops_per_token"] == counted["flops_per_token"]["training"]["total"]
    assert row["flops_per_device"] == row["flops_per_token"] * config.train.batch * config.seq_len
    parts = row["bytes"]
    assert (parts["parameters"], parts["optimizer"]) == (training["parameters"], training["optimizer"])
    assert parts["activations"] == training["activations"] + training["gradients"]
    assert parts["total"] == sum(size for part, size in parts.items() if part != "total")
    assert row["collectives"] == [] and row["estimate"] is None and row["compile_seconds"] > 0


def test_a_plan_for_gpus_says_what_needs_none(config, inline):
    (row,) = xl.plan(edit(config, layout="fsdp:2+tensor:2"), platform="gpu", quiet=True)
    spread = sizes.of(edit(config, layout="fsdp:2+tensor:2"))
    assert row["devices"] == 4 and row["axes"] == {"fsdp": 2, "tensor": 2}
    assert row["bytes"]["parameters"] == spread["training_bytes"]["parameters"]
    assert row["bytes"]["optimizer"] == spread["training_bytes"]["optimizer"]
    assert row["flops_per_token"] == spread["flops_per_token"]["training"]["total"]
    assert row["flops_per_device"] * 4 == row["flops_per_token"] * config.train.batch * config.seq_len
    assert row["lower_seconds"] > 0 and not {"fits", "collectives", "estimate", "compile_seconds"} & row.keys()
    assert row["memory"] is None and "total" not in row["bytes"]


def test_decoding_has_its_cache(inline, capsys):
    prefill, token = planned(capsys, *WORDS, "platform=cpu", "--decode")
    config = configs.single(WORDS)
    cache = sizes.of(config)["decoding_bytes"]["cache"]
    assert (prefill["program"], token["program"]) == ("prefill", "token")
    assert "cache" not in prefill["bytes"] and token["bytes"]["cache"] == pytest.approx(cache / 8, rel=0.01)
    assert token["flops_per_token"] > 0 and prefill["flops_per_token"] * 16 == prefill["flops_per_device"]
    # A layer's products with one token, and its 16 keys and values.
    assert token["flops_per_device"] == 8 * 16**2 + 4 * 16 * 16 + 16 * 16**2 + 2 * 16 * 11


def test_what_does_not_fit_is_said_and_no_failure(inline, capsys, monkeypatch):
    monkeypatch.setattr(hardware, "memory", lambda: 100_000)
    small, large = planned(capsys, *WORDS[:-1], "dim=16,64", "platform=cpu")
    assert small["memory"] == 100_000 and not small["fits"] and small["bytes"]["total"] > 100_000
    assert small["bytes"]["parameters"] + small["bytes"]["optimizer"] < 100_000
    assert not large["fits"] and "compile_seconds" not in large, "what it is given is too much already"
    assert main(["plan", *WORDS[:-1], "dim=16,64", "platform=cpu"]) == 0
    assert "NO" in capsys.readouterr().out


def test_what_a_compiler_cannot_do_is_a_row(inline, capsys, monkeypatch):
    def compile(self):
        raise RuntimeError("INTERNAL: no such instruction\nand pages of it")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    (row,) = planned(capsys, *WORDS, "platform=cpu", code=5)
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: INTERNAL: no such instruction")


@pytest.fixture
def made_up(monkeypatch):
    """Figures of a device of a million bytes, where full attention keeps its scores; nothing is compiled."""

    def measure(tell, target, config, program):
        length, attention = config["seq_len"], config["model"]["attention"]
        total = 1000 * length + 100 * length**2 * (attention == "full")
        about = {"devices": 1, "axes": {}, "memory": 10**6, "flops_per_token": 1.0, "flops_per_device": 1.0}
        about |= {"collectives": [], "estimate": None, "compile_seconds": 1.0}
        return about | {"bytes": {"parameters": 1, "total": total}, "fits": total <= 10**6}

    monkeypatch.setattr(work, "measure", measure)


def test_the_longest_that_fits_is_searched(made_up, inline, capsys):
    words = [*WORDS, "attention=full,linear", "platform=cpu"]
    full, linear = planned(capsys, *words, "--longest")
    for row, most in ((full, 95), (linear, 1000)):
        assert row["fits"] and row["longest"] == row["seq_len"] <= most < row["too_long"]
        assert row["config"]["seq_len"] == row["longest"] and row["tried"][0] == 16
        assert row["too_long"] - row["longest"] <= max(16, row["longest"] // 16)
    plans.print_plans([full, linear], ["attention"])
    assert re.search(rf"linear +{linear['longest']} +{linear['too_long']:,}", capsys.readouterr().out)
    refused = {"seq_len=16,32": "seq_len=", "tokens=64": "batch=", "platform=gpu": "topology="}
    for word, said in refused.items():
        assert main(["plan", *words, word, "--longest"]) == 2 and said in capsys.readouterr().err


def test_a_length_that_cannot_be_ends_the_search(made_up, inline, capsys):
    """Position by length has an end: the words of the row say which length could not be tried."""
    words = ["task=copy", "seq_len=16", "layers=1", "batch=8", "attention=axial:shape=4x4", "platform=cpu"]
    (row,) = planned(capsys, *words, "--longest")
    assert row["longest"] == 16 and row["too_long"] is None and row["why"].startswith("32 tokens could not be tried: ")


def test_a_sweep_is_a_line_each_with_what_fits(made_up, inline, capsys):
    words = [*WORDS, "seq_len=64..256:x2", "attention=full,linear", "platform=cpu"]
    assert main(["plan", *words]) == 0
    page = capsys.readouterr().out
    assert "full: up to 64 tokens fit" in page and "linear: up to 256 tokens fit" in page and "NO" in page
    assert "step at least" not in page, "no estimate, no column"


@pytest.mark.parametrize(
    "words, said",
    [
        (["layout=fsdp:3"], "multiply to 4"),
        (["layout=sequence", "seq_len=18"], "seq_len=18 is not divisible by 4"),
        (["layout=tensor", "heads=1"], "heads=1 is not divisible"),
        (["layout=data", "batch=6"], "batch=6"),
        (["layout=experts"], "experts"),
        (["layout=pmap"], "layout=data"),
        (["attention=linformer"], "causal"),
    ],
)
def test_what_cannot_be_on_a_target_ends_before_anything_compiles(words, said, inline, capsys, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled"))
    assert main(["plan", *WORDS, *words, "platform=gpu:4"]) == 2
    assert said in capsys.readouterr().err


def test_impossible_combinations_may_be_rows(inline, capsys):
    rows = planned(capsys, *WORDS, "attention=linformer,full", "platform=gpu", "--skip-impossible")
    assert [row["status"] for row in rows] == ["refused", "ok"] and "causal" in rows[0]["reason"]


def test_what_is_traced_follows_the_platform_that_is_planned_for():
    size = Size(16, 16, 2, None, 1, "float32")
    traced = jax.jit(lambda x: x + len(platform.platform()))
    here = str(jax.make_jaxpr(traced)(1.0))
    assert platform.platform() == "cpu" and plan_of(size) == Plan.of("cpu") and not platform.elsewhere()
    with platform.planned_for("tpu"):
        assert plan_of(size) == Plan.of("tpu") != Plan.of("cpu") and platform.elsewhere()
    with platform.planned_for("metal"):
        assert str(jax.make_jaxpr(traced)(1.0)) != here, "JAX remembers what it traced, of each platform apart"
    assert platform.platform() == "cpu"


def test_only_one_place_asks_what_a_program_is_traced_for():
    shelves = ("attention", "position", "norm", "ffn", "depth", "memory", "nn")
    files = [file for shelf in shelves for file in (ROOT / "xformers_lab" / shelf).rglob("*.py")]
    asking = {file.name for file in files if re.search(r"default_backend|jax\.devices", file.read_text())}
    assert asking == {"platform.py"}


@pytest.mark.full
def test_simulated_devices_exchange_what_a_layout_shares_out():
    """In a worker of its own, which stands for several devices."""
    words = ["task=copy", "seq_len=16", "layers=1", "batch=8", "heads=2", "dim=16"]
    (row,) = xl.plan(*words, layout="data:4", platform="cpu", quiet=True)
    exchanged = {each["kind"]: each for each in row["collectives"]}
    assert row["devices"] == 4 and exchanged.keys() == {"all-reduce"}
    assert exchanged["all-reduce"]["bytes"] == pytest.approx(row["bytes"]["parameters"], rel=0.1), "the gradients"
    memory = hardware.memory()
    assert memory is None or row["memory"] == memory // 4
