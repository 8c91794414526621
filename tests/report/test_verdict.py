"""The verdict in words: who won, by how much, at what cost, and how the study was done; only what the numbers carry."""

import re

import pytest
from report_rows import cell, failed, printed
from study_rows import study

from xformers_lab.report import findings, notes, rows

KEYS = ["attention", "seq_len", "seed"]


def verdict(cells, keys=KEYS) -> str:
    (group,) = rows.groups(cells, keys)
    return "\n".join(findings.sentences(group))


def scored(scores: dict, **more) -> list[dict]:
    """A row for each seed of each variant."""
    return [
        cell(name, seed=seed, metric=value, **more) for name, many in scores.items() for seed, value in enumerate(many)
    ]


# ---- better, worse, not distinguishable -------------------------------------------------------------------------


def test_the_reference_is_full_attention_or_the_first_variant():
    (group,) = rows.groups([cell("linear"), cell("full"), cell("axial")], ["attention"])
    assert group.reference == "full"
    (group,) = rows.groups([cell("linear"), cell("axial")], ["attention"])
    assert group.reference == "linear"
    (group,) = rows.groups([cell(role="baseline", name="LSTM"), cell(norm="post"), cell(norm="pre")], ["norm"])
    assert group.reference == "post"


def test_better_and_worse_are_of_corrected_tests():
    """Alone, each of ten would differ from the reference by p = 0.02; of ten, one such is nothing."""
    base = (0.50, 0.52, 0.48)
    gains = (0.05, 0.06, 0.07)  # mean 0.06, error 0.00577: p = 0.0091
    alone = scored({"full": base, "gain": [b + g for b, g in zip(base, gains, strict=True)]})
    text = verdict(alone)
    assert "Against full, the reference (1 paired t-test), better: gain (+0.060 [+0.035, +0.085])." in text
    still = {f"still{at}": [b + d for b, d in zip(base, (0.01, -0.01, 0.001 * at), strict=True)] for at in range(1, 10)}
    text = verdict(alone + scored(still))
    assert "better" not in text and "worse" not in text
    assert "nothing tells the variants apart by accuracy" in text or "not distinguishable: gain" in text


def test_a_metric_where_less_is_better_turns_the_words():
    text = verdict(scored({"full": (2.2, 2.3, 2.1), "linear": (2.4, 2.51, 2.3)}, task="lm"))
    assert "full has the best bits/byte" in text and "worse: linear (+0.203 [" in text


def test_who_is_not_told_from_the_best_is_of_all_pairs_where_the_best_is_not_the_reference():
    text = verdict(scored({"full": (0.30, 0.31, 0.32), "a": (0.90, 0.92, 0.94), "b": (0.93, 0.90, 0.91)}))
    assert "better: a (+0.610 [" in text and "b (+0.603 [" in text
    assert "Not distinguishable from a (3 paired t-tests, Holm-corrected over all pairs): b." in text


def test_a_reference_without_a_result_is_said():
    cells = [failed("oom", "no room", attention="full", seed=seed) for seed in range(3)]
    text = verdict(cells + scored({"a": (0.9, 0.92, 0.94), "b": (0.3, 0.31, 0.32)}))
    assert "full, the reference, has no result here" in text and "Without a result at this length: full" in text


def test_one_seed_is_ranked_and_not_tested():
    text = verdict(study(seeds=(0,)))
    assert "linear has the best accuracy, 0.948" in text and "One seed: differences are not tested." in text
    assert not re.search(r"better|worse|istinguishable", text)


# ---- baselines, tuning, matching, range -------------------------------------------------------------------------


def test_the_verdict_of_a_study():
    text = verdict(study())
    for sentence in (
        "At 1,024 tokens: linear has the best accuracy, 0.950 ± 0.005 (chance 0.125).",
        "better: linear (+0.040 [+0.031, +0.049]); worse: bigbird (-0.200).",
        "At other lengths, the best by the mean: linear at 256 tokens.",
        "Cost beside full: linear 0.417 times the time and 0.5 times the memory.",
        "The best baseline, LSTM, scores 0.910 ± 0.005: worse than linear, the best variant (-0.040 [-0.047, -0.033]).",
        "Below LSTM: bigbird.",
        "Not distinguishable from LSTM: full.",
        "Tuning changes the ranking by means (the best was full, 0.900 ± 0.005): linear from place 2 to 1",
        "Tuning gains most for linear, from 0.800 ± 0.005 to 0.950 ± 0.005 (+0.150).",
        "Best at the end of the grid, so that more may be found beyond it: linear (lr 0.01).",
        "Unmatched in parameters, so that what they gain or lose may be due to it: bigbird (+8 %).",
        "the task does not need long range, window 16 is enough",
    ):
        assert sentence in text
    (group,) = rows.groups(study(), KEYS)
    assert "Held equal within 2 % at each length: parameters, but for bigbird (+8 %)." in notes.of_group(group)
    assert not any("LSTM" in note or "window" in note for note in notes.of_group(group))  # they are not compared


