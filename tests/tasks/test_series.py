"""Forecasting: windows of their split, standardised by the training rows, and a linear map to beat."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_tasks import build

from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS
from xformers_lab.tasks.series import linear


def table(path, values, header="date,a,b"):
    rows = [f"2020-01-{at},{','.join(map(str, row))}" for at, row in enumerate(values)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def walk(tmp_path):
    """Two random walks of 400 rows."""
    values = np.random.default_rng(0).standard_normal((400, 2)).cumsum(0).round(4)
    return table(tmp_path / "walk.csv", values), values


def test_windows_are_of_their_split_and_standardised_by_training_rows(walk):
    path, values = walk
    task = build(f"series:path={path}:horizon=5", 12)
    standard = (values - values[:280].mean(0)) / values[:280].std(0)
    assert [task.examples(split) for split in SPLITS] == [280 - 12 - 5 + 1, 40 - 5 + 1, 80 - 5 + 1]
    for split, first in (("train", 12), ("validation", 280), ("test", 320)):
        last = task.examples(split) - 1
        batch = task.take(split, np.array([0, last]))
        for row, at in enumerate((first, first + last)):
            np.testing.assert_allclose(batch.inputs[row], standard[at - 12 : at], atol=1e-5)
            np.testing.assert_allclose(batch.targets[row].reshape(5, 2), standard[at : at + 5], atol=1e-5)
    assert task.take("test", np.array([task.examples("test") - 1])).targets[0, -1] == pytest.approx(
        standard[399, 1], abs=1e-5
    )


def test_one_column_alone(walk):
    path, _ = walk
    task = build(f"series:path={path}:horizon=5:column=b", 12)
    assert (task.channels, task.outputs, task.describe()["columns"]) == (1, 5, ["b"])
    both = build(f"series:path={path}:horizon=5", 12).take("test", np.arange(3))
    np.testing.assert_array_equal(task.take("test", np.arange(3)).inputs[..., 0], both.inputs[..., 1])


@pytest.mark.parametrize("metric", ["mse", "mae"])
def test_errors_by_definition(walk, metric):
    task = build(f"series:path={walk[0]}:horizon=5:metric={metric}", 12)
    batch = task.batch("train", 3)
    guess = np.random.default_rng(1).standard_normal(batch.targets.shape).astype(np.float32)
    batch.weights[0] = 0
    errors = (guess - batch.targets)[1:].astype(np.float64)
    total, weight = task.metric(jnp.asarray(guess), batch)
    size = errors**2 if metric == "mse" else abs(errors)
    assert float(weight) == 15 and float(total) == pytest.approx(size.mean(1).sum(), rel=1e-5)
    assert float(task.loss(jnp.asarray(guess), batch)[0]) == pytest.approx((errors**2).mean(1).sum(), rel=1e-5)


def test_the_linear_map_is_found_where_there_is_one():
    """x[t] = 2 cos(w) x[t-1] - x[t-2], a wave: two values before say all that follow."""
    values = np.stack([np.sin(0.3 * np.arange(300) + shift) for shift in (0, 1)], 1)
    solution = linear(values, 4, 3)
    for at in (10, 250):
        last = values[at - 1, 0]
        reads = np.append(values[at - 4 : at, 0] - last, 1)
        np.testing.assert_allclose(reads @ solution + last, values[at : at + 3, 0], atol=1e-2)


def test_guessing_scores_what_the_linear_map_scores_on_the_test_split(walk):
    task = build(f"series:path={walk[0]}:horizon=5", 12)
    batch = task.take("test", np.arange(task.examples("test")))
    solution = linear(task.data.values[:280], 12, 5)
    last = batch.inputs[:, -1:]
    reads = np.concatenate([batch.inputs - last, np.ones((len(last), 1, 2))], 1)
    forecast = np.einsum("ntc,th->nhc", reads, solution) + last
    total, weight = task.metric(jnp.asarray(forecast.reshape(len(last), -1)), batch)
    assert float(total / weight) == pytest.approx(task.chance, rel=1e-4)
    repeated = np.broadcast_to(last, forecast.shape).reshape(len(last), -1)
    total, weight = task.metric(jnp.asarray(repeated), batch)
    assert float(total / weight) == pytest.approx(task.describe()["last_value_mse"], abs=1e-4)


def test_malformed_tables_are_named(tmp_path, walk):
    path = walk[0]
    lines = path.read_text().splitlines()
    for cell, says in (("", "is empty"), ("n/a", "is 'n/a'"), ("inf", "is 'inf'")):
        odd = [*lines[:7], f"d,1.5,{cell}", *lines[8:]]
        (tmp_path / "odd.csv").write_text("\n".join(odd))
        with pytest.raises(UsageError) as caught:
            build(f"series:path={tmp_path / 'odd.csv'}", 12)
        assert f"series: {tmp_path / 'odd.csv'}, line 8: " in str(caught.value) and says in str(caught.value)
    with pytest.raises(UsageError, match="columns: a, b"):
        build(f"series:path={path}:column=c", 12)
    with pytest.raises(UsageError, match="needs 96: use smaller ones"):
        build(f"series:path={path}", 12)
    with pytest.raises(UsageError, match="a does not vary over the training rows"):
        build(f"series:path={table(tmp_path / 'flat.csv', [(1, at) for at in range(100)])}:horizon=2", 4)
    with pytest.raises(UsageError, match="is no table"):
        build(f"series:path={tmp_path}", 12)


@pytest.mark.full
@pytest.mark.parametrize("model", ["encoder", "decoder", "lstm", "bag"])
def test_a_model_reads_numbers(walk, tmp_path, capsys, monkeypatch, model):
    """From the command line; beside the last value it is no worse than what it began with."""
    monkeypatch.chdir(tmp_path)
    words = [f"task=series:path={walk[0]}:horizon=2", f"model={model}", "seq_len=8", "dim=16", "layers=1", "steps=40"]
    words += ["heads=2"] if model in ("encoder", "decoder") else []
    assert main(["train", *words, "batch=8", "lr=1e-2", "eval_batches=all", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["status"] == "ok" and record["metric_name"] == "mse" and 0 < record["metric"] < 4
    assert record["examples"] == 80 - 2 + 1


def test_numbers_reach_the_first_layer_at_unit_size():
    from flax import nnx

    from xformers_lab.nn.embedding import Numbers

    x = np.random.default_rng(0).standard_normal((4, 200, 7)).astype(np.float32)
    y = Numbers(7, 64, rngs=nnx.Rngs(0))(jnp.asarray(x))
    assert y.shape == (4, 200, 64) and float(jnp.square(y).mean()) == pytest.approx(1, abs=0.25)


def test_the_published_borders_and_the_linear_map_on_ett(shared):
    """The errors of repeating the last value are those of the table itself, counted here without the task."""
    task = build(f"series:path={shared / 'data' / 'ett' / 'ETTh1.csv'}", 96)
    assert [task.describe()[f"{split}_rows"] for split in SPLITS] == [8640, 2880, 2880]
    assert [task.examples(split) for split in SPLITS] == [8449, 2785, 2785]
    table = np.loadtxt(shared / "data" / "ett" / "ETTh1.csv", delimiter=",", skiprows=1, usecols=range(1, 8))
    scaled = (table - table[:8640].mean(0)) / table[:8640].std(0)
    apart = np.stack([scaled[at : at + 96] - scaled[at - 1] for at in range(11520, 14400 - 96 + 1)])
    assert task.scores["last_value_mse"] == pytest.approx(np.square(apart).mean(), rel=1e-3)
    assert task.scores["last_value_mae"] == pytest.approx(np.abs(apart).mean(), rel=1e-3)
    assert task.chance < 0.4
