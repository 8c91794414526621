"""The report: numbers right, every cell kept, names harmless, one file that needs nothing from outside."""

import io
import json
import math
import pathlib
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from xformers_lab.report import charts, findings, html, human, intervals, notes, pages, rows, table

KEYS = ["task", "seq_len", "attention"]
ATTENTIONS = ("full", "local:window=16", "strided:stride=8", "linear", "axial")
PAYLOAD = '</script><script>document.title="owned"</script><img src=x onerror=document.title="owned">'
HOSTILE = (PAYLOAD, "[bold]x[/bold]", "=1+1", "a-very-long-name" * 20, '\x1b[31mred\u202eder\\" + alert(1)')


def cell(attention="full", task="mqar", seq_len=64, seed=0, metric=0.9, **more) -> dict:
    lower = task == "lm"
    row = {
        "attention": attention,
        "task": task,
        "seq_len": seq_len,
        "seed": seed,
        "id": f"{attention}-{task}-{seq_len}-{seed}",
        "run_dir": f"runs/{task}/x",
        "kind": "compare",
        "status": "ok",
        "metric": metric,
        "metric_name": "bits/byte" if lower else "accuracy",
        "higher_is_better": not lower,
        "chance": 8.0 if lower else 0.125,
        "loss": 1.5,
        "tokens_per_second": 100_000.0 * 64 / seq_len,
        "seconds_min": 0.010,
        "seconds_median": 0.012,
        "compile_seconds": 1.5,
        "flops": 800_000_000,
        "parameters": 132_480,
        "temp_bytes": int(3.4 * 2**20),
        "steps": 300,
        "curve": [[step, 3.0 * math.exp(-step / 100)] for step in range(0, 300, 3)],
    }
    row["config"] = {
        "task": task,
        "seq_len": seq_len,
        "seed": seed,
        "runs": "runs",
        "model": {"attention": attention, "norm": "pre", "dim": 64},
        "train": {"steps": 300, "lr": 0.003},
    }
    return row | more


def failed(status: str, reason: str, **where) -> dict:
    nothing = dict.fromkeys(("metric", "loss", "tokens_per_second", "seconds_min", "seconds_median", "temp_bytes"))
    return cell(**where) | nothing | {"status": status, "reason": reason, "curve": []}


def sample(names=ATTENTIONS, seeds=(0,), lengths=(64, 128, 256)) -> list[dict]:
    """Five variants, three lengths, two tasks; three cells have failed in three ways."""
    found = []
    for task in ("mqar", "lm"):
        for rank, name in enumerate(names):
            for seq_len in lengths:
                for seed in seeds:
                    metric = 2.2 + rank / 10 if task == "lm" else 0.95 - rank / 5
                    metric += 0.001 * seed * (1 + rank)
                    speed = 1e5 * (1 + rank) * (64 / seq_len if rank == 0 else 1)
                    costs = {
                        "seconds_median": 64 * seq_len / speed,
                        "flops": 10**7 * seq_len,
                        "temp_bytes": 2**14 * seq_len,
                    }
                    found.append(cell(name, task, seq_len, seed, metric, tokens_per_second=speed, **costs))
    endings = {1: ("oom", "3.1 GiB asked"), 6: ("nan", "loss not finite at step 41"), -1: ("failed", "8 x 8 is not 60")}
    for place, (status, reason) in endings.items():
        where = {key: found[place][key] for key in ("attention", "task", "seq_len", "seed")}
        found[place] = failed(status, reason, **where)
    return found


def printed(found, keys, width=100, terminal=False) -> str:
    page = io.StringIO()
    table.print_rows(found, keys, Console(file=page, width=width, force_terminal=terminal, color_system=None))
    return page.getvalue()


def written(path: pathlib.Path, found, keys, **more) -> str:
    html.write_report(found, keys, path, **({"title": "Attention", "command": "xlab compare"} | more))
    return path.read_text(encoding="utf-8")


def specs(page: str) -> str:
    """The text of the block that holds the charts."""
    return re.findall(r'<script type="application/json" id="specs">(.*?)</script>', page, re.S)[0]


def own(page: str) -> str:
    """The page without the bundled Vega library."""
    return page.replace(html._library(), "")


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (human.count, 950, "950"),
        (human.count, 1234, "1.2k"),
        (human.count, 999.7, "1k"),
        (human.count, 34_000_000, "34M"),
        (human.rate, 1234, "1.2k tok/s"),
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
    assert human.plain("a\x1b[31m\n b\u202e\x07") == "a\ufffd[31m b\ufffd\ufffd"


