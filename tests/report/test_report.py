"""The report: numbers right, every cell kept, names harmless, and what must be told beside them."""

import io
import math
import re

import pytest
from report_rows import ATTENTIONS, HOSTILE, KEYS, bench, cell, failed, printed, sample, written
from rich.console import Console

from xformers_lab.report import findings, html, human, notes, pages, rows

# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (human.count, 950, "950"),
        (human.count, 1234, "1.2k"),
        (human.count, 999.7, "1k"),
        (human.count, 34_000_000, "34M"),
        (human.size, 512, "512 B"),
        (human.size, 3.4 * 2**20, "3.4 MiB"),
        (human.size, 2**30, "1 GiB"),
        (human.duration, 0.012, "12 ms"),
        (human.duration, 3.4e-4, "340 µs"),
        (human.duration, 0.9999, "1 s"),
        (human.duration, 200, "3 min 20 s"),
        (human.score, 0.98765, "0.988"),
        (human.score, 123.4, "123"),
        (human.score, math.nan, human.NONE),
        (human.size, None, human.NONE),
        (human.count, math.inf, human.NONE),
    ],
)
def test_numbers_are_written_for_people(form, value, text):
    assert form(value) == text


def test_plain_text_cannot_steer_a_terminal():
    assert human.plain("a\x1b[31m\n b\u202e\x07") == r"a\x1b[31m b\u202e\x07"


# ---- grouping and findings --------------------------------------------------------------------------------------


def test_series_are_named_by_what_varies():
    row = cell("local:window=16") | {"norm": "post", "dim": 64}
    assert rows.series(row, ["attention", "norm", "task", "seq_len", "seed"]) == "local:window=16 · post"
    assert rows.series(row, ["dim", "lr"]) == "dim=64 · lr=0.003"
    assert rows.series(row, ["seq_len"]) == "local:window=16"
    recurrent = cell() | {"config": {"model": {"model": "lstm", "attention": "full"}}}
    assert rows.series(recurrent, []) == "lstm · full"


def test_memory_is_the_peak_where_a_device_tells_it():
    assert rows.measure(cell(), "memory") == int(3.4 * 2**20)
    assert rows.measure(cell(peak_bytes=7), "memory") == 7
    assert rows.measure(failed("oom", "x"), "memory") is None


def test_findings_tell_the_best_and_the_fastest_at_the_longest_length():
    mqar, lm = (" ".join(findings.sentences(group)) for group in rows.groups(sample(), KEYS))
    assert "At 256 tokens: full has the best accuracy, 0.950 (chance 0.125)." in mqar
    assert "Fastest to train is axial, 500k tok/s, 20.0 times as fast as full (25k tok/s)." in mqar
    assert "One seed: differences are not tested." in mqar
    assert "full has the best bits/byte, 2.200" in lm
    assert "Without a result at this length: axial (failed)." in lm


def test_findings_with_seeds_say_what_cannot_be_told_apart():
    scores = {"a": (0.90, 0.92, 0.94), "b": (0.93, 0.90, 0.91), "c": (0.30, 0.32, 0.34), "d": (0.12, 0.13, 0.125)}
    cells = [cell(name, seed=seed, metric=value) for name, many in scores.items() for seed, value in enumerate(many)]
    (group,) = rows.groups(cells, ["attention", "seed"])
    text = " ".join(findings.sentences(group))
    assert "a has the best accuracy, 0.920 ± 0.050" in text
    assert "Against a, the reference (3 paired t-tests, Holm-corrected), worse: c (-0.600) and d (-0.795 [" in text
    assert "; not distinguishable: b." in text
    assert "No better than chance: d." in text
    assert "One seed" not in text
    # What cannot be told apart is marked alike, though its mean is lower.
    lines = printed(cells, ["attention", "seed"]).splitlines()
    assert [line.split()[0] for line in lines if re.search(r"± 0.\d+ \*", line)] == ["a", "b"]
    assert any("paired test" in line for line in lines)


def test_no_winner_is_named_where_nothing_beats_chance():
    cells = [cell(name, metric=value) for name, value in (("a", 0.10), ("b", 0.12))]
    lines = findings.sentences(rows.groups(cells, ["attention"])[0])
    assert lines[0] == "At 64 tokens: no variant does better than chance: the best accuracy is 0.120 (chance 0.125)."


