"""The words of a study, the cells that stand in it, and the command that makes a row again."""

import json
import shlex

import pytest

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.compare import baselines, study
from xformers_lab.config import Config, Study, edit
from xformers_lab.errors import UsageError


def test_the_keys_of_a_study_are_words_and_stand_at_the_top_of_files(tmp_path):
    configurations, varied, asked = configs.study(["attention=full,linear", "seeds=3", "match=params", "tune=lr"])
    assert asked == Study(match="params", tune="lr", seeds=3) and varied == ["seed", "attention"]
    assert [config.seed for config in configurations] == [0, 1, 2] * 2
    (tmp_path / "a.toml").write_text('match = "flops"\ntune = ["lr", "weight_decay"]\nseeds = 2\n[model]\ndim = 32\n')
    (tmp_path / "a.json").write_text(json.dumps({"match": "flops", "tune": "lr,weight_decay", "seeds": 2, "dim": 32}))
    (tmp_path / "a.py").write_text(
        'from re import match\ntune = "lr,weight_decay"\nseeds = 2\nconfigs = [{"dim": 32}, {"dim": 48}]\n'
    )
    for name in ("a.toml", "a.json"):
        configurations, _, asked = configs.study([f"@{tmp_path}/{name}"])
        assert asked == Study("flops", "lr,weight_decay", 2) and [one.model.dim for one in configurations] == [32, 32]
    configurations, _, asked = configs.study([f"@{tmp_path}/a.py", "match=params"])
    assert asked == Study("params", "lr,weight_decay", 2) and len(configurations) == 4


def test_seeds_beside_seed_and_commands_that_are_no_study_are_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match="seeds=2 and seed= both say which seeds"):
        configs.study(["seeds=2", "seed=0"])
    (tmp_path / "a.toml").write_text("seed = [0, 1]\n")
    with pytest.raises(UsageError, match="both say"):
        configs.study([f"@{tmp_path}/a.toml", "seeds=2"])
    configs.save(Config(), tmp_path / "run.json")  # what a run left says seed=0, as it says all defaults
    assert len(configs.study([f"@{tmp_path}/run.json", "seeds=2"])[0]) == 2
    for command in ("train", "bench"):
        assert main([command, "task=copy", "match=params"]) == 2
        assert "match= is a word of a study" in capsys.readouterr().err
    for words in (
        ["match=weight"],
        ["match=params:of=full"],
        ["tune=dim"],
        ["tune=lr:points=3"],
        ["tune=lr", "lr=1,2"],
    ):
        assert main(["compare", "task=copy", f"runs={tmp_path}/runs", *words]) == 2
        assert words[0].partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "seeds=none" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task": "lm:path=(a, b.txt)", "kv_heads": 1, "dtype": "bfloat16"},
        {"attention": "local:window=8+full", "ffn": "mlp:ratio=3.83:activation=silu", "lr": 9.49e-4, "seed": 7},
        {"runs": "some, folder", "eval_batches": 4, "stall": 0.0, "norm": "pre:normaliser=(powernorm:decay=0.95)"},
    ],
)
def test_the_command_of_a_row_reproduces_its_run(changes):
    config = edit(Config(), **changes)
    program, command, *words = shlex.split(study.command(config))
    again = configs.single(words)
    assert (program, command) == ("xlab", "train")
    assert again == config and configs.identity(again) == configs.identity(config)


def test_baselines_stand_beside_every_task_length_and_seed_once():
    variants = configs.sweep(["attention=full,linear", "seq_len=32,64", "seed=0,1", "norm=post", "dim=32"])[0]
    added = baselines.baselines(study.cells(variants))
    assert {cell.name for cell in added} == set(baselines.BASELINES) and len(added) == 3 * 2 * 2
    lstm = next(cell.config for cell in added if cell.name == "LSTM")
    rope = next(cell.config for cell in added if cell.name == "RoPE Transformer")
    assert lstm.model.norm == "pre" and lstm.model.dim == 32  # an LSTM would refuse a placement of norms
    assert rope.model.norm == "post" and rope.model.position == "rope"
    grid = configs.sweep(["attention=full", "position=rope,learned"])[0]
    assert [cell.name for cell in baselines.baselines(study.cells(grid))] == ["bag of tokens", "LSTM"]


def test_the_range_control_has_windows_from_a_sixteenth_to_half_of_the_length():
    cells = study.cells(configs.sweep(["attention=linear", "position=rope", "seq_len=32,128"])[0])
    added = baselines.ranges(cells)
    assert [cell.name for cell in added] == [f"window {size}" for size in (4, 8, 16, 8, 16, 32, 64)]
    assert all(cell.role == "range" and cell.config.model.position == "rope" for cell in added)
    assert added[0].config.model.attention.startswith("local:window=4")


def test_a_row_is_named_by_the_words_and_holds_what_ran(tmp_path):
    origin = edit(Config(), ffn="glu", runs=str(tmp_path))
    cell = study.Cell(origin, edit(origin, ffn="glu:ratio=2"), matched={"ok": True})
    row = study.row(cell, {"status": "ok", "metric": 0.5}, ["ffn"])
    assert row["ffn"] == "glu" and row["config"]["model"]["ffn"] == "glu:ratio=2" and row["matched"] == {"ok": True}
    assert row["run_dir"] == str(configs.folder(cell.config)) and "ffn=glu:ratio=2" in row["command"]
    assert "name" not in row and "tuning" not in row and row["role"] == "variant"