def test_quantiles_are_those_of_student():
    special = pytest.importorskip("scipy.special")
    for freedom in (1, 2, 5, 10, 11, 15, 30, 100, 1000):
        assert intervals.quantile(freedom) == pytest.approx(special.stdtrit(freedom, 0.975), rel=1e-4)


def test_mean_and_interval_against_worked_values():
    # Mean 3, deviation sqrt(2.5), 4 degrees of freedom: 2.776445 * sqrt(2.5 / 5).
    found = intervals.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == (3.0, pytest.approx(1.963243, abs=1e-6), 5)
    assert intervals.estimate([0.7]) == (0.7, None, 1)


def test_differences_are_paired_by_seed():
    first, second = {0: 0.5, 1: 0.7, 2: 0.9}, {2: 0.8, 1: 0.61, 0: 0.4}
    # The seeds spread far more than the variants differ, and still the difference (0.10, 0.09, 0.10) is plain.
    assert intervals.differ(first, second) is True
    assert intervals.differ(first, {0: 0.6, 1: 0.6, 2: 0.9}) is False
    assert intervals.differ(first, {0: 0.1, 7: 0.2}) is None


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
    found = [cell(name, seed=seed, metric=value) for name, many in scores.items() for seed, value in enumerate(many)]
    (group,) = rows.groups(found, ["attention", "seed"])
    said = " ".join(findings.sentences(group))
    assert "a has the best accuracy, 0.920 ± 0.050" in said
    assert "Not distinguishable from a (paired 95 % interval): b." in said
    assert "No better than chance: d." in said
    assert "One seed" not in said
    # What cannot be told apart is marked alike, though its mean is lower.
    lines = printed(found, ["attention", "seed"]).splitlines()
    assert [line.split()[0] for line in lines if re.search(r"± 0.\d+ \*", line)] == ["a", "b"]
    assert any("paired 95 % interval" in line for line in lines)


def test_no_winner_is_named_where_nothing_beats_chance():
    found = [cell(name, metric=value) for name, value in (("a", 0.10), ("b", 0.12))]
    said = findings.sentences(rows.groups(found, ["attention"])[0])
    assert said[0] == "At 64 tokens: no variant does better than chance: the best accuracy is 0.120 (chance 0.125)."


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
    found = sample(HOSTILE)
    text = printed(found, KEYS, terminal=True, width=200)
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
    found = [cell(seed=seed, metric=value) for seed, value in enumerate((0.8, 0.9, 1.0))]
    text = printed([*found, failed("nan", "loss", seed=3), cell("linear")], ["attention", "seed"])
    assert "0.900 ± 0.248" in text and "seed 3" in text


def test_bench_rows_show_time_and_growth():
    found = [bench("full", n, n * n * 1e-8, 2.0) for n in (256, 512)] + [bench("linear", 512, 1e-4, 1.0)]
    text = printed([row | {"config": cell()["config"]} for row in found], ["attention", "seq_len"])
    assert text.splitlines()[0] == "forward" and "2.6 ms" in text and "N^2.00" in text and "100 µs *" in text


# ---- what must be known before numbers are compared -------------------------------------------------------------


HERE, THERE = {"processor": "A", "jax": "1"}, {"processor": "B", "jax": "1"}


def test_cells_of_different_machines_are_told_apart(tmp_path):
    found = [cell(name, machine=HERE) for name in ("full", "linear")]
    assert notes.of(found) == [] and notes.machines(found) == [(HERE, 2)]
    mixed = [*found, cell("axial", machine=THERE), cell("lite"), failed("oom", "x", attention="fnet")]
    (told,) = notes.of(mixed)
    assert told.endswith("do not compare: processor A (2 cells); processor B (1 cell); not recorded (1 cell).")
    assert told in " ".join(printed(mixed, ["attention"]).split())
    page = written(tmp_path / "r.html", mixed, ["attention"])
    assert told in page and "Machine of 2 cells" in page and "<dt>processor</dt><dd>B</dd>" in page


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
    said = html._measures([decoded | {"parameters": 3}])
    assert "one of each sequence" in said["tokens/s"] and "projections" in said["parameters"]
    assert not any("training" in words for words in said.values())
    page = written(tmp_path / "r.html", [decoded], ["attention"])
    assert "What decoding keeps at 64 tokens" in page
    assert "1 MiB" in page[page.index("<tbody>") :] and "best at its pass and length" in page
    seeds = [cell(seed=seed) for seed in range(2)]
    assert "by the mean over the seeds" in written(tmp_path / "s.html", seeds, ["attention", "seed"])