def test_what_a_file_holds_of_a_study_never_breaks_the_report():
    cells = study(lengths=(256,))
    odd = {
        "tuning": {"best": {"\x1b[31m": "x"}, "edge": True},
        "matched": {"budget": "\x1b[31m", "ok": False, "changed": 3},
    }
    for row, more in zip(cells, (odd, {"tuning": 1, "matched": 2, "shared": 3, "by_length": [4]}), strict=False):
        row.update(more)
    text = verdict(cells) + printed(cells, KEYS)
    assert "\x1b" not in text and r"\x1b[31m" in text


def test_a_baseline_that_does_better_is_named():
    cells = study(lengths=(256,))
    for row in cells:
        row["metric"] += 0.08 * (row.get("name") == "LSTM")
    text = verdict(cells)
    assert "LSTM, scores 0.990 ± 0.005: better than linear, the best variant (+0.040 [" in text
    assert "Below LSTM: full and bigbird." in text and "linear has the best accuracy" in text


def test_a_ranking_that_tuning_leaves_is_said():
    cells = [row for row in study() if row["attention"] != "linear"]
    text = verdict(cells)
    assert "Tuned as under the shared recipe, the variants rank alike by their means." in text
    assert "Best at the end" not in text


def test_tuning_that_gains_nothing_for_certain_is_said_so():
    cells = scored({"full": (0.90, 0.80, 0.94), "linear": (0.3, 0.31, 0.32)})
    for at, row in enumerate(cells):
        row["shared"] = {"status": "ok", "metric": row["metric"] - (0.2 if at == 0 else -0.01), "knobs": {}}
    assert "which is not distinguishable from none" in verdict(cells)


@pytest.mark.parametrize(
    ("full", "window", "words"),
    [
        ((0.90, 0.91, 0.89), (0.90, 0.91, 0.895), "the task does not need long range, window 16 is enough"),
        ((0.90, 0.91, 0.89), (0.30, 0.31, 0.32), "the task needs more than window 16."),
        ((0.90, 0.70, 0.80), (0.50, 0.75, 0.80), "too few seeds to tell whether the task needs long range."),
        ((0.12, 0.13, 0.125), (0.12, 0.13, 0.12), "it does no better than a guess, so that they say nothing of range."),
    ],
)
def test_windows_say_whether_a_task_needs_range(full, window, words):
    cells = scored({"full": full, "axial": (0.4, 0.41, 0.39)}) + [
        row | {"role": "range", "name": "window 16"} for row in scored({"local:window=16": window})
    ]
    assert words in verdict(cells)


def test_seeds_of_their_own_for_weights_and_data_are_pairs_too():
    draws = [(0, 1), (0, 2), (1, 1)]
    cells = [
        cell(name, init_seed=init, data_seed=data, metric=value + 0.01 * at + 0.1 * init)
        for name, value in (("full", 0.5), ("linear", 0.6))
        for at, (init, data) in enumerate(draws)
    ]
    (group,) = rows.groups(cells, ["attention", "init_seed", "data_seed"])
    assert [point.series for point in group.points] == ["full", "linear"] and rows.seeds(cells) == 3
    assert "better: linear (+0.100)" in "\n".join(findings.sentences(group))
    lost = failed("nan", "loss", attention="linear") | {"init_seed": 1, "data_seed": 2}
    text = printed([*cells, lost], ["attention", "init_seed", "data_seed"])
    assert "linear at 64 tokens, init_seed 1, data_seed 2: not a number: loss" in text


# ---- the table --------------------------------------------------------------------------------------------------


