"""Aggregates over tasks: the interquartile mean and its interval, against worked values and rliable."""

import html as markup
import importlib

import numpy as np
import pytest
from report_rows import KEYS, cell, failed, printed, written
from study_rows import study

from xformers_lab.report import aggregate, rows

# Scores of tasks x seeds, and what rliable 1.2.0 makes of them (arch 7.2.0, 50,000 draws): the interquartile mean and
# the ends of its interval.
RLIABLE = [
    (
        [[0.2, 0.224, 0.178, 0.129, 0.164], [0.471, 0.555, 0.657, 0.511, 0.5], [0.939, 0.929, 0.908, 0.826, 0.898]],
        0.538,
        0.5061111111111111,
        0.5752222222222223,
    ),
    (
        [
            [0.256, 0.092, 0.163, 0.048, 0.097, 0.053, 0.181, 0.099, 0.222, 0.213],
            [0.418, 0.232, 0.39, 0.429, 0.442, 0.311, 0.395, 0.355, 0.369, 0.518],
            [0.602, 0.664, 0.737, 0.62, 0.658, 0.676, 0.672, 0.569, 0.673, 0.775],
            [0.776, 0.969, 0.91, 0.849, 1.0, 0.961, 0.804, 0.906, 0.946, 0.885],
        ],
        0.52645,
        0.49675,
        0.5541500000000001,
    ),
    ([[0.255, 0.195, 0.253], [1.0, 0.846, 0.916]], 0.5675, 0.535, 0.6265000000000001),
]


def groups(cells, keys=(*KEYS, "seed")):
    return rows.groups(cells, keys)


def tasks(scores: dict, names=("mqar", "copy", "lm"), **more) -> list[dict]:
    """A row for each variant, task and seed: the metric is the score, between a guess (0.2) and 1, or 8 bits and 0."""
    cells = []
    for task in names:
        for name, many in scores.items():
            for seed, score in enumerate(many):
                metric = 8 * (1 - score) if task == "lm" else 0.2 + 0.8 * score
                chance = 8.0 if task == "lm" else 0.2
                cells.append(cell(name, task=task, seed=seed, metric=metric, chance=chance, **more))
    return cells


def test_the_interquartile_mean_cuts_a_quarter_at_each_end():
    assert aggregate.interquartile_mean(np.arange(1.0, 9)) == 4.5
    assert aggregate.interquartile_mean(np.array([0, 0.5, 0.6, 100.0])) == pytest.approx(0.55)
    assert aggregate.interquartile_mean(np.array([1.0, 2, 6])) == 3  # three quarters of a value are none
    assert aggregate.interquartile_mean(np.array([[3.0, 1], [5, 9]])).tolist() == [2, 7]


@pytest.mark.parametrize("at", range(3))
def test_numbers_are_those_of_rliable(at):
    scores, mean, low, high = RLIABLE[at]
    assert aggregate.interquartile_mean(np.ravel(scores)) == pytest.approx(mean, abs=1e-9)
    assert aggregate.bootstrap(np.array(scores)) == pytest.approx((low, high), abs=0.004)


def test_rliable_agrees_where_it_is_installed():
    pytest.importorskip("rliable")
    try:
        library, metrics = (importlib.import_module(f"rliable.{name}") for name in ("library", "metrics"))
    except TypeError as error:  # arch 7.2, which it needs, beside pandas 3
        pytest.skip(f"rliable does not import beside this pandas: {error}")
    scores = np.random.default_rng(1).uniform(0, 1, (4, 6))
    mean, interval = library.get_interval_estimates(
        {"mine": scores.T}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=5000
    )
    assert aggregate.interquartile_mean(scores.ravel()) == pytest.approx(mean["mine"][0])
    assert aggregate.bootstrap(scores) == pytest.approx(interval["mine"].ravel(), abs=0.01)


def test_seeds_are_drawn_within_each_task():
    """Tasks that differ by far more than their seeds do not make the interval wide, and equal seeds make none."""
    scores = np.array([[0.1, 0.11, 0.09], [0.9, 0.91, 0.89]])
    low, high = aggregate.bootstrap(scores)
    assert low < 0.5 < high and high - low < 0.03
    assert aggregate.bootstrap(scores) == (low, high)  # the same each time
    assert aggregate.bootstrap(np.array([[0.3] * 5, [0.5] * 5])) == pytest.approx((0.4, 0.4))


def test_scores_are_shares_of_what_is_gained_over_a_guess():
    (most,) = groups([cell(chance=0.2)])
    assert [aggregate.normalised(most, metric) for metric in (0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1])
    assert aggregate.normalised(most, 27.3) is None  # a metric of another range
    (least,) = groups([cell(task="lm")])
    assert [aggregate.normalised(least, metric) for metric in (8.0, 2.0, 0.0)] == pytest.approx([0, 0.75, 1])
    (unknown,) = groups([cell(task="lm", chance=None)])
    assert aggregate.normalised(unknown, 2.0) is None


