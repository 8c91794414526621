"""ema: a moving average of the parameters, which is what is scored, saved, loaded and begun with."""

import json
import pathlib

import jax
import kinds
import numpy as np
import pytest
from flax import nnx
from test_selection import FAST, saved
from test_train import PLAIN, TASK, tiny

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import edit
from xformers_lab.model import build_task
from xformers_lab.report import sizes as shown
from xformers_lab.train import checkpoint, initial, jobs, loop, optimizer, prefetch, programs, selection, sizes, trained
from xformers_lab.train.layout import plan
from xformers_lab.train.state import abstract, init, structure
from xformers_lab.train.step import make_train_step

RATE = 0.9
RUN = {"ema": RATE, "steps": 7, "eval_every": 2, "save_every": 3, "dropout": 0.1, "lr": 0.05}


@pytest.fixture(scope="module")
def task_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "uneven.py"
    path.write_text(TASK)
    return str(path)


@pytest.fixture(scope="module")
def whole(task_file, tmp_path_factory) -> dict:
    return loop.run(tiny(task_file, tmp_path_factory.mktemp("whole"), **RUN))


def leaves_of(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def states(task_file: str, steps: int, **changes) -> list:
    """The state before the first step and after each."""
    config = edit(tiny(task_file), **(PLAIN | {"lr": 0.1} | changes))
    task = build_task(config)
    tx = optimizer.of(config, task)
    step = jax.jit(make_train_step(config, task, structure(config, task), tx))
    found = [init(config, task, tx)]
    for number in range(steps):
        found.append(step(found[-1], prefetch.checked(task, "train", number))[0])
    return found


def test_the_average_is_that_of_all_steps_that_were_not_skipped(task_file, monkeypatch):
    """Weights fall by the rate from step to step and add up to 1; step 3 is spoilt."""
    monkeypatch.setenv("SPOIL", "2")
    _, *after = states(task_file, 5, ema=RATE)
    assert [int(state.skipped) for state in after] == [0, 0, 1, 1, 1]
    applied = [state for number, state in enumerate(after) if number != 2]
    for leaf, one in zip(leaves_of(after[0].average), leaves_of(after[0].params), strict=True):
        assert leaf.tobytes() == one.tobytes(), "what the parameters were at first leaves no trace"
    for leaf, one in zip(leaves_of(after[2].average), leaves_of(after[1].average), strict=True):
        assert leaf.tobytes() == one.tobytes(), "a skipped step is none"
    for count in (2, 4):
        weights = RATE ** np.arange(count)[::-1]
        parts = [leaves_of(state.params) for state in applied[:count]]
        for leaf, *each in zip(leaves_of(applied[count - 1].average), *parts, strict=True):
            np.testing.assert_allclose(leaf, np.average(each, axis=0, weights=weights), atol=1e-6)


def test_it_changes_nothing_in_training(task_file):
    alone, beside = states(task_file, 4)[-1], states(task_file, 4, ema=RATE)[-1]
    assert alone.average is None and alone.rates.ema is None
    for a, b in zip(leaves_of(alone.params), leaves_of(beside.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_of_rate_0_it_is_the_last_parameters(task_file):
    last = states(task_file, 3, ema=0.0)[-1]
    for a, b in zip(leaves_of(last.average), leaves_of(last.params), strict=True):
        assert a.tobytes() == b.tobytes()


def test_of_a_rate_that_is_1_but_for_rounding_it_is_the_mean_of_all_steps(task_file):
    _, *after = states(task_file, 3, ema=1 - 1e-12)
    assert int(after[-1].skipped) == 0
    for leaf, *each in zip(leaves_of(after[-1].average), *(leaves_of(state.params) for state in after), strict=True):
        np.testing.assert_allclose(leaf, np.mean(each, axis=0), atol=1e-6)


def test_whoever_uses_the_run_gets_the_average(whole, caplog, capsys):
    folder, arrays = whole["run_dir"], saved(whole["run_dir"])
    assert whole["averaged"] == RATE
    scored = trained.evaluate(folder)
    assert (scored["metric"], scored["loss"], scored["averaged"]) == (whole["metric"], whole["loss"], RATE)
    assert "ema=0.9: the parameters are their average up to step 7" in caplog.text
    _, _, model = trained.load(folder)
    of_model = checkpoint.named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for name, leaf in of_model.items():
        assert np.asarray(leaf).tobytes() == arrays[f"average.{name}"]
    assert any(arrays[f"average.{name}"] != arrays[f"params.{name}"] for name in of_model)
    assert main(["eval", folder]) == 0
    assert "averaged" in capsys.readouterr().out


def test_what_is_scored_is_not_the_last_parameters(whole, task_file, tmp_path):
    plain = loop.run(tiny(task_file, tmp_path, **(RUN | {"ema": None})))
    assert "averaged" not in plain and whole["id"] != plain["id"]
    near = lambda record: np.array([point[1] for point in record["curve"]])
    np.testing.assert_allclose(near(whole), near(plain), atol=1e-5)
    assert abs(whole["loss"] - plain["loss"]) > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("after", kinds.every_third([4, 1, 2, 6]))
@pytest.mark.parametrize("select", ["last", "best"])
def test_interrupted_and_resumed_it_is_the_same(task_file, tmp_path, after, select):
    changes = (FAST | {"ema": RATE}) if select == "best" else RUN
    expected, seen = loop.run(tiny(task_file, tmp_path / "whole", **changes)), []
    config = tiny(task_file, tmp_path / "again", **changes)
    with pytest.raises(loop.Interrupted):
        loop.run(config, progress=lambda step, *_: seen.append(step), stop=lambda: len(seen) >= after)
    record = loop.run(config, resume=True)
    for key in ("loss", "metric", "step", "steps", "validation", "id"):
        assert record[key] == expected[key], key
    arrays = saved(record["run_dir"])
    assert any(".average." in f".{name}" for name in arrays) and arrays == saved(expected["run_dir"])


def test_what_counts_is_the_average_with_and_without_a_best(task_file):
    state = states(task_file, 3, ema=RATE)[-1]
    best = selection.best_of(state)
    for counting in (selection.scored(state), selection.chosen(state, best), selection.chosen(state, None)):
        assert counting.average is None and int(counting.step) == 3
        for a, b in zip(leaves_of(counting.params), leaves_of(state.average), strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.full
@pytest.mark.parametrize("select", ["last", "best"])
def test_a_run_that_begins_with_it_takes_the_average(task_file, tmp_path, select):
    first = loop.run(tiny(task_file, tmp_path / "first", **(RUN | {"select": select})))
    config = tiny(task_file, tmp_path, init=first["run_dir"], ema=0.5)
    task, arrays = build_task(config), saved(first["run_dir"])
    matched = initial.match(config, task)
    assert matched.record()["averaged"] and "the average up to step 7" in matched.said()
    tx = optimizer.of(config, task)
    taken = initial.take(matched, init(config, task, tx), tx)
    where = "best.params" if select == "best" else "average"
    for name, leaf in checkpoint.named_leaves(taken.params).items():
        assert np.asarray(leaf).tobytes() == arrays[f"{where}.{name}"]
    for a, b in zip(leaves_of(taken.average), leaves_of(taken.params), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.full
def test_a_longer_run_goes_on_with_it(task_file, tmp_path):
    steady = {"schedule": "constant", "warmup": 0, "eval_every": 0}
    first = tiny(task_file, tmp_path, **(RUN | steady))
    loop.run(first)
    assert main(["resume", str(configs.folder(first)), "steps=9", "--json"]) == 0
    longer = edit(first, steps=9)
    expected = loop.run(edit(longer, runs=str(tmp_path / "whole")))
    assert saved(configs.folder(longer)) == saved(expected["run_dir"])


def test_its_bytes_are_counted(task_file, tmp_path):
    with_it, without = (sizes.of(tiny("copy", tmp_path, ema=rate))["training_bytes"] for rate in (RATE, None))
    assert with_it["average"] == with_it["parameters"] and without["average"] == 0
    assert with_it["total"] >= without["total"] + with_it["parameters"]
    others = {"decoding_bytes": {"why_not": "it is not asked"}, "parameters": {"parts": {}, "total": 1}}
    listed = lambda training: [row["bytes"] for row in shown.in_bytes({"training_bytes": training} | others)]
    assert "training: average" in listed(with_it) and "training: average" not in listed(without)


def test_rates_share_a_program_and_only_they(task_file, tmp_path):
    program = lambda **changes: jobs.prepare(tiny(task_file, tmp_path, **changes), tmp_path).program
    programs.forget()
    assert program(ema=0.9) is program(ema=0.5, seed=1) is program(ema=0.0) is not program()
    programs.forget()


def test_it_lies_where_the_parameters_do(tmp_path):
    config = tiny("copy", tmp_path, ffn="moe", layout="experts:2+fsdp:2", ema=RATE)
    task = build_task(config)
    places = plan(config, task, 4).of_state(abstract(config, task, optimizer.of(config, task)))
    assert places.average == places.params
    assert any(any(place.spec) for place in jax.tree.leaves(places.params))


@pytest.mark.parametrize("word, message", [("ema=1", "must be below 1"), ("ema=-0.1", "must be at least 0")])
def test_what_is_no_rate_is_refused(word, message, capsys):
    assert main(["train", "task=copy", word]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_from_before_there_were_averages_is_still_one(whole):
    """Without `ema` the state has no array more than it had."""
    config = edit(configs.stored(pathlib.Path(whole["run_dir"]) / "config.json", trust=True), ema=None)
    task = build_task(config)
    names = checkpoint.named_leaves(abstract(config, task, optimizer.of(config, task)))
    assert not [name for name in names if "average" in name or "ema" in name]
    assert json.dumps(configs.decisive(config)).count("ema") == 0
