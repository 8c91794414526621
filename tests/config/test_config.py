"""The grammar and the config: what is written is what is run, in every format, and equal configs have one id."""

import json
import sys
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from xformers_lab import config as configs
from xformers_lab import sources, spec
from xformers_lab.config import Config, edit, get, identity, sweep
from xformers_lab.errors import UsageError
from xformers_lab.nn.size import Size
from xformers_lab.tasks import Setting


def values(key: str, words: list[str]) -> list:
    return [configs.get(cell, key) for cell in sweep(words)[0]]


def test_sweeps_and_ranges():
    assert values("seq_len", ["seq_len=512..4096:x2"]) == [512, 1024, 2048, 4096]
    assert values("seed", ["seed=0..2"]) == [0, 1, 2]
    assert values("seq_len", ["seq_len=8..32:+8"]) == [8, 16, 24, 32]
    assert values("steps", ["steps=1e3,2k,1ki"]) == [1000, 2000, 1024]
    assert values("lr", ["lr=1e-3,3e-3"]) == [0.001, 0.003]
    assert values("norm", ["norm=all"]) == spec.names("norm")
    assert {configs.get(cell, "norm") for cell in sweep([{"norm": "all"}])[0]} == set(values("norm", ["norm=all"]))
    assert values("eval_batches", ["eval_batches=all"]) == ["all"]
    cells, varied = sweep(["task=copy", "attention=full,local:window=8,local:window=8+full", "seq_len=16,32"])
    assert [c.model.attention for c in cells[::2]] == ["full", "local:window=8", "local:window=8+full"]
    assert varied == ["seq_len", "attention"]


def test_keys_that_only_follow_the_task_do_not_name_a_series(tmp_path):
    recipe = tmp_path / "grid.py"
    recipe.write_text(
        "tasks = (('copy', 9), ('mqar', 7))\n"
        "configs = [{'task': t, 'steps': s, 'attention': a} for t, s in tasks for a in ('full', 'linear')]"
    )
    cells, varied = sweep([f"@{recipe}", "dim=32"])
    assert len(cells) == 4 and {c.model.dim for c in cells} == {32}
    assert varied == ["task", "attention"]