def test_a_mechanism_alone_is_named_too(tmp_path):
    found = [cell("local:window=16", seq_len=n) for n in (64, 128)]
    assert "attention local:window=16" in printed(found, ["seq_len"])
    page = written(tmp_path / "r.html", found, ["seq_len"])
    assert page[page.index("<tbody>") : page.index("</tbody>")].count("local:window=16") == 2


def test_a_record_is_written_for_people():
    page = io.StringIO()
    pages.print_record(cell(), Console(file=page, width=40))
    lines = dict(line.split(maxsplit=1) for line in page.getvalue().splitlines()[1:])
    assert lines["seconds_median"] == "12 ms" and lines["temp_bytes"] == "3.4 MiB" and lines["parameters"] == "132,480"


def test_no_rows_is_said():
    assert printed([], []) == "There are no rows to show.\n"


def bench(attention: str, seq_len: int, seconds: float, exponent: float) -> dict:
    taken = {
        "seconds_min": seconds,
        "seconds_median": seconds,
        "exponent": exponent,
        "temp_bytes": 4 * seq_len,
        "flops": 10,
    }
    return {"attention": attention, "seq_len": seq_len, "kind": "bench", "pass": "forward", "status": "ok", **taken}


# ---- charts -----------------------------------------------------------------------------------------------------


def test_charts_hold_the_aggregated_numbers():
    found = [cell(seed=seed, metric=value) for seed, value in enumerate((0.8, 0.9, 1.0))]
    found += [cell(seq_len=128, metric=0.5), cell("linear", metric=0.2)]
    (group,) = rows.groups(found, [*KEYS, "seed"])
    drawn = charts.of_group(group, ["full", "linear"], [*KEYS, "seed"])
    assert [chart.title for chart in drawn] == [
        "Accuracy by length",
        "Training speed by length",
        "Temporary memory by length",
        "Accuracy against speed",
        "Training loss",
    ]
    first = drawn[0].spec["data"]["values"][0]
    assert first["value"] == 0.9 and first["low"] == pytest.approx(0.6516, abs=1e-4)
    assert "Higher is better; dashed: chance, 0.125" in drawn[0].note


def test_computation_is_drawn_where_variants_differ_in_it():
    """A token's layers against the metric, of the cells that tell them; not where all of them spend the same."""
    found = [cell("full", metric=0.9, computation=4.0), cell("linear", metric=0.8, computation=2.5), cell("axial")]
    names = ["full", "linear", "axial"]
    title = "Accuracy against computation per token"
    drawn = {chart.title: chart for chart in charts.of_group(rows.groups(found, KEYS)[0], names, KEYS)}
    spec = drawn[title].spec
    assert [(item["name"], item["cost"], item["value"]) for item in spec["data"]["values"]] == [
        ("full", 4.0, 0.9), ("linear", 2.5, 0.8),
    ]  # fmt: skip
    assert spec["data"]["values"][1]["cost_text"] == "2.5 layers per token"
    assert "far left and high" in drawn[title].note
    same = [row | {"computation": 4.0} for row in found]
    assert title not in [chart.title for chart in charts.of_group(rows.groups(same, KEYS)[0], names, KEYS)]


def test_a_logarithmic_axis_says_what_it_has_no_place_for():
    found = [cell("full", temp_bytes=0), cell("linear", temp_bytes=2**20)]
    (group,) = rows.groups(found, KEYS)
    chart = next(chart for chart in charts.of_group(group, ["full", "linear"], KEYS) if "memory" in chart.title)
    assert "logarithmic, where 0 has no place: full." in chart.note
    assert [item["name"] for item in chart.spec["data"]["values"]] == ["linear"]


def test_a_thinned_curve_keeps_its_end():
    found = [cell(name, curve=[[step, 1.0] for step in range(1, 951)]) for name in ATTENTIONS * 30]
    (group,) = rows.groups(found, KEYS)
    curve = charts.of_group(group, list(ATTENTIONS), KEYS)[-1]
    assert {(line["step"][0], line["step"][-1]) for line in curve.spec["data"]["values"]} == {(1, 950)}