# ---- the table in the terminal ----------------------------------------------------------------------------------


def test_table_keeps_every_cell_and_says_why_some_failed():
    text = printed(sample(), KEYS)
    assert len(re.findall(r"^ +(?:64|128|256) ", text, re.M)) == 30
    for words in (
        "out of memory: 3.1 GiB asked",
        "not a number: loss not finite at step 41",
        "failed: 8 x 8 is not 60",
    ):
        assert words in text
    assert "chance 0.125" in text and "chance 8.000" in text


def test_table_marks_the_best_by_the_direction_of_the_metric():
    text = printed(sample(), KEYS)
    marked = [line for line in text.splitlines() if re.search(r"\d \*", line)]
    best = [line.split()[1] for line in marked if re.search(r"^ +\d+ +\S+ +[\d.]+ \*", line)]
    # At 128 tokens of mqar, full ran out of memory, so the next is the best there.
    assert best == ["full", "local:window=16", "full", "full", "full", "full"]
    fastest = [line.split()[1] for line in text.splitlines() if re.search(r"\dk \*", line)]
    assert fastest == ["axial"] * 5 + ["linear"]


def test_what_is_the_same_in_all_lines_is_printed_once():
    text = printed(sample(), KEYS)
    assert text.count("132k") == 2
    assert "parameters 132k" in text


def test_markup_and_escapes_in_names_do_nothing():
    cells = sample(HOSTILE)
    text = printed(cells, KEYS, terminal=True, width=200)
    assert "[bold]x[/bold]" in text and "=1+1" in text
    assert "\x1b[31mred" not in text and "\u202e" not in text


@pytest.mark.parametrize("width", [44, 66, 120])
def test_narrow_terminals_lose_columns_not_lines(width):
    text = printed(sample(), KEYS, width=width, terminal=True)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("strided") >= 6 and "1.000" not in text and "0.950 *" in text
    assert ("too narrow for: " in text) == (width < 120)


def test_output_to_a_file_is_plain_and_uncut():
    text = printed(sample(("x" * 150, *ATTENTIONS[1:])), KEYS, width=40)
    assert "x" * 150 in text and "\x1b" not in text and "─" not in text and "too narrow" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_seeds_are_averaged_in_the_table():
    cells = [cell(seed=seed, metric=value) for seed, value in enumerate((0.8, 0.9, 1.0))]
    text = printed([*cells, failed("nan", "loss", seed=3), cell("linear")], ["attention", "seed"])
    assert "0.900 ± 0.248" in text and "seed 3" in text


def test_bench_rows_show_time_and_growth():
    cells = [bench("full", n, n * n * 1e-8, 2.0) for n in (256, 512)] + [bench("linear", 512, 1e-4, 1.0)]
    text = printed([row | {"config": cell()["config"]} for row in cells], ["attention", "seq_len"])
    assert text.splitlines()[0] == "forward" and "2.6 ms" in text and "N^2.00" in text and "100 µs *" in text


# ---- what must be known before numbers are compared -------------------------------------------------------------


HERE, ELSEWHERE = {"processor": "A", "jax": "1"}, {"processor": "B", "jax": "1"}


def test_cells_of_different_machines_are_told_apart(tmp_path):
    cells = [cell(name, machine=HERE) for name in ("full", "linear")]
    assert notes.of(cells) == [] and notes.machines(cells) == [(HERE, 2)]
    mixed = [*cells, cell("axial", machine=ELSEWHERE), cell("lite"), failed("oom", "x", attention="fnet")]
    (note,) = notes.of(mixed)
    assert note.endswith("do not compare: processor A (2 cells); processor B (1 cell); not recorded (1 cell).")
    assert note in " ".join(printed(mixed, ["attention"]).split())
    page = written(tmp_path / "r.html", mixed, ["attention"])
    assert note in page and "Machine of 2 cells" in page and "<dt>processor</dt><dd>B</dd>" in page