def test_later_words_win_over_files(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 3e-4\nmodel: {layers: 3, attention: [full, linear]}\n")
    cells, varied = sweep([f"@{tmp_path}/base.yaml", "layers=1"])
    assert [c.train.lr for c in cells] == [3e-4, 3e-4]  # YAML reads 3e-4 as text
    assert {c.model.layers for c in cells} == {1} and varied == ["attention"]


@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_round_trip(tmp_path_factory, suffix, data):
    changes = {
        "attention": data.draw(st.sampled_from(["full", "local:window=3+linear", "axial:axis=row"])),
        "kv_heads": data.draw(st.sampled_from([None, 1, 2])),
        "lr": data.draw(st.floats(1e-9, 1e3)),
        "seq_len": data.draw(st.integers(1, 1 << 20)),
        "dtype": data.draw(st.sampled_from(["float32", "bfloat16"])),
    }
    config = edit(Config(), **changes)
    path = tmp_path_factory.mktemp("c") / f"config.{suffix}"
    configs.save(config, path)
    (back,), _ = sweep([f"@{path}"])
    assert back == config
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config


def test_identity():
    base = edit(Config(), attention="local")
    assert identity(base) == identity(edit(base, attention="local:window=128"))
    assert identity(base) == identity(edit(base, runs="elsewhere", save_every=5))
    others = [
        edit(base, attention="local:window=127"),
        edit(base, seed=1),
        edit(base, lr=2e-3),
        edit(base, task="copy"),
    ]
    assert len({identity(c) for c in [base, *others]}) == 5


def test_keys_that_came_later_leave_the_ids_of_runs_from_before():
    keys = configs.decisive(Config()).keys()
    assert not {"remat", "ema"} & keys and {"accumulate", "dtype"} <= keys
    others = [edit(Config(), **change) for change in ({"remat": "full"}, {"remat": "dots"}, {"ema": 0.9}, {"ema": 0.5})]
    assert len({identity(config) for config in (Config(), *others)}) == 5
    assert identity(edit(others[0], remat="none")) == identity(Config())
    rope = configs.decisive(edit(Config(), position="rope:turned=1+rope:turned=0.5"))["position"]
    first, second = rope.split("+")
    assert "turned" not in first and "base" in first and "turned=0.5" in second


@pytest.mark.parametrize("counted, written", [
    ({"attention": "3*local:window=8+full"}, {"attention": "+".join([*["local:window=8"] * 3, "full"])}),
    ({"attention": "2*(full+linear)+local"}, {"attention": "full+linear+full+linear+local"}),
    ({"position": "1*rope + 2*none"}, {"position": "rope+none+none"}),
    ({"attention": "2*bigbird:block=4"}, {"attention": "bigbird:block=4+bigbird:block=4"}),
])  # fmt: skip
def test_a_count_in_a_cycle_is_the_cycle_written_out(counted, written):
    one, other = edit(Config(), **counted), edit(Config(), **written)
    assert identity(one) == identity(other) and configs.from_dict(configs.to_dict(one)) == one
    (key,) = counted
    assert configs.canonical(key, get(one, key)) == configs.canonical(key, get(other, key))
    assert configs.from_dict(counted) == one


@pytest.mark.parametrize("text, message", [
    ("0*full+local", "at least once"), ("-1*full", "at least once"), ("2.5*full", "a whole number of times"),
    ("many*full", "a whole number of times"), ("*full", "a whole number of times"), ("3*", "a whole number of times"),
    ("65*full", "a cycle of 65 choices; at most 64"), ("999999999*(full+local)", "at most 64"),
    ("9" * 5000 + "*full", "a whole number of times"), ("2*3*full", "a whole number of times"), ("3*ful", "full"),
])  # fmt: skip
def test_a_bad_count_is_one_message(text, message):
    with pytest.raises(UsageError, match=message) as refused:
        edit(Config(), attention=text)
    assert "\n" not in str(refused.value)


def test_a_counted_file_is_a_source(tmp_path):
    """Code that a count stands before is looked at before it runs, as any other."""
    mine, other = tmp_path / "mine.py", tmp_path / "other.py"
    mine.touch(), other.touch()
    assert list(sources.of({"attention": f"3*{mine}+2*(full+{other})"})) == [str(mine), str(other)]


def test_identity_follows_the_source_of_an_outsider(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from xformers_lab.attention.full import Full\n\n\nclass Mine(Full):\n    '''One.'''\n")
    config = edit(Config(), attention=str(mine))
    before = identity(config)
    mine.write_text(mine.read_text() + "\n# changed\n")
    assert identity(config) != before


def test_a_choice_within_a_choice_stands_in_brackets():
    text = "pre:normaliser=(powernorm:decay=0.5:warmup=2)"
    assert str(spec.parse(text)) == text
    norm = spec.build("norm", text, length=4, dim=8, heads=1).norm
    assert (norm.decay, norm.warmup) == (0.5, 2)
    with pytest.raises(UsageError, match="brackets"):
        spec.parse("pre:normaliser=(powernorm")


@pytest.mark.parametrize("name", ["a,b.txt", "run:1.txt", "c++.txt", "(a)|(b).txt", "plain.txt"])
def test_a_path_with_separators_in_it_stands_in_brackets(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(256)) * 40)
    (config,), _ = sweep([f"task=lm:path=({tmp_path}/{name})", "seq_len=16"])
    for text in (config.task, f"({config.task})", configs.canonical("task", config.task)):
        assert spec.parse(text).options["path"] == f"{tmp_path}/{name}"
    task = spec.build("task", config.task, Setting(seq_len=16, batch=2))
    assert task.batch("train", 0).inputs.shape == (2, 16)


@pytest.mark.parametrize("folder", ["a,b", "run:1", "c++"])
def test_a_mechanism_in_a_folder_with_separators_stands_in_brackets(tmp_path, folder):
    path = tmp_path / folder / "mine.py"
    path.parent.mkdir()
    path.write_text("from xformers_lab.attention.local import Local\n\n\nclass Mine(Local):\n    'One.'\n")
    cells, _ = sweep([f"attention=({path}),({path}):window=4+full,full"])
    assert len(cells) == 3
    for cell, window in zip(cells[:2], (128, 4), strict=True):
        mine = spec.resolve("attention", spec.split(cell.model.attention, "+")[0])
        assert mine.options["window"] == window and spec.parse(str(mine)).name == str(path)
        assert configs.from_dict(configs.to_dict(cell)) == cell and identity(cell)


def test_what_a_run_stored_is_read_as_it_is(tmp_path):
    config = Config(runs="a,b", task="lm:path=./a,b.txt")
    assert edit(Config(), runs="a,b").runs == sweep(["runs=a,b"])[0][0].runs == "a,b"
    with pytest.raises(UsageError, match="put it in brackets"):
        sweep([f"task={config.task}"])
    path = tmp_path / "config.json"
    for kept in (config, edit(Config(), runs="1..3")):
        configs.save(kept, path)
        assert configs.stored(path) == kept == configs.from_dict(configs.to_dict(kept))
    recipe = tmp_path / "grid.py"
    recipe.write_text("from xformers_lab.config import Config\nconfigs = [Config(runs='a,b')]")
    assert sweep([f"@{recipe}"])[0] == [Config(runs="a,b")]


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.toml").write_text('runs = "~/kept"\n')
    assert sweep(["@~/base.toml"])[0][0].runs == sweep(["runs=~/kept"])[0][0].runs == f"{tmp_path}/kept"


def test_a_file_of_ones_own_may_hold_dataclasses(tmp_path):
    """Which look their module up in sys.modules; two files of one name stay apart."""
    for number in (1, 2):
        path = tmp_path / str(number) / "grid.py"
        path.parent.mkdir()
        path.write_text(
            "from __future__ import annotations\nimport dataclasses\n\n\n@dataclasses.dataclass\nclass Point:\n"
            f"    seed: int = {number}\n\n\nconfigs = [{{'seed': Point().seed}}]\n"
        )
        assert sweep([f"@{path}"])[0][0].seed == number
    names = [name for name in sys.modules if name.endswith("_grid")]
    assert len(names) == len(set(names)) >= 2 and "grid" not in sys.modules


def test_every_choice_of_every_shelf_builds_from_its_name():
    for shelf in ("attention", "position", "norm", "normaliser", "ffn", "memory"):
        for name in spec.names(shelf):
            model_gives: dict[str, Any] = {"causal": False} if shelf == "position" else {}
            spec.build(shelf, name, Size(length=16, dim=8, heads=2), **model_gives)
    for name in spec.names("task"):
        try:
            spec.build("task", name, Setting(seq_len=256, batch=2))
        except UsageError as error:
            assert "path=" in str(error), f"only a task of data that are read may ask for more: {error}"


def test_every_option_and_key_has_a_help():
    for key, (_, field, _) in configs.LEAVES.items():
        assert field.metadata["help"], key
    for shelf in spec.SHELVES:
        for name in spec.names(shelf):
            for option in spec.options(spec.entry(shelf, name)).values():
                assert option.help, f"{shelf}={name} says nothing about its option {option.name}"


def test_splitting_is_one_pass():
    """A million characters take a million steps, where work that grows with the square would never end."""
    assert spec.split("a(b,c),d,,(e", ",") == ["a(b,c)", "d", "", "(e"]
    assert spec.split("a)b,c", ",") == ["a)b,c"]
    assert [spec.bare(text) for text in ("(a)", "(a)|(b)", "((a))", "a", "(a", "")] == [
        "a",
        "(a)|(b)",
        "(a)",
        "a",
        "(a",
        "",
    ]
    many = 500_000
    assert len(spec.split("a," * many, ",")) == many + 1
    assert spec.split("x" * 2 * many, ",") == ["x" * 2 * many]
    assert len(spec.bare("(" * many + ")" * many)) == 2 * many - 2
    with pytest.raises(UsageError, match="is no name"):
        spec.resolve("attention", "x" * 2 * many)
    with pytest.raises(UsageError, match="option=value"):
        spec.resolve("attention", "full" + ":" * 2 * many)


def test_what_python_cannot_spell_is_refused_all_the_same():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    for value in (10**10_000, [10**10_000], nested):
        for key in ("steps", "lr", "dtype", "kv_heads", "attention"):
            with pytest.raises(UsageError):
                configs.typed(key, value)


def test_the_help_of_an_option_may_go_on(tmp_path):
    path = tmp_path / "wordy.py"
    path.write_text(
        "class Wordy:\n"
        '    """Words (Someone, 2020).\n\n    Options:\n        first: what it is,\n            and: more of it\n'
        '        second: another\n\n    third: no option\n    """\n\n'
        "    def __init__(self, size, *, first: int = 1, second: int = 2, third: int = 3): ...\n"
    )
    helps = {name: option.help for name, option in spec.options(spec.entry("ffn", str(path))).items()}
    assert helps == {"first": "what it is, and: more of it", "second": "another", "third": ""}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_can_be_run(path):
    from xformers_lab.model import check_config

    cells, varied = sweep([f"@{path}"])
    assert len(cells) > 1 and varied
    check_config(cells[0])


def test_the_batch_follows_the_length():
    cells, varied = sweep(["tokens=128", "seq_len=16,32,128", "attention=full,linear"])
    assert [(cell.seq_len, cell.train.batch) for cell in cells[::2]] == [(16, 8), (32, 4), (128, 1)]
    assert varied == ["seq_len", "attention"], "what follows the length names no series"
    assert identity(sweep(["tokens=4096"])[0][0]) == identity(Config()), "it is the run with that batch"
    assert values("batch", ["tokens=64,128", "seq_len=16"]) == [4, 8]
    assert configs.from_dict({"tokens": 64, "seq_len": 16}).train.batch == 4


@pytest.mark.parametrize("later", ["tokens=256", "@later.toml"])
def test_of_tokens_and_batch_the_later_one_counts(tmp_path, monkeypatch, later):
    monkeypatch.chdir(tmp_path)
    configs.save(edit(Config(), batch=3), tmp_path / "run.json")
    (tmp_path / "later.toml").write_text("tokens = 256")
    assert values("batch", ["@run.json", later]) == [4]
    assert values("batch", [later, "batch=5"] if later[0] == "@" else ["@later.toml", "batch=5"]) == [5]
    assert values("batch", ["@run.json", "tokens=none"]) == [3]
    (tmp_path / "grid.py").write_text("configs = [{'batch': 2}, {'batch': 3, 'seq_len': 32}]")
    assert values("batch", ["@grid.py", later]) == [4, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokens=100"], "say tokens=64 or 128"),
        (["tokens=32"], "say tokens=64"),
        (["tokens=64", "batch=1"], "both say how large a step is"),
        (["train.batch=1", "tokens=64"], "both say how large a step is"),
        (["tokens=0"], "tokens must be at least 1"),
        (["tokens=x"], "wants a whole number"),
        (["name=a,b"], "letters, digits"),
        (["name=a/b"], "letters, digits"),
        (["name=last"], "choose another name"),
        (["name=0123456789ab"], "choose another name"),
        (["name=-x"], "choose another name"),
        (["tags=a++b"], "letters, digits"),
    ],
)
def test_words_of_a_step_and_labels_that_cannot_be(words, said):
    with pytest.raises(UsageError, match=said):
        sweep(words)


def test_names_and_tags_tell_no_runs_apart(tmp_path):
    (named,) = sweep(["name=base.1", "tags=b+a+b"])[0]
    assert (named.name, named.tags) == ("base.1", "b+a")
    assert identity(named) == identity(Config()) and configs.compiled(named) == configs.compiled(Config())
    configs.save(named, tmp_path / "run.json")
    (again,), varied, _ = configs.study([f"@{tmp_path}/run.json", "tags=c"])
    assert (again.name, again.tags, varied) == (None, "c", []), "a grid is many runs"
    assert sweep([f"@{tmp_path}/run.json"])[0] == [named]
    assert configs.from_dict({"tags": ["a", "b"]}).tags == "a+b"
    with pytest.raises(UsageError, match="tags= marks them all"):
        configs.study(["name=a"])
