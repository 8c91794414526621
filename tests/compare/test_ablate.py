"""Ablations: which variants a base and its axes make, and what is said of their differences."""

import pytest

from xformers_lab import config as configs
from xformers_lab.compare import ablate
from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.report import ablation


def named(words) -> dict[str | None, Config]:
    return {cell.name: cell.config for cell in ablate.ablation(words).cells}


def test_each_alternative_of_each_axis_is_swapped_in_alone():
    variants = named(["task=copy", "dim=32", "norm=pre,post,sandwich", "position=learned,rope"])
    assert list(variants) == ["base", "norm=post", "norm=sandwich", "position=rope"]
    assert variants["base"].model.dim == 32 and variants["norm=post"].model.position == "learned"
    assert variants["position=rope"].model.norm == "pre"


def test_the_value_of_a_file_is_the_base_and_its_choices_are_set_back_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text('norm = "post"\nffn = "glu"\ndim = 32\nsteps = 5\nlr = 1e-3\n')
    variants = named(["base.toml", "norm=pre,sandwich", "tune=lr"])
    assert list(variants) == ["base", "norm=pre", "norm=sandwich", "ffn=mlp"]
    assert variants["base"].model.norm == "post" and variants["ffn=mlp"].model.norm == "post"
    assert variants["ffn=mlp"].train.steps == 5 and variants["norm=pre"].model.ffn == "glu"
    assert "lr=0.003" in named(["base.toml"])


def test_lengths_and_seeds_are_what_every_variant_runs_on():
    plan = ablate.ablation(["task=copy", "seq_len=16,32", "seeds=2", "norm=pre,post"])
    assert len(plan.cells) == 2 * 2 * 2 and plan.axes == {"norm": ["norm=post"]}
    assert set(plan.varied) == {"seq_len", "seed", "norm"}
    with pytest.raises(UsageError, match="both say which seeds"):
        ablate.ablation(["seeds=2", "seed=1", "norm=pre,post"])
    with pytest.raises(UsageError, match="nothing to ablate"):
        ablate.ablation(["task=copy", "steps=5"])


def test_a_recipe_of_several_configs_is_no_base(tmp_path):
    (tmp_path / "grid.py").write_text("configs = [{'dim': 32}, {'dim': 64}]\n")
    with pytest.raises(UsageError, match="2 configs; use compare"):
        ablate.ablation([str(tmp_path / "grid.py")])


def rows(metrics: dict[str, list[float | None]]) -> list[dict]:
    return [
        {
            "task": "copy", "seq_len": 32, "seed": seed, "name": name, "metric": metric, "metric_name": "accuracy",
            "status": "failed" if metric is None else "ok", "higher_is_better": True,
            "config": configs.to_dict(Config()),
        }
        for name, values in metrics.items()
        for seed, metric in enumerate(values)
    ]  # fmt: skip


AXES = {"norm": ["norm=post", "norm=sandwich"], "position": ["position=rope"], "ffn": ["ffn=glu"]}


def test_the_largest_paired_difference_of_each_axis_is_said_with_its_interval():
    metrics: dict[str, list[float | None]] = {
        "base": [0.80, 0.82, 0.84],
        "norm=post": [0.50, 0.53, 0.54],
        "norm=sandwich": [0.81, 0.82, 0.85],
        "position=rope": [0.70, 0.95, 0.80],
        "ffn=glu": [None, None, None],
    }
    head, norm, position, ffn = ablation.lines(rows(metrics), ["norm", "position", "ffn"], AXES, "base")
    assert "accuracy of the base 0.820" in head and "32 tokens" in head
    assert "norm=post: -0.297" in norm and "not distinguishable" not in norm
    assert "position=rope: -0.003" in position and "not distinguishable from the base" in position
    assert ffn.endswith("no result")


def test_one_seed_is_said_to_be_untested_and_a_failed_base_compares_nothing():
    one: dict[str, list[float | None]] = {"base": [0.8], "norm=post": [0.5]}
    assert "-0.300 (one seed, so not tested)" in ablation.lines(rows(one), ["norm"], {"norm": ["norm=post"]}, "base")[1]
    failed = ablation.lines(rows({"base": [None], "norm=post": [0.5]}), ["norm"], AXES, "base")
    assert failed == ["copy at 32 tokens: the base has no result, so nothing is compared with it"]