def test_a_bench_tells_what_it_timed_otherwise():
    one = bench("full", 64, 1e-3, 2.0)
    others = [one | {"attention": "fnet", "timed": "call", "causal": False, "checked": True}]
    assert notes.of([one | {"timed": "mix", "causal": True, "checked": True}, *others]) == [
        "Timed as a whole layer with its projections, which the others are without: fnet.",
        "Not causal, while the others are: fnet.",
    ]
    assert notes.of([one | {"timed": "mix", "causal": False, "checked": True}]) == []
    assert "without the conformance check" in notes.of([one | {"checked": False}])[0]
    assert notes.of([one | {"checked": False, "status": "failed"}]) == []
    assert (
        "YNNPACK" in notes.of([one | {"temp_bytes": 0}])[0]
        and notes.of([one | {"temp_bytes": 0, "peak_bytes": 9}]) == []
    )


def test_the_words_beside_the_numbers_are_those_of_what_was_run(tmp_path):
    trained = html._measures([cell(computation=2.5)])
    assert "training step" in trained["tokens/s"] and "whole model" in trained["parameters"]
    assert "layers/token" in trained and "state" not in trained
    decoded = bench("full", 64, 1e-3, 1.0) | {"pass": "decode", "tokens_per_second": 9.0, "state_bytes": 2**20}
    measures = html._measures([decoded | {"parameters": 3}])
    assert "one of each sequence" in measures["tokens/s"] and "projections" in measures["parameters"]
    assert not any("training" in words for words in measures.values())
    page = written(tmp_path / "r.html", [decoded], ["attention"])
    assert "What decoding keeps at 64 tokens" in page
    assert "1 MiB" in page[page.index("<tbody>") :] and "best at its pass and length" in page
    seeds = [cell(seed=seed) for seed in range(2)]
    assert "by the mean over the seeds" in written(tmp_path / "s.html", seeds, ["attention", "seed"])


def test_a_mechanism_alone_is_named_too(tmp_path):
    cells = [cell("local:window=16", seq_len=n) for n in (64, 128)]
    assert "attention local:window=16" in printed(cells, ["seq_len"])
    page = written(tmp_path / "r.html", cells, ["seq_len"])
    assert page[page.index('<table id="cells">') : page.index("<h2>What was run")].count("local:window=16") == 2


def test_a_record_is_written_for_people():
    page = io.StringIO()
    pages.print_record(cell(), Console(file=page, width=40))
    lines = dict(line.split(maxsplit=1) for line in page.getvalue().splitlines()[1:])
    assert lines["seconds_median"] == "12 ms" and lines["temp_bytes"] == "3.4 MiB" and lines["parameters"] == "132,480"


def test_no_rows_is_said():
    assert printed([], []) == "There are no rows to show.\n"


# ---- a first row without figures --------------------------------------------------------------------------------


def test_a_failed_first_row_takes_nothing_from_the_others():
    text = printed([failed("oom", "no room"), cell("linear")], ["attention"])
    head, first, second = (line.split() for line in text.splitlines()[2:5])
    assert {"accuracy", "tok/s", "FLOPs", "parameters"} <= {*head}
    assert first == ["full", "out", "of", "memory"] and {"0.900", "100k", "132k"} <= {*second}
    text = printed([failed("oom", "no room"), cell("linear"), cell("axial")], ["attention"])
    assert "tok/s 100k · time 12 ms" in text and "parameters 132k" in text


# ---- what differs beside what is compared -----------------------------------------------------------------------


def of_group(cells, keys):
    (group,) = rows.groups(cells, keys)
    return notes.of_group(group)


def test_rows_of_unequal_size_are_named_with_their_ratios(tmp_path):
    sizes = {"full": 100_000, "linformer": 147_000, "nsa": 223_000, "rope": 101_000, "lstm": 70_000}
    cells = [cell(name, parameters=size) for name, size in sizes.items()]
    (note,) = of_group(cells, ["attention"])
    assert note == (
        "Parameters differ by more than 2 % at 64 tokens: nsa 2.23 times, linformer 1.47 times and lstm 0.7 times "
        "those of full."
    )
    assert note in " ".join(printed(cells, ["attention"], width=60, terminal=True).split())
    assert note in written(tmp_path / "r.html", cells, ["attention"])
    assert of_group(cells[:1] + cells[3:4], ["attention"]) == []  # 1 %
    # Each is within 2 % of the first, and not of the other.
    spread = [cell(name, flops=flops) for name, flops in (("full", 1000), ("a", 985), ("b", 1015))]
    assert of_group(spread, ["attention"]) == [
        "FLOPs differ by more than 2 % at 64 tokens: a 0.985 times and b 1.01 times those of full."
    ]