def test_every_series_looks_different_and_keeps_its_look():
    looks = charts.look([str(i) for i in range(56)])
    assert len({(item["colour"], item["shape"]) for item in looks}) == 56
    colours = set()
    for group in rows.groups(sample(), KEYS):
        for chart in charts.of_group(group, list(ATTENTIONS), KEYS):
            for layer in chart.spec["layer"]:
                if "color" in layer["encoding"]:
                    colours.add(json.dumps(layer["encoding"]["color"]["scale"]))
    assert len(colours) == 1


def test_a_far_chance_level_is_told_and_not_drawn():
    group = rows.groups([row for row in sample() if row["task"] == "lm"], KEYS)[0]
    chart = charts.of_group(group, list(ATTENTIONS), KEYS)[0]
    assert "Lower is better; chance, 8.000, lies above the picture" in chart.note


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.1), (60e3, 200e3), (1e-4, 10.0), (3.0, 3e8)])
def test_ticks_are_round_few_and_inside(low, high):
    for binary in (False, True):
        marks = charts._ticks(low, high, binary)
        assert 1 <= len(marks) <= 6
        assert all(low <= mark <= high for mark in marks)


# ---- the file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("report") / "new" / "report.html", sample(), KEYS)


def test_the_file_has_every_row_and_every_reason(page):
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    assert body.count("<tr") == 30 and body.count('<tr class="failed"') == 3
    for words in (
        "out of memory: 3.1 GiB asked",
        "not a number: loss not finite at step 41",
        "failed: 8 x 8 is not 60",
    ):
        assert words in body
    assert page.count("Not plotted:") == 2
    assert page.count("<details") == 32  # one for each cell, the shared settings, and the one around the cells


def test_the_file_is_small_and_asks_for_nothing(page):
    assert len(page.encode()) < 2_000_000
    text = own(page)
    assert len(text) < len(page) - 500_000
    assert not re.search(r"https?://|[\"'(]//|url\(|@import|<link|<iframe|<img", text, re.I)
    assert "src=" not in text and "href=" not in text


def test_a_large_comparison_stays_below_two_megabytes(tmp_path):
    found = sample(seeds=range(7), lengths=(64, 128, 256, 512, 1024, 2048))
    assert len(found) == 420
    assert len(written(tmp_path / "r.html", found, [*KEYS, "seed"]).encode()) < 2_000_000


def test_the_policy_admits_exactly_the_scripts_and_the_style_of_the_file(page):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    styles = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert len(scripts) == 2 and len(styles) == 1
    assert {f"'{html._hash(text)}'" for text in [*scripts, *styles]} == set(re.findall(r"'sha256-[^']+'", policy))


def test_no_text_of_a_user_reaches_the_page_as_markup(tmp_path):
    payload = {"id": PAYLOAD, "reason": PAYLOAD, "metric_name": PAYLOAD, "timed": "call", "checked": False}
    found = [row | payload | {"machine": {PAYLOAD: f"{PAYLOAD}{at % 2}"}} for at, row in enumerate(sample(HOSTILE))]
    more = {"title": PAYLOAD, "command": PAYLOAD}
    text = own(written(tmp_path / "r.html", found, [PAYLOAD, *KEYS], **more))
    assert "<img" not in text and '<script>document.title="owned"' not in text
    assert text.count("<script") == 3 and text.count("</script>") == 3
    assert "<" not in specs(text)
    assert PAYLOAD in json.dumps(json.loads(specs(text)), ensure_ascii=False).replace('\\"', '"')


def test_json_for_the_page_is_strict_and_cannot_end_its_block():
    text = html._json({"a</script>": ["\u2028\u2029", math.nan, math.inf, pathlib.Path("x")]})
    assert "<" not in text and "\u2028" not in text and "\u2029" not in text
    assert json.loads(text) == {"a</script>": ["\u2028\u2029", "nan", "inf", "x"]}


def test_shared_settings_are_told_once_and_each_cell_its_own():
    shared, cells = html._configs(sample(), KEYS)
    assert json.loads(shared) == {
        "seed": 0,
        "runs": "runs",
        "model": {"norm": "pre", "dim": 64},
        "train": {"steps": 300, "lr": 0.003},
    }
    first = json.loads(cells[0]["json"])
    assert (first["task"], first["seq_len"], first["model.attention"]) == ("mqar", 64, "full")