def test_the_table_of_a_study_has_both_recipes_and_what_was_matched():
    text = printed(study(), KEYS)
    head = next(line for line in text.splitlines() if "seq_len" in line)
    assert re.split(r"  +", head.strip())[:8] == [
        "seq_len",
        "attention",
        "accuracy, tuned",
        "shared recipe",
        "tuned lr",
        "matched in parameters",
        "accuracy @512",
        "accuracy @2,048",
    ]
    linear, full = (
        next(line for line in text.splitlines() if re.match(rf" +256 +{name} ", line)) for name in ("linear", "full")
    )
    assert "0.950 ± 0.005 *" in linear and "0.800 ± 0.005" in linear and "0.01 (edge)" in linear
    assert (
        "ffn=mlp:ratio=3.62" in linear
        and "as it is" in full
        and "unmatched (+8 %)" in text
        and "0.650 ± 0.005" in linear
    )


def test_baselines_and_windows_stand_below_the_variants_and_are_not_marked():
    cells = study()
    for row in cells:
        row["metric"] += 0.08 * (row.get("name") == "LSTM")
    text = printed(cells[::-1], KEYS)
    lines = [line for line in text.splitlines() if re.match(r" +(256|1024) ", line)]
    names = [re.split(r"  +", line.strip())[1] for line in lines]
    assert set(names[:3]) == {"full", "linear", "bigbird"} and names[3:5] == [
        "bag of tokens (baseline)",
        "LSTM (baseline)",
    ]
    assert all("(range)" in name for name in names[5:7])
    assert not any("*" in line for line in lines if "(baseline)" in line or "(range)" in line)
    assert "(baseline) and (range): not among the variants, not ranked" in text


def test_the_verdict_is_in_the_terminal_in_the_words_of_the_report():
    (group,) = rows.groups(study(), KEYS)
    text = printed(study(), KEYS)
    assert all(sentence in text.splitlines() for sentence in findings.sentences(group))


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_keeps_the_tuned_metric(width):
    text = printed(study(), KEYS, width=width, terminal=True)
    assert max(map(len, text.splitlines())) <= width
    assert "accuracy, tuned" in text and "0.950 ± 0.005 *" in text and "too narrow for: " in text
    assert ("shared recipe" in text.split("too narrow")[0]) == (width >= 80)


def test_what_scores_no_better_than_a_unigram_does_no_better_than_a_guess():
    cells = [cell("full", task="lm", metric=2.5), cell("linear", task="lm", metric=4.9)]
    assert "No better than" not in printed(cells, KEYS)
    cells = [row | {"data": {"unigram": 4.6}} for row in cells]
    text = printed(cells, KEYS)
    assert "chance 8.000 · unigram 4.600" in text and "No better than a guess: linear." in text


def timed(machines: dict[str, str]) -> list[dict]:
    """Two variants at two lengths, each measured by its machine; the second takes a quarter of the time."""
    speeds = {"full": 1e5, "linear": 4e5}
    better = {"full": 0.5, "linear": 0.6}

    def row(name: str, seq_len: int) -> dict:
        seconds = 64 * seq_len / speeds[name]
        times = {"tokens_per_second": speeds[name], "seconds_median": seconds, "seconds_min": seconds}
        return cell(name, seq_len=seq_len, metric=better[name], machine={"processor": machines[name]}) | times

    return [row(name, seq_len) for name in speeds for seq_len in (64, 128)]


@pytest.mark.parametrize("alike", [True, False])
def test_speeds_of_different_machines_are_not_ranked(alike):
    cells = timed({"full": "fast", "linear": "fast" if alike else "slow"})
    (group,) = rows.groups(cells, ["attention", "seq_len"])
    said = " ".join(findings.sentences(group))
    for words in ("Fastest to train is linear", "times the time", "Efficiency length, from which on time"):
        assert (words in said) is alike, words
    assert ("Not ranked by speed: different machines measured it." in said) is not alike
    assert bool(group.leading(128, group.speed)) is alike
    assert any("Measured on different machines" in note for note in notes.of(cells)) is not alike


def test_rows_without_times_say_why_and_several_hosts_are_named():
    cells = [cell("full", host="one"), cell("linear", host="two", untimed="up to 4 cells trained at once (-j 4)")]
    cells[1] |= dict.fromkeys(("tokens_per_second", "seconds_median", "seconds_min", "compile_seconds"))
    said = notes.of(cells)
    assert (
        "No times of 1 cell, since cells beside one another disturb them: up to 4 cells trained at once (-j 4)." in said
    )
    assert "Trained on 2 hosts: one (1 cell) and two (1 cell)." in said
    (group,) = rows.groups(cells, ["attention"])
    assert "full runs at" in " ".join(findings.sentences(group))