def test_rows_that_are_scored_on_other_examples_are_named():
    part = {"examples": 64, "examples_of": 500}
    cells = [cell(name) | part for name in ("full", "local")] + [cell("xl", consecutive=True) | part]
    note = "Scored on other examples than the rest: xl, for what remembers reads on; eval_batches=all scores all."
    assert note in of_group(cells, ["attention"])
    assert (
        of_group(cells[:2], ["attention"])
        == of_group([row | {"consecutive": True} for row in cells], ["attention"])
        == []
    )
    assert of_group([row | {"examples": 500} for row in cells[:2]], ["attention"]) == []


def test_sizes_that_change_with_length_and_widths_are_told_too():
    cells = [cell("full", seq_len=n, parameters=p, flops=n) for n, p in ((32, 100), (128, 106))]
    assert of_group(cells, KEYS) == [
        "Parameters change with the length, from the shortest to the longest: 1.06 times (full)."
    ]
    assert "Widths (dim) differ by more than 2 %: dim=64 2 times those of dim=32." in of_group(
        [cell(dim=width) for width in (32, 64)], ["dim"]
    )


def test_a_busy_machine_is_a_warning_beside_the_times(tmp_path):
    cells = [cell("full", seconds_min=0.008, load=3.25), cell("linear"), cell("axial", seconds_ratio=1.2)]
    (note,) = of_group(cells, ["attention"])
    assert note.startswith("Warning: median over least time above 1.3") and "1.50 (full at 64 tokens)" in note
    assert note.endswith("load up to 3.2.") and note in printed(cells, ["attention"])
    page = written(tmp_path / "r.html", cells, ["attention"])
    assert "time/least" in page and ">load<" in page


# ---- what is noise is not crowned -------------------------------------------------------------------------------