@pytest.mark.parametrize(
    ("found", "keys"),
    [
        ([], []),
        ([failed("oom", "x"), failed("refused", "y", attention="linear")], ["attention"]),
        ([cell()], []),
        ([cell(name) for name in ATTENTIONS], ["attention"]),
        ([bench("full", n, n * 1e-6, 1.0) for n in (256, 512)], ["attention", "seq_len"]),
        ([{"status": "refused", "reason": "no such thing", "kind": "bench", "attention": "full"}], ["attention"]),
    ],
    ids=["nothing", "all failed", "one cell", "one length", "bench", "bare row"],
)
def test_few_rows_still_make_a_report(tmp_path, found, keys):
    text = written(tmp_path / "r.html", found, keys)
    assert text.count('class="chart"') == len(json.loads(specs(text)))
    assert not list(tmp_path.glob("*.part"))


# ---- in a browser -----------------------------------------------------------------------------------------------


DRIVER = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
(async () => {
  while (!document.documentElement.dataset.charts) await wait(20);
  document.querySelectorAll(".legend button")[1].click();
  const choice = document.querySelector("select");
  choice.value = "64";
  choice.dispatchEvent(new Event("change"));
  const speed = [...document.querySelectorAll("th button")].find((head) => head.textContent === "tokens/s");
  speed.click();
  speed.click();
  await wait(300);
  const point = document.querySelector(".chart .mark-symbol path");
  const box = point.getBoundingClientRect();
  for (const kind of ["pointerover", "pointermove"])
    point.dispatchEvent(new PointerEvent(kind, { bubbles: true, clientX: box.x + 3, clientY: box.y + 3 }));
  document.documentElement.setAttribute("data-driven", "yes");
})();
"""


def browsed(path: pathlib.Path) -> str:
    """The document after its scripts ran; skips without a browser, fails on anything in the browser's console."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic")
    flags = ("headless", "no-sandbox", "disable-gpu", "no-first-run", *quiet, "window-size=1200,2400")
    flags = (*flags, "virtual-time-budget=10000", "enable-logging=stderr", "dump-dom")
    profile = f"--user-data-dir={path.with_name('profile')}"
    command = [chromium, *(f"--{flag}" for flag in flags), profile, path.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in seen.stderr, seen.stderr[-2000:]
    return seen.stdout


def test_a_browser_draws_the_charts_and_runs_no_name(tmp_path):
    path = tmp_path / "report.html"
    found = [row | {"id": PAYLOAD, "metric_name": HOSTILE[-1]} for row in sample(HOSTILE)]
    written(path, found, KEYS, title="harmless", command=PAYLOAD)
    seen = browsed(path)
    assert 'data-charts="drawn"' in seen[:2000]
    assert seen.count("<svg") >= 10 + len(HOSTILE)
    assert len(re.findall(r'<g class="mark-line', seen)) >= 8
    assert "<title>harmless</title>" in seen
    assert "<img" not in own(seen)


def test_a_reader_can_point_focus_choose_and_sort(tmp_path, monkeypatch):
    read = html._text
    # Part of the page's own script, so that it runs under the same policy.
    monkeypatch.setattr(html, "_text", lambda name: read(name) + (DRIVER if name == "page.js" else ""))
    path = tmp_path / "report.html"
    written(path, sample(HOSTILE), KEYS, title="harmless")
    seen = browsed(path)
    assert 'data-driven="yes"' in seen[:2000]
    (tip,) = re.findall(r'<div id="tip"[^>]*>(.*?)</div></div>', seen, re.S)
    assert "&lt;/script&gt;" in tip and "<img" not in tip and "<div>at 64 tokens" in tip
    assert len(re.findall('<button[^>]*aria-pressed="true"', seen)) == 1
    assert 'opacity="0.12"' in seen
    body = seen[seen.index("<tbody>") : seen.index("</tbody>")]
    # The speed is the first of a row's numbers that is written in thousands.
    speeds = [re.search(r'data-sort="([\d.]+)"[^>]*>[^<]*k</td>', line) for line in body.split("</tr>")]
    speeds = [float(found.group(1)) for found in speeds if found]
    assert len(speeds) == 27
    assert speeds == sorted(speeds, reverse=True)
    assert "<title>harmless</title>" in seen
