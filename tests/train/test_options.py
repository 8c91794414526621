"""A trained model with other options: what is scored with them, and what is refused before anything compiles."""

import json

import numpy as np
import pytest
from flax import nnx
from test_train import tiny

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.train import evaluation, loop, options, otherwise, trained

EXITS = {"depth": "early_exit", "layers": 4, "position": "rope", "attention": "local:window=4+full", "lr": 1e-2}
SURE = 0.14  # a threshold that some tokens reach after so few steps, and others do not


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def train(runs, task: str = "copy", **changes):
    """A trained run: its config and its folder."""
    config = tiny(task, runs, **({"position": "rope", "eval_batches": 1} | changes))
    loop.run(config)
    return config, configs.folder(config)


@pytest.fixture(scope="module")
def exits(runs):
    return train(runs, **EXITS)


def fresh(folder, config: Config) -> nnx.Module:
    """The model of a config, with the parameters of a run, put into it by their paths."""
    _, _, model = trained.load(folder)
    other = build_model(config, build_task(config))
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    state = nnx.to_flat_state(nnx.state(other, nnx.Param))
    assert values.keys() == {path for path, _ in state}
    nnx.update(other, nnx.from_flat_state([(path, values[path]) for path, _ in state]))
    return other


def accuracy(folder, config: Config) -> float:
    """Of the first 32 examples of the test split, by hand."""
    task = build_task(edit(config, batch=evaluation.UNIT, data_seed=0))
    batch = task.batch("test", 0)
    logits = np.asarray(fresh(folder, config)(batch.inputs, valid=batch.valid)[0])
    return float(((logits.argmax(-1) == batch.targets) * batch.weights).sum() / batch.weights.sum())


def test_a_threshold_scores_as_the_run_that_was_trained_with_it(exits, runs):
    """Training runs all layers, so both have the same parameters."""
    config, folder = exits
    other, its = train(runs, **EXITS | {"depth": f"early_exit:threshold={SURE}"})
    one, as_trained, there = (
        trained.evaluate(folder, asked={"depth.threshold": SURE}),
        trained.evaluate(folder),
        trained.evaluate(its),
    )
    for key in ("metric", "loss", "metric_interval", "computation", "aux", "by_position", "examples"):
        assert one[key] == there[key], key
    assert 2 < one["computation"] < as_trained["computation"] == 4 and one["loss"] != as_trained["loss"]
    assert one["metric"] == pytest.approx(accuracy(folder, other))
    # What none stands for is said, and the row is still of the run.
    assert one["depth.threshold"] == SURE and one["changed"] == {"depth.threshold": [0.9, SURE]}
    assert one["id"] == configs.identity(config) and "changed" not in as_trained


@pytest.mark.full
def test_several_values_and_lengths_are_a_grid(exits):
    _, folder = exits
    rows = trained.evaluate_at(folder, [16, 8], {"depth.threshold": [SURE, None], "attention.window": "4"})
    places = [(row["depth.threshold"], row["attention.window"], row["seq_len"]) for row in rows]
    assert places == [(threshold, 4, length) for threshold in (SURE, None) for length in (16, 8)]
    assert [row.get("changed") for row in rows] == [{"depth.threshold": [0.9, SURE]}] * 2 + [None] * 2
    assert rows[2]["loss"] == trained.evaluate(folder)["loss"]
    assert rows[3]["loss"] == trained.evaluate(folder, length=8)["loss"]
    assert len({row["loss"] for row in rows}) == 4