def timed(name, *rounds):
    return bench(name, 64, sorted(rounds)[len(rounds) // 2], 1.0) | {
        "seconds_min": min(rounds),
        "seconds_rounds": list(rounds),
        "exponent": None,
    }


def test_speeds_of_a_bench_are_told_apart_by_their_rounds():
    """A disturbance that hits the rounds of all alike does not hide a difference; one of its own size does."""
    keys = ["attention", "pass"]
    apart = [timed("full", 1.0, 2.0, 1.1, 1.0), timed("local", 0.9, 1.8, 0.99, 0.9)]
    assert "990 ms *" in printed(apart, keys)
    assert "is local" in " ".join(findings.sentences(rows.groups(apart, keys)[0]))
    alike = [timed("full", 1.0, 1.3, 1.1, 1.0), timed("local", 1.05, 1.0, 1.2, 0.98), timed("slow", 5, 5.1, 5, 5.2)]
    assert [line.split()[0] for line in printed(alike, keys).splitlines() if line.endswith(" *")] == ["full", "local"]
    assert "Not told from it by speed: full." in findings.sentences(rows.groups(alike, keys)[0])
    text = printed(alike[:2], keys)
    assert " *" not in text
    assert "nothing tells the speeds apart from noise" in " ".join(findings.sentences(rows.groups(alike[:2], keys)[0]))
    assert " *" not in printed([timed("full", 1.0), timed("local", 0.9)], keys)  # one round tells nothing


def test_speeds_of_training_are_told_apart_by_seeds_or_by_the_noise_of_each_run():
    speeds = {"full": (100e3, 101e3, 99e3), "linear": (100.5e3, 100e3, 100e3), "axial": (50e3, 51e3, 50e3)}
    cells = [cell(n, seed=s, tokens_per_second=v) for n, many in speeds.items() for s, v in enumerate(many)]
    (group,) = rows.groups(cells, ["attention", "seed"])
    assert {point.series for point in group.leading(64, group.speed)} == {"full", "linear"}
    one = [cell("full"), cell("linear", tokens_per_second=115e3)]  # median / least is 1.2 in both
    assert "k *" not in printed(one, ["attention"])
    one[1]["tokens_per_second"] = 125e3
    assert "125k *" in printed(one, ["attention"])


@pytest.mark.parametrize("key, values", [("lr", (0.001, 0.003)), ("seed", (0, 1)), ("steps", (10, 20))])
def test_rows_of_one_program_are_not_ranked_by_speed(key, values):
    cells = [cell(**{key: value}, metric=value, tokens_per_second=1e5 * (1 + at)) for at, value in enumerate(values)]
    text = printed(cells, [key])
    assert "k *" not in text
    (group,) = rows.groups(cells, [key])
    assert not any("astest" in sentence for sentence in findings.sentences(group))
    # Beside another program they are one.
    cells += [row | {"attention": "linear", "tokens_per_second": 1e6} for row in cells]
    (group,) = rows.groups(cells, ["attention", key])
    assert {point.program for point in group.leading(64, group.speed)} == {"linear"}
    assert "Fastest to train is linear" in " ".join(findings.sentences(group))


def test_nothing_is_marked_where_all_are_alike_or_none_beats_a_guess():
    assert " *" not in printed([cell("full"), cell("linear")], ["attention"])
    assert " *" not in printed([cell("full", metric=0.12), cell("linear", metric=0.1)], ["attention"])


# ---- what a metric is of ----------------------------------------------------------------------------------------


UNEQUAL = {"metric_name": "accuracy", "chance": 0.5, "majority": 0.947}


def test_the_majority_stands_beside_chance_where_classes_are_unequal(tmp_path):
    cells = [cell("full", metric=0.945, **UNEQUAL), cell("linear", metric=0.94, **UNEQUAL)]
    text = printed(cells, ["attention"])
    assert "chance 0.500 · majority 0.947" in text and " *" not in text
    (sentence, *_) = findings.sentences(rows.groups(cells, ["attention"])[0])
    assert "no variant does better than a guess" in sentence and "(chance 0.500 · majority 0.947)" in sentence
    page = written(tmp_path / "r.html", cells, ["attention"])
    assert ">majority</button>" in page and "always the most frequent class, 0.947" in page
    for row in cells:
        row["majority"] = 0.5
    assert "majority" not in printed(cells, ["attention"])
    assert ">majority</button>" not in written(tmp_path / "r.html", cells, ["attention"])


def test_a_sample_is_said_and_its_error_is_in_the_interval(tmp_path):
    part = {"examples": 256, "examples_of": 1821, "chance": 0.5, "step": 300}
    cells = [
        cell("full", metric=0.9, metric_interval=[0.857, 0.931], **part),
        cell("linear", metric=0.89, metric_interval=[0.846, 0.923], **part),
        cell("axial", metric=0.7, metric_interval=[0.641, 0.753], **part),
    ]
    text = printed(cells, ["attention"])
    assert "scored 256 of 1,821 · after step 300" in text and "0.900 ± 0.043 *" in text and "0.890 ± 0.044 *" in text
    assert "0.700 ± 0.059 *" not in text
    sentences = " ".join(findings.sentences(rows.groups(cells, ["attention"])[0]))
    assert "Against full, the reference (2 tests, Holm-corrected), worse: axial (-0.200 [" in sentences
    assert "; not distinguishable: linear." in sentences and "choice of test examples alone" in sentences
    page = written(tmp_path / "r.html", cells, ["attention"])
    assert "256 of 1,821" in page and "0.900 [0.857, 0.931] accuracy" in page
    whole = [row | {"examples": 1821, "metric_interval": None} for row in cells]
    assert "of 1,821" not in printed(whole, ["attention"]) and "±" not in printed(whole, ["attention"])
    endless = [row | {"examples_of": None} for row in cells]
    assert "scored" not in printed(endless, ["attention"])


def test_the_error_of_a_sample_does_not_shrink_with_the_seeds():
    """All seeds score the same examples."""
    cells = [cell(seed=seed, metric=0.9, metric_interval=[0.86, 0.94]) for seed in range(50)]
    (group,) = rows.groups(cells, ["seed"])
    estimate = group.points[0].estimate("metric")
    assert estimate is not None and estimate.half == pytest.approx(0.04)


def test_validation_and_the_step_of_a_metric_are_in_the_summary_of_a_run():
    page = io.StringIO()
    more = {"step": 300, "validation": [[100, 0.9, 0.5], [300, 0.31, 0.912]], "examples": 256, "examples_of": 1821}
    pages.print_record(cell(**more, metric_interval=[0.857, 0.931]), Console(file=page, width=80))
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in page.getvalue().splitlines()[1:])
    assert lines["examples"] == "256 of 1,821" and lines["after step"] == "300"
    assert lines["validation"] == "0.912, loss 0.310, at step 300" and lines["95 % interval"] == "0.857 to 0.931"