def test_tasks_are_joined_whatever_their_metric():
    """Every task says the same in its own units, so the aggregate is that of one."""
    scores = {"full": (0.5, 0.52, 0.48), "linear": (0.7, 0.71, 0.69), "axial": (0.5, 0.49, 0.52)}
    overall = aggregate.over_tasks(groups(tasks(scores)))
    assert overall is not None and overall.tasks == 3 and overall.settings[0] == "mqar at 64 tokens"
    assert [(score.series, score.seeds) for score in overall.scores] == [("linear", 3), ("axial", 3), ("full", 3)]
    assert [score.mean for score in overall.scores] == pytest.approx([0.7, 0.503, 0.5], abs=0.004)
    assert all(score.low is not None and score.low < score.mean < (score.high or 0) for score in overall.scores)
    text = " ".join(aggregate.sentences(groups(tasks(scores))))
    assert "Over 3 tasks, by the interquartile mean of what is gained over a guess, 1 at most: linear 0.7" in text
    assert "Against full, the reference (2 paired t-tests, Holm-corrected), better: linear (+0.200 [" in text
    assert "; not distinguishable: axial." in text


def test_the_page_says_the_same_over_all_tasks_and_what_was_said_of_the_whole(tmp_path):
    cells = tasks({"full": (0.5, 0.51), "linear": (0.7, 0.72)})
    page = written(tmp_path / "r.html", cells, [*KEYS, "seed"], said=["left out: <b>LSTM</b>"])
    assert "<h2>Over all tasks</h2>" in page and "left out: &lt;b&gt;LSTM&lt;/b&gt;" in page
    assert all(markup.escape(sentence) in page for sentence in aggregate.sentences(groups(cells)))
    one = written(tmp_path / "one.html", [row for row in cells if row["task"] == "lm"], [*KEYS, "seed"])
    assert "Over all tasks" not in one


def test_one_task_has_no_aggregate_and_one_seed_no_interval():
    assert aggregate.over_tasks(groups(study())) is None and aggregate.sentences(groups(study())) == []
    assert "over all tasks" not in printed(study(), (*KEYS, "seed"))
    one = tasks({"full": (0.5,), "linear": (0.7,)})
    overall = aggregate.over_tasks(groups(one))
    assert overall is not None and {score.low for score in overall.scores} == {None}
    text = " ".join(aggregate.sentences(groups(one)))
    assert "linear 0.700 and full 0.500." in text and "better" not in text and "istinguishable" not in text


def test_what_has_no_result_in_a_task_is_named_and_not_averaged():
    cells = tasks({"full": (0.5, 0.6), "linear": (0.7, 0.8)})
    cells = [row for row in cells if (row["attention"], row["task"]) != ("linear", "lm")]
    cells += [failed("oom", "no room", attention="linear", task="lm")]
    overall = aggregate.over_tasks(groups(cells))
    assert overall is not None and [score.series for score in overall.scores] == ["full"]
    assert "Not over all tasks: linear (no result: lm at 64 tokens)." in aggregate.sentences(groups(cells))


def test_a_task_whose_range_is_not_known_is_left_out_and_said():
    cells = tasks({"full": (0.5, 0.6), "linear": (0.7, 0.8)}) + [
        cell(name, task="translate", seed=seed, metric=20.0 + seed, metric_name="BLEU", chance=None)
        for name in ("full", "linear")
        for seed in range(2)
    ]
    overall = aggregate.over_tasks(groups(cells))
    assert overall is not None and overall.left_out == ["translate"] and overall.tasks == 3
    assert "Left out, since the range of the metric is not known: translate." in aggregate.sentences(groups(cells))


def test_baselines_are_beside_and_lengths_are_tasks_of_their_own():
    cells = tasks({"full": (0.5, 0.6, 0.55), "linear": (0.7, 0.8, 0.75)})
    cells += [row | {"seq_len": 128} for row in cells]
    cells += [
        row | {"role": "baseline", "name": "LSTM", "metric": row["metric"]}
        for row in cells
        if row["attention"] == "full"
    ]
    overall = aggregate.over_tasks(groups(cells))
    assert overall is not None and overall.tasks == 3 and len(overall.settings) == 6
    assert [score.series for score in overall.of_role("baseline")] == ["LSTM"] and len(overall.of_role("variant")) == 2
    text = printed(cells, (*KEYS, "seed"))
    assert "over all tasks" in text and "LSTM (baseline)" in text and "Over 3 tasks (6 with their lengths)" in text
    assert "Of the baselines, the best is LSTM 0.55" in text