def test_eval_is_a_command(exits, capsys, caplog):
    _, folder = exits
    one = trained.evaluate(folder, asked={"depth.threshold": SURE})
    caplog.clear()
    assert main(["eval", str(folder), f"depth.threshold={SURE}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == one
    assert caplog.messages == [f"depth.threshold is {SURE}, trained with 0.9"]
    assert main(["eval", str(folder), f"depth.threshold={SURE}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["depth.threshold", f"{SURE},", "trained", "with", "0.9"] in lines
    assert main(["eval", str(folder), f"depth.threshold={SURE},0.9", "depth.threshold=none"]) == 0
    head, *shown = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["depth.threshold", "accuracy"] and "layers/token" in head
    assert [line.split()[0] for line in shown] == [str(SURE), "0.9", "none"]
    assert f"{one['computation']:.3g}" in shown[0].split() and "4" in shown[2].split()


def test_an_option_is_changed_in_each_choice_of_a_cycle_that_has_it(exits, caplog):
    config, folder = exits
    row = trained.evaluate(folder, asked={"attention.window": 1})
    assert row["metric"] == pytest.approx(accuracy(folder, edit(config, attention="local:window=1+full")))
    assert row["changed"] == {"attention.window": [4, 1]}
    assert "attention.window is 1 in local:window=4, not in full, trained with 4" in caplog.text
    with pytest.raises(UsageError, match=r'attention=local:window=4\+full, without an option "stride"'):
        trained.evaluate(folder, asked={"attention.stride": 1})


def test_different_values_of_a_cycle_are_all_said():
    config = tiny("copy", attention="local:window=4+full+local:window=8+topk:keys=3", layers=4, position="none")
    other = otherwise.at(config, build_task(config), asked={"attention.window": 8})
    assert other.config.model.attention == "local:window=8+full+local:window=8+topk:keys=3"
    assert other.changed == {"attention.window": ["4+8", 8]}
    said = "attention.window is 8 in local:window=4 and local:window=8, not in full and topk:keys=3, trained with 4+8"
    assert other.said() == said


def test_what_goes_by_the_length_is_told_beside_what_is_asked_for():
    config = tiny("copy", attention="strided+local:window=4", layers=2, position="none")
    other = otherwise.at(config, build_task(config), 36, {"attention.window": 2})
    assert other.changed == {"attention.window": [4, 2], "attention.stride": [4, 6]}
    assert (other.said() or "").startswith(
        "seq_len=36: attention.window is 2 in local:window=4, not in strided, trained"
    )
    # An option that says what went by the length ends that.
    other = otherwise.at(config, build_task(config), 36, {"attention.stride": 5})
    assert other.changed == {"attention.stride": [4, 5]}
    # The last layer of two says its stride, the first one does not.
    config = edit(config, attention="strided+strided:stride=4")
    assert otherwise.at(config, build_task(config), 36).changed == {"attention.stride": [4, 6]}


@pytest.mark.full
def test_steps_of_a_recurrent_depth_are_layers(runs):
    config, folder = train(runs, depth="universal", layers=2)
    rows = trained.evaluate_at(folder, [], {"layers": "2,3"})
    assert rows[0]["loss"] == trained.evaluate(folder)["loss"] and "changed" not in rows[0]
    assert rows[1]["metric"] == pytest.approx(accuracy(folder, edit(config, layers=3)))
    assert rows[1]["changed"] == {"layers": [2, 3]} and rows[1]["loss"] != rows[0]["loss"]


@pytest.mark.full
def test_the_stride_of_windows_is_an_option_of_the_task(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{number} bottles of beer on the wall.\n" for number in range(900)))
    _, folder = train(tmp_path, task=f"lm:path={book}")
    row = trained.evaluate(folder, asked={"task.stride": 4})
    assert row["changed"] == {"task.stride": [16, 4]} and row["task.stride"] == 4
    _, its = train(tmp_path, task=f"lm:path={book}:stride=4")
    assert row["loss"] == trained.evaluate(its)["loss"] != trained.evaluate(folder)["loss"]
    # At a shorter length a stride is longer than a window, unless another one is asked for.
    with pytest.raises(UsageError, match="stride=4: use 1 to seq_len=2"):
        trained.evaluate(its, length=2)
    assert trained.evaluate(its, length=2, asked={"task.stride": 2})["changed"] == {"task.stride": [4, 2]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention.windw=2"], 'without an option "windw": did you mean "window"? (options: tokens, window)'),
        (["norm.eps=1"], 'the run has norm=pre, without an option "eps": (options: normaliser)'),
        (["atention.window=2"], 'eval takes no "atention": did you mean "attention"'),
        (["depth=fixed"], "eval keeps a run's choices; name what changes of it, depth.OPTION=value"),
        (["depth.=2"], "depth.OPTION=value"),
        (["depth.threshold"], '"depth.threshold" has no value'),
        (["depth.threshold=x"], 'depth.threshold=x wants a number, got "x"'),
        (["depth.threshold=0.5,-1"], "threshold must be at least 0, got -1"),
        (["depth.exit=never"], 'depth.exit=never: unknown value "never"'),
        (["layers=0"], "layers must be at least 1"),
        (["layers=6"], "layers=6: depth=early_exit has kernel of 1x16x16 as trained and of 2x16x16 so"),
        (["dim=32"], "dim=32: the model has embedding of"),
        (["ffn.ratio=2"], "ffn.ratio=2"),
        (["norm.normaliser=rmsnorm"], "norm=pre has bias of 16 as trained and of nothing so"),
        (["task.symbols=5"], "task copy has vocab="),
        (["attention.window=2", "seq_len=2"], "holds no copy"),
    ],
)
def test_what_cannot_be_is_refused(exits, capsys, words, message):
    """Before anything is scored: a value before it that could be is not."""
    _, folder = exits
    assert main(["eval", str(folder), *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_every_parameter_is_compared():
    """A narrower layer has other ones, another activation the same."""
    config = tiny("copy", position="none", ffn="mlp:ratio=4")
    with pytest.raises(
        UsageError, match=r"ffn\.ratio=2: ffn=mlp:ratio=4 has \w+ of [x0-9]+ as trained and of [x0-9]+ so"
    ):
        otherwise.at(config, build_task(config), asked={"ffn.ratio": 2})
    config = edit(config, ffn="mlp")
    assert otherwise.at(config, build_task(config), asked={"ffn.activation": "relu"}).changed.keys() == {
        "ffn.activation"
    }


def test_what_was_drawn_for_the_run_cannot_be_drawn_otherwise():
    """Random features are no parameters: a checkpoint has them, so that the option would change nothing."""
    config = tiny("copy", position="none", attention="performer:features=8")
    task = build_task(config)
    with pytest.raises(UsageError, match=r"performer:features=8 draws another projection so"):
        otherwise.at(config, task, asked={"attention.rows": "independent"})
    with pytest.raises(UsageError, match=r"has projection of [x0-9]+ as trained"):
        otherwise.at(config, task, asked={"attention.features": 4})
    assert otherwise.at(config, task, asked={"attention.epsilon": 0.1}).changed == {"attention.epsilon": [0.0, 0.1]}


@pytest.mark.full
def test_what_a_memory_keeps_may_be_longer(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{number} bottles of beer on the wall.\n" for number in range(900)))
    _, folder = train(tmp_path, task=f"lm:path={book}", memory="xl:length=4", position="rope", batch=4)
    rows = trained.evaluate_at(folder, [], {"memory.length": [4, 16]})
    assert rows[0]["loss"] == trained.evaluate(folder)["loss"] != rows[1]["loss"]
    assert rows[1]["changed"] == {"memory.length": [4, 16]}


def test_a_grid_has_an_end_and_a_value_is_one_row():
    config = tiny("copy", attention="local")
    assert options.grid(config, "decoder", {}) == [{}]
    assert options.grid(config, "decoder", {"attention.window": "4..8:x2,4", "layers": [1]}) == [
        {"attention.window": 4, "layers": 1},
        {"attention.window": 8, "layers": 1},
    ]
    assert options.grid(config, "decoder", {"norm.normaliser": "(powernorm:decay=0.9)"}) == [
        {"norm.normaliser": "powernorm:decay=0.9"}
    ]
    with pytest.raises(UsageError, match="these options make 250,000 rows"):
        options.grid(config, "decoder", {"attention.window": "1..500", "attention.tokens": "1..500"})
    with pytest.raises(UsageError, match="an empty list"):
        options.grid(config, "decoder", {"attention.window": []})


def test_the_model_that_is_found_has_its_options_too():
    config = tiny("listops", model="auto")
    changed, (change,) = options.changed(config, "encoder", {"model.pool": "first"})
    assert changed.model.model == "encoder:pool=first" and change.name == "model.pool"


@pytest.mark.full
def test_sizes_are_one_value(runs):
    config, folder = train(runs, attention="axial:shape=4x4", position="none")
    row = trained.evaluate(folder, asked={"attention.shape": "2x8"})
    assert row["changed"] == {"attention.shape": [[4, 4], [2, 8]]} and row["attention.shape"] == [2, 8]
    assert row["metric"] == pytest.approx(accuracy(folder, edit(config, attention="axial:shape=2x8")))
