"""The report as one offline file: its charts, every row and reason, names harmless, nothing needed from outside."""

import copy
import html as markup
import itertools
import json
import math
import re
import xml.etree.ElementTree

import pytest
from browser import browsed
from report_rows import ATTENTIONS, HOSTILE, KEYS, PAYLOAD, PAYLOADS, bench, cell, failed, sample, study, written

from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.report import charts, figures, html, human, maps, offline, patterns, plot, rows, summary
from xformers_lab.report.charts import curves, pareto
from xformers_lab.report.charts.parts import guess_words
from xformers_lab.report.plot import Band, Dot, Front, Line, Rule


def of_group(cells, varied=KEYS, names=None) -> dict[str, charts.Chart]:
    """The charts of the first group, by title."""
    names = [look.name for look in charts.looks(cells, varied)] if names is None else names
    return {chart.title: chart for chart in charts.of_group(rows.groups(cells, varied)[0], names, varied)}


def words(chart: charts.Chart) -> list[str]:
    """What the points of its last pane say."""
    return [dot.words for drawn in chart.panes[-1].plots for dot in drawn.of(Dot)]


def of_cells(page: str) -> str:
    """The table of all cells."""
    return page[page.index('<table id="cells">') : page.index("</table>", page.index('<table id="cells">'))]


# ---- charts -----------------------------------------------------------------------------------------------------


def test_charts_hold_the_aggregated_numbers():
    cells = [cell(seed=seed, metric=value) for seed, value in enumerate((0.8, 0.9, 1.0))]
    cells += [cell(seq_len=128, metric=0.5), cell("linear", metric=0.2)]
    drawn = of_group(cells, [*KEYS, "seed"])
    assert list(drawn) == [
        "Accuracy against its cost",
        "Accuracy by length",
        "Training speed by length",
        "Temporary memory by length",
        "Learning curves",
    ]
    chart = drawn["Accuracy by length"]
    (shown,) = chart.panes[0].plots
    first, band = shown.of(Dot)[0], shown.of(Band)[0]
    assert (first.x, first.y) == (64, pytest.approx(0.9)) and "accuracy 0.900 ± 0.248" in first.words
    assert (band.lows[0], band.highs[0]) == (pytest.approx(0.6516, abs=1e-4), pytest.approx(1.1484, abs=1e-4))
    assert "Higher is better; dashed: chance, 0.125; bands: 95" in chart.note
    assert chart.heads == ["", "64 tokens", "128 tokens"]
    full, linear = chart.lines
    assert full == ["full", "0.900 ± 0.248", "0.500"]
    assert linear == ["linear", "0.200", human.NONE]


def test_computation_is_a_cost_where_variants_differ_in_it():
    """A token's layers against the metric, of the cells that tell them; not where all of them spend the same."""
    cells = [cell("full", metric=0.9, computation=4.0), cell("linear", metric=0.8, computation=2.5), cell("axial")]
    plots = {drawn.x.title: drawn for drawn in of_group(cells)["Accuracy against its cost"].panes[0].plots}
    assert [(dot.x, dot.y) for dot in plots["layers/token"].of(Dot)] == [(4.0, 0.9), (2.5, 0.8)]
    assert "layers/token 2.5 layers per token" in plots["layers/token"].of(Dot)[1].words
    same = of_group([row | {"computation": 4.0} for row in cells])["Accuracy against its cost"].panes[0].plots
    assert "layers/token" not in [drawn.x.title for drawn in same]


@pytest.mark.parametrize(
    ("better", "kept"), [(1, [(1, 0.5), (2, 0.7), (4, 0.9)]), (-1, [(1, 0.5), (3, 0.4)])], ids=["higher", "lower"]
)
def test_the_front_is_what_no_other_beats_in_both(better, kept):
    points = [(2, 0.7), (1, 0.5), (3, 0.7), (4, 0.9), (5, 0.6), (1, 0.4 if better > 0 else 0.6), (3, 0.4)]
    front = pareto.front(points, better)
    assert front == kept
    for cost, value in points:  # by definition
        beaten = any(
            c <= cost and better * v >= better * value and (c, v) != (cost, value) for c, v in points
        )  # fmt: skip
        assert ((cost, value) in front) is not beaten


def test_the_front_is_drawn_with_whiskers_both_ways():
    cells = study(lengths=(64,))
    chart = of_group(cells, [*KEYS, "seed"])["Accuracy against its cost"]
    drawn = {one.x.title: one for one in chart.panes[0].plots}
    assert list(drawn) == ["time of a training step", "memory", "FLOPs/token"] and chart.wide
    (front,) = drawn["memory"].of(Front)
    best = max(drawn["memory"].of(Dot), key=lambda dot: dot.y)
    assert max(front.ys) == best.y and front.xs[-1] == drawn["memory"].x.high
    assert all(dot.upright for dot in drawn["memory"].of(Dot)) and drawn["time of a training step"].of(Dot)[0].across
    on_front = [line[0] for line in chart.lines if "memory" in line[-1]]
    assert on_front and set(on_front) <= {line[0] for line in chart.lines}


def test_a_logarithmic_axis_says_what_it_has_no_place_for():
    cells = [cell("full", temp_bytes=0), cell("linear", temp_bytes=2**20)]
    chart = next(chart for title, chart in of_group(cells).items() if "memory" in title)
    assert "logarithmic, where 0 has no place: full." in chart.note
    assert [line[0] for line in chart.lines] == ["linear"]


def test_a_row_without_a_length_has_no_place_among_those_with_one():
    bare = cell("linear") | {"seq_len": None, "config": {}}
    chart = of_group([cell(), cell(seq_len=128), bare])["Accuracy by length"]
    assert [line[0] for line in chart.lines] == ["full"]
    assert [line[0] for line in of_group([bare])["Accuracy, accuracy"].lines] == ["linear"]


def test_growth_is_told_where_three_lengths_show_it():
    cells = [cell(seq_len=n, temp_bytes=4 * n * n) for n in (64, 128, 256)]
    chart = of_group(cells)["Temporary memory by length"]
    assert chart.heads[-1] == "goes as" and chart.lines[0][-1] == "N^2.00"
    assert "Goes with the length N as N^2.00" in chart.note
    assert "goes as" not in of_group(cells[:2])["Temporary memory by length"].heads


def test_the_efficiency_length_is_marked_on_the_speed():
    """Where the line through full attention's speeds crosses that of a variant, by the logarithms of both."""
    speeds = {("full", 64): 4e5, ("full", 256): 1e5, ("linear", 64): 2e5, ("linear", 256): 2e5}
    cells = [
        cell(name, seq_len=n, tokens_per_second=speed, seconds_median=64 * n / speed)
        for (name, n), speed in speeds.items()
    ]
    drawn = of_group(cells)
    (rule,) = drawn["Training speed by length"].panes[0].plots[0].of(Rule)
    assert (rule.axis, rule.series, rule.at) == ("x", 1, pytest.approx(128, rel=0.01))
    assert drawn["Training speed by length"].lines[1][-1] == "128 tokens"
    assert "efficiency length, from which on" in drawn["Training speed by length"].note
    assert not drawn["Temporary memory by length"].panes[0].plots[0].of(Rule)


def test_a_thinned_curve_keeps_its_end():
    cells = [cell(name, curve=[[step, 1.0] for step in range(1, 951)]) for name in ATTENTIONS * 30]
    (shown,) = of_group(cells, names=list(ATTENTIONS))["Learning curves"].panes[0].plots
    raw = [line for line in shown.of(Line) if line.faint]
    assert len(raw) == 150 and {(line.xs[0], line.xs[-1]) for line in raw} == {(1, 950)}


def test_learning_curves_are_over_steps_tokens_and_seconds():
    cells = [
        cell(seed=seed, curve=[[step, 2.0 + seed, 0.5 * step] for step in (0, 10, 20)]) for seed in (0, 1)
    ]  # fmt: skip
    for row in cells:
        row["config"]["batch"] = 4
    chart = of_group(cells, [*KEYS, "seed"])["Learning curves"]
    assert [pick.options for pick in chart.picks] == [["steps", "tokens", "seconds"]]
    ends = {pane.plots[0].x.title: pane.plots[0].of(Line)[-1].xs[-1] for pane in chart.panes}
    assert ends == {"steps": 20, "tokens": 20 * 4 * 64, "seconds": 10.0}
    band = chart.panes[0].plots[0].of(Band)[0]
    assert (list(band.lows), list(band.highs)) == ([2.0] * 3, [3.0] * 3)
    assert chart.lines == [["full", "64", "2.500"]]
    bare = [cell(curve=[[0, 2.0], [10, 1.0]])]
    assert of_group(bare)["Learning curves"].picks == []  # neither a batch nor seconds are known


def test_smoothing_keeps_what_is_level_and_follows_what_is_not():
    assert curves.smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    rough = [1.0 if at % 2 else 3.0 for at in range(100)]
    assert max(abs(value - 2) for value in curves.smoothed(rough)[40:]) < 0.5
    assert curves.smoothed([5.0, 1.0])[0] == 5.0 and curves.smoothed([]) == []


def test_tuning_is_drawn_with_its_best_and_its_edge():
    cells = study(names=("full", "local:window=16"), lengths=(64, 256), seeds=(0,))
    chart = of_group([row for row in cells if row["attention"] != "x" and not row.get("name")])["Tuning of lr"]
    assert chart.picks[0].options == ["64 tokens", "256 tokens"]
    (shown,) = chart.panes[0].plots
    assert shown.x.log and [label for _, label in shown.x.ticks] == ["0.0003", "0.001", "0.003", "0.01", "0.03"]
    assert [dot.x for dot in shown.of(Dot) if dot.ring] == [0.03, 0.003]
    assert [(dot.series, dot.x) for dot in shown.of(Dot) if dot.cross] == [(1, 3e-4)]
    assert "edge of the grid, so that a better one may lie beyond it, of full." in chart.note
    assert "20\u00a0% of the steps" in chart.note and chart.lines[0][-1] == "yes, after widening"


def test_two_tuned_knobs_have_a_chart_each_of_the_best_over_the_other():
    points = [{"lr": lr, "wd": wd, "metric": lr + wd} for lr in (0.1, 0.2) for wd in (0.0, 0.5)]
    tuning = {"knobs": ["lr", "wd"], "best": {"lr": 0.2, "wd": 0.5}, "points": points}
    drawn = of_group([cell(tuning=tuning)])
    values = [dot.y for dot in drawn["Tuning of lr"].panes[0].plots[0].of(Dot)]
    assert values == pytest.approx([0.6, 0.7]) and "Tuning of wd" in drawn
    lower = tuning | {"higher_is_better": False}
    values = [dot.y for dot in of_group([cell(tuning=lower)])["Tuning of lr"].panes[0].plots[0].of(Dot)]
    assert values == pytest.approx([0.1, 0.2])


def test_other_lengths_are_drawn_beside_the_trained_one():
    tested = [{"seq_len": 128, "metric": 0.5}, {"seq_len": 256, "metric": 0.25}]
    chart = of_group([cell(metric=0.9, by_length=tested)])["Accuracy beyond the trained length"]
    (shown,) = chart.panes[0].plots
    assert [(dot.x, dot.y) for dot in shown.of(Dot)] == [(64, 0.9), (128, 0.5), (256, 0.25)]
    assert [rule.at for rule in shown.of(Rule) if rule.axis == "x"] == [64]


def test_windows_have_a_chart_of_their_own():
    cells = [cell(metric=0.9), cell("local:window=8", metric=0.3, role="range")]
    drawn = of_group(cells)
    assert [line[0] for line in drawn["Accuracy under windows"].lines] == ["local:window=8"]
    assert [line[0] for line in drawn["Accuracy at 64 tokens"].lines] == ["full"]
    assert [line[0] for line in drawn["Accuracy against its cost"].lines] == ["full"]


def test_every_series_looks_different_and_keeps_its_look():
    looks = plot.look([str(i) for i in range(56)])
    assert len({(item.colour, item.shape) for item in looks}) == 56
    cells = [cell("x", role="baseline"), cell("full"), cell("linear")]
    assert [(look.name, look.hollow) for look in charts.looks(cells, KEYS)] == [
        ("full", False), ("linear", False), ("x", True),
    ]  # fmt: skip


def test_a_far_chance_level_is_told_and_not_drawn():
    chart = of_group([row for row in sample() if row["task"] == "lm"])["Bits/byte by length"]
    assert "Lower is better; chance, 8.000, lies above the picture" in chart.note
    assert not chart.panes[0].plots[0].of(Rule)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.1), (60e3, 200e3), (1e-4, 10.0), (3.0, 3e8)])
def test_ticks_are_round_few_and_inside(low, high):
    for binary in (False, True):
        marks = plot.log_ticks(low, high, binary)
        assert 1 <= len(marks) <= 6
        assert all(low <= mark <= high for mark in marks)


def test_a_narrow_binary_axis_has_two_ticks_all_the_same():
    assert plot.log_ticks(36.0, 69.0, binary=True) == [48.0, 64.0] and plot.log_ticks(32.0, 64.0, True) == [32.0, 64.0]
    assert plot.log_ticks(33.0, 47.0, binary=True) == [40.0]


def test_a_guess_is_called_by_what_it_does():
    cells = [cell(task="lm", metric=4.0 + n, seed=n, data={"unigram": 4.851}) for n in (0, 1)]
    group = rows.groups(cells, KEYS)[0]
    assert guess_words(group, 4.851).startswith("tokens by how often") and "chance" in guess_words(group, 8)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 4.0), (1.23, 1.24), (0.0, 3e8), (2.0, 2.0)])
def test_ticks_are_equally_far_apart(low, high):
    marks = plot.ticks(low, high)
    assert 1 <= len(marks) <= 6 and all(low - 1e-9 <= mark <= high * (1 + 1e-9) for mark in marks)
    assert len({round((b - a) / (high - low), 6) for a, b in itertools.pairwise(marks)}) <= 1


def test_validation_is_drawn_over_its_steps():
    points = [[100, 1.5, 0.4], [200, None, None], [300, 0.9, 0.8]]
    cells = [cell("full", validation=points), cell("linear", validation=[[300, 1.0, 0.7]])]
    drawn = of_group(cells)
    (shown,) = drawn["Validation accuracy"].panes[0].plots
    assert [(line.xs, line.ys) for line in shown.of(Line)] == [([100, 300], [0.4, 0.8]), ([300], [0.7])]
    assert drawn["Validation accuracy"].note.startswith("Higher is better; on the validation split")
    assert drawn["Validation loss"].panes[0].plots[0].of(Line)[0].ys == [1.5, 0.9]
    assert len(shown.of(Dot)) == 3
    titles = list(of_group([cell("full", validation=points[:1])]))
    assert "Validation accuracy" not in titles and "Learning curves" in titles


def test_a_plot_puts_values_where_its_axes_say():
    axes = plot.Axis("x", 0, 10, [(0, "0"), (10, "10")]), plot.Axis("", 1, 100, [(1, "1"), (100, "100")], log=True)
    drawn = plot.Plot(*axes, [Dot(0, 5, 10, "middle"), Line(0, [0, 5, 10], [1, 10, 100])])
    text = plot.svg(drawn, plot.look(["a"]), "one")
    frame = plot._Frame(drawn)
    (x, y) = map(float, re.findall(r"translate\(([\d.]+) ([\d.]+)\)", text)[0])
    assert x == pytest.approx((frame.left + frame.right) / 2, abs=0.1)
    assert y == pytest.approx((frame.top + frame.bottom) / 2, abs=0.1)
    (path,) = re.findall(r'<path data-s="0" d="M([^"]+)"', text)
    first, *steps = [[float(number) for number in re.findall(r"-?[\d.]+", part)] for part in path.split("l")]
    end = [first[at] + sum(step[at] for step in steps) for at in (0, 1)]
    assert end == pytest.approx([frame.right, frame.top], abs=0.11)


def test_the_table_says_of_which_step_a_metric_is(tmp_path):
    cells = [cell("full", validation=[[250, 0.31, 0.912]], step=300), cell("linear", steps=200, seconds_ratio=1.1)]
    body = of_cells(written(tmp_path / "r.html", cells, KEYS))
    assert ">after step</button>" in body and "0.912 (loss 0.310) at step 250" in body
    assert "<span>300</span>" in body and "<span>200</span>" in body


# ---- the first table --------------------------------------------------------------------------------------------


def test_the_first_table_has_both_columns_and_what_was_changed():
    cells = [row for row in study(seeds=(0, 1)) if row["attention"] in ("full", "linear") and "name" not in row]
    (_, table) = summary.of_group(rows.groups(cells, [*KEYS, "seed"])[0], plot.look(["full", "linear"]), html.columns())
    assert table.length == "256 tokens" and table.whiskers
    assert table.heads[:4] == ["", "accuracy, tuned", "accuracy, shared recipe", "seeds"]
    (part,) = table.parts
    assert part.title == "" and [line["name"] for line in part.lines] == ["full", "linear"]
    mine = [row for row in cells if row["attention"] == "full" and row["seq_len"] == 256]
    mean = sum(row["shared"]["metric"] for row in mine) / 2
    assert part.lines[0]["texts"][1].startswith(f"{mean:.3f} ±")
    assert part.lines[0]["notes"] == [
        "lr 0.03 (at the edge of the grid)", "equal in parameters: ffn_dim 256 to 256",
    ]  # fmt: skip


def test_baselines_and_windows_stand_apart_and_the_unmatched_are_named():
    cells = study(lengths=(64,), seeds=(0, 1))
    names = [look.name for look in charts.looks(cells, [*KEYS, "seed"])]
    (table,) = summary.of_group(rows.groups(cells, [*KEYS, "seed"])[0], plot.look(names), html.columns())
    assert [part.title for part in table.parts] == list(summary.ROLES.values())
    unmatched = {"matched": {"budget": "flops", "target": 100, "reached": 106, "ok": False}}
    assert summary.matched(unmatched).startswith("unmatched in ") and "6" in summary.matched(unmatched)
    assert not summary.of_group(rows.groups([bench("full", 64, 1e-3, 1.0)], ["seq_len"])[0], plot.look(["full"]), [])


# ---- attention maps ---------------------------------------------------------------------------------------------


def weighted(**more) -> dict:
    found = {"tokens": ["a", "b"], "queries": ["a", "b"], "layers": [[[[255, 0], [128, 127]]]], "implied": False}
    return cell(maps=found | more)


def test_maps_show_full_attention_first_and_each_shade_once():
    cells = [cell("linear") | {"maps": weighted()["maps"] | {"implied": True}}, weighted()]
    shown = maps.of_group(rows.groups(cells, KEYS)[0], ["linear", "full"], KEYS)
    assert shown is not None and [(one.name, one.series) for one in shown.shown] == [("full", 1), ("linear", 0)]
    assert "effective" in shown.shown[1].note and shown.shown[0].pictures[0].label == "layer 1, head 1"
    picture = shown.shown[0].pictures[0].drawn
    assert re.findall(r'fill-opacity="([\d.]+)" d="([^"]+)"', picture) == [
        ("0.5", "M0 1h2v1h-2z"), ("1", "M0 0h1v1h-1z"),
    ]  # fmt: skip
    assert len(re.findall(r">(a|b)</text>", picture)) == 4


@pytest.mark.parametrize(
    "more",
    [{"layers": [[[[1]]]]}, {"layers": [[["x"]]]}, {"tokens": 3}, {"layers": []}, {"layers": [[[[-1, 0], [0, 0]]]]}],
    ids=["of other tokens", "no numbers", "no tokens", "empty", "negative"],
)
def test_maps_that_cannot_be_drawn_are_left_out(more):
    assert maps.of_group(rows.groups([weighted(**more)], KEYS)[0], ["full"], KEYS) is None


def test_maps_beyond_the_budget_are_named():
    group = rows.groups([weighted(), cell("linear") | {"maps": weighted()["maps"]}], KEYS)[0]
    every = maps.of_group(group, ["full", "linear"], KEYS)
    assert every is not None
    size = len(every.shown[0].pictures[0].drawn)
    shown = maps.of_group(group, ["full", "linear"], KEYS, budget=size + 10)
    assert shown is not None and [one.name for one in shown.shown] == ["full"] and shown.left_out == ["linear"]


def test_rows_without_maps_are_told_on_the_page_with_their_length_and_the_limit(tmp_path):
    long = {"tokens": ["a"] * 97, "queries": 97, "layers": [[[[0] * 97] * 97]]}
    cells = [weighted(), cell("linear", seq_len=97, maps=long)]
    cells += [cell("gla", seq_len=n, maps={"reason": "at most 64 tokens <b>"}) for n in (128, 256)]
    page = written(tmp_path / "some.html", cells, KEYS)
    assert "No maps of linear at 97 tokens: a page has room for maps of at most 96 tokens.</p>" in page
    assert "No maps of gla at 128 tokens and gla at 256 tokens: at most 64 tokens &lt;b&gt;.</p>" in page
    none = written(tmp_path / "none.html", cells[2:], KEYS)
    assert none.count("Attention maps") == 1 and "No maps of gla" in none
    assert "No maps of" not in written(tmp_path / "all.html", cells[:1], KEYS)


# ---- files of figures -------------------------------------------------------------------------------------------


def test_figures_are_svg_and_pdf_by_names_of_words(tmp_path):
    cells = [row for row in study(seeds=(0, 1)) if row["attention"] == "full" and not row.get("name")]
    paths = figures.write_figures(cells, [*KEYS, "seed"], tmp_path / "new" / "figures")
    names = {path.name for path in paths}
    assert {
        "learning_curves_copy_64.svg",
        "learning_curves_copy_64.pdf",
        "learning_curves_copy_256_tokens.svg",
    } <= names
    assert {"accuracy_by_length_copy.svg", "accuracy_against_its_cost_copy_64_memory.pdf"} <= names
    assert len(names) == len(paths) and all(path.is_file() for path in paths)
    for path in paths:
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF-")
        else:
            root = xml.etree.ElementTree.fromstring(path.read_text())
            assert (
                root.tag.endswith("svg") and "var(" not in path.read_text() and "currentColor" not in path.read_text()
            )


def test_maps_and_patterns_are_files_too(tmp_path):
    """Of a map a row for each layer and a column for each head, each with its labels; nothing is left to a style."""
    heads = [[[255, 0], [128, 127]]] * 3
    found = {"tokens": ["a", "b"], "queries": 2, "layers": [heads, heads]}
    cells = [cell("local:window=16", maps=found), cell("full", maps={"reason": "none"})]
    for row in cells:
        row["config"]["model"]["heads"] = 2
    paths = {path.name: path for path in figures.write_figures(cells, KEYS, tmp_path)}
    mapped, pattern = paths["attention_maps_mqar_local_window_16.svg"], paths["pattern_local_window_16.svg"]
    root = xml.etree.ElementTree.fromstring(mapped.read_text())
    words = [one.text for one in root.iter() if one.tag.endswith("text")]
    assert [word for word in words if word and word.startswith("layer")] == [
        f"layer {layer}, head {head}" for layer in (1, 2) for head in (1, 2, 3)
    ]
    assert words.count("a") == words.count("b") == 2 * 6
    drawn = [one.get("d") for one in xml.etree.ElementTree.fromstring(pattern.read_text()).iter() if one.get("d")]
    assert drawn == [one.path for one in patterns.figures(cells[:1])] and "pattern_full.svg" in paths
    assert not any(name.startswith("attention_maps") and "full" in name for name in paths)
    for path in (mapped, pattern):
        assert not re.search(r"var\(|currentColor|style", path.read_text())
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")


def test_figures_of_hostile_names_are_well_formed_and_in_their_folder(tmp_path):
    cells = [row | {"metric_name": PAYLOAD, "task": f"../{row['task']}"} for row in sample(HOSTILE, lengths=(64,))]
    paths = figures.write_figures(cells, KEYS, tmp_path)
    assert {path.parent for path in paths} == {tmp_path} and len(set(paths)) == len(paths)
    for path in paths:
        if path.suffix == ".svg":
            root = xml.etree.ElementTree.fromstring(path.read_text())
            assert not {one.tag.rpartition("}")[2] for one in root.iter()} & {"script", "img"}


def test_the_command_writes_figures_where_it_is_told(tmp_path, capsys):
    (tmp_path / "compare.json").write_text(json.dumps({"rows": [cell()], "varied": KEYS, "command": "xlab"}))
    assert main(["report", "--runs", str(tmp_path), "--figures", str(tmp_path / "f")]) == 0
    assert (tmp_path / "f" / "accuracy_at_64_tokens_mqar.svg").is_file()
    (tmp_path / "taken").write_text("x")
    assert main(["report", "--runs", str(tmp_path), "--figures", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err


# ---- the file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("report") / "new" / "report.html", sample(), KEYS)


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("study") / "report.html", study(), [*KEYS, "seed"])


def test_the_file_has_every_row_and_every_reason(page):
    body = of_cells(page)
    assert body.count("<tr") == 31 and body.count('<tr class="failed"') == 3
    for reason in (
        "out of memory: 3.1 GiB asked",
        "not a number: loss not finite at step 41",
        "failed: 8 x 8 is not 60",
    ):
        assert reason in body
        assert reason in page[page.index("What failed") :]
    assert page.count("Not plotted:") == 2
    assert page.count('<details class="unprinted">') == 1
    assert page.count("</pre></details>") == 31  # one for each cell, and the shared settings


def test_the_page_of_a_study_has_all_its_parts_in_order(studied):
    parts = ("Findings", 'class="summary"', "Accuracy against its cost", "Accuracy by length", "Tuning of lr")
    parts += (
        "Learning curves",
        "Attention maps",
        "What was answered wrong",
        "All cells",
        "What failed",
        "What was run",
    )
    places = [studied.index(part) for part in parts]
    assert places == sorted(places)
    assert "xlab train task=copy attention=bigbird:window=8 seq_len=64 seed=2" in studied
    assert ">3 1 4 4<" in studied and studied.count('class="map"') == 6 * 4


def test_every_chart_and_every_row_is_linked_to_its_series(studied):
    picks = set(re.findall(r'data-pick="(\d+)"', studied))
    marked = set(re.findall(r'data-s="(\d+)"', studied))
    assert marked <= picks and len(marked) >= 6
    for figure in re.findall(r'<div class="chart".*?</svg>', studied, re.S):
        assert 'data-s="' in figure and 'role="img" aria-label="' in figure


def test_the_file_is_small_and_asks_for_nothing(page, studied):
    for text in (page, studied):
        assert len(text.encode()) < 1_000_000
        assert not re.search(r"https?://|[\"'(]//|url\(|@import|<link|<iframe|<img", text, re.I)
        assert "src=" not in text and "href=" not in text and "style=" not in text


def test_a_large_comparison_stays_below_two_megabytes(tmp_path):
    cells = sample(seeds=range(7), lengths=(64, 128, 256, 512, 1024, 2048))
    assert len(cells) == 420
    assert len(written(tmp_path / "r.html", cells, [*KEYS, "seed"]).encode()) < 2_000_000


def test_a_study_of_120_rows_stays_below_two_megabytes(tmp_path):
    cells = study(lengths=(64, 128, 256, 512), tokens=48)[:120]
    text = written(tmp_path / "r.html", cells, [*KEYS, "seed"])
    assert len(cells) == 120 and len(text.encode()) < 2_000_000
    assert text.count('class="map"') >= 12


def test_the_policy_admits_exactly_the_script_and_the_style_of_the_file(page):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    styles = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert len(scripts) == 1 and len(styles) == 1
    assert {f"'{offline.digest(text)}'" for text in [*scripts, *styles]} == set(re.findall(r"'sha256-[^']+'", policy))


def attacked() -> list[dict]:
    """A study with a payload in each text that a row may have, each payload in some row."""
    cells = []
    for at, row in enumerate(study(lengths=(64,), tokens=3, text=PAYLOAD)):
        text = PAYLOADS[at % len(PAYLOADS)]
        row = copy.deepcopy(row)
        row |= {"id": text, "metric_name": text, "task": text[:40], "machine": {text: text}, "of_tomorrow": text}
        row["command"] = row.get("command", "") + text
        row["matched"] = row.get("matched", {}) | {"budget": text, "changed": {text: [text, text]}}
        row["tuning"] = row.get("tuning", {}) | {"metric_name": text}
        row["wrong"] = [{"input": text, "answer": text, "said": text}]
        row["attention"] = text if at % 3 else row["attention"]
        row["name"] = text if "name" in row else None
        if "maps" in row:
            row["maps"] = row["maps"] | {"tokens": [text] * 3, "queries": [text] * 3}
        cells.append(row)
        cells.append(failed("failed", text, attention=text, seed=at))
    return cells


def test_no_text_of_a_user_reaches_the_page_as_markup(tmp_path):
    text = written(tmp_path / "r.html", attacked(), [PAYLOAD, *KEYS, "seed"], title=PAYLOADS[4], command=PAYLOADS[6])
    tags = set(re.findall(r"<\s*([a-zA-Z!]+)", text))
    assert not tags & {"img", "iframe", "link", "base", "form", "a", "textarea", "image", "foreignObject"}
    assert text.count("<script") == 1 and text.count("</script>") == 1 and text.count("<style") == 1
    assert not re.search(r"<[^>]*\son[a-z]+\s*=", re.sub(r'"[^"]*"', '""', text))
    seen = markup.unescape(text)
    assert all(payload in seen for payload in PAYLOADS[:-1])


@pytest.mark.parametrize("key", ["tuning", "matched", "shared", "by_length", "wrong", "maps"])
def test_odd_values_deep_in_a_row_are_left_out_or_shown_as_text(tmp_path, key):
    """A page of rows with one odd value each, at every place of one field, is written all the same."""
    base = study(names=("full",), lengths=(64,), seeds=(0,), tokens=2)[0]
    cells = [base]
    for path in places(base[key], (key,)):
        for odd in (None, -1, "x", True, [], [1], [[1, "a"]], {}, {"a": [{}]}, 1e308, math.nan, math.inf, 10**39):
            row = copy.deepcopy(base)
            at = row
            for step in path[:-1]:
                at = at[step]
            at[path[-1]] = odd
            cells.append(row | {"attention": f"linear:x={len(cells)}"})
    assert of_cells(written(tmp_path / "r.html", cells, KEYS)).count("<tr") == len(cells) + 1


def places(value, path):
    """The way to each value in it, of a list to its first alone."""
    yield path
    for step, inner in (
        value.items() if isinstance(value, dict) else [(0, value[0])] if isinstance(value, list) and value else []
    ):
        yield from places(inner, (*path, step))


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
    ("cells", "keys"),
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
def test_few_rows_still_make_a_report(tmp_path, cells, keys):
    text = written(tmp_path / "r.html", cells, keys)
    drawn = sum(
        len(pane.plots)
        for group in rows.groups(cells, keys)
        for chart in charts.of_group(group, [look.name for look in charts.looks(cells, keys)], keys)
        for pane in chart.panes
    )
    assert text.count('<div class="chart"') == text.count('<svg class="plot"') == drawn
    assert not list(tmp_path.glob("*.part"))


def test_without_jinja_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(UsageError, match="pip install jinja2"):
        html.write_report([cell()], KEYS, tmp_path / "r.html", title="t", command="c")


# ---- in a browser -----------------------------------------------------------------------------------------------


DRIVER = """
(() => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const say = (key, value) => document.documentElement.setAttribute(`data-${key}`, value);
  const key = (element, name) => element.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
  const lit = () => document.querySelectorAll("[data-s]:not(.dim)").length;
  const dim = () => document.querySelectorAll("[data-s].dim").length;
  const pressed = () => document.querySelectorAll('[aria-pressed="true"]').length;
  const state = () => `${lit()} ${dim()} ${pressed()}`;
  (async () => {
    document.querySelectorAll(".legend button")[1].click();
    say("legend", state());
    key(document.body, "Escape");
    say("escaped", state());
    const chart = document.querySelector(".chart");
    key(chart, "ArrowRight");
    say("arrow", state());
    key(document.body, "Escape");
    const point = document.querySelectorAll(".point[data-s]")[1];
    point.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    say("point", state());
    key(document.body, "Escape");
    document.querySelector("#cells tbody tr td").click();
    say("row", state());
    const shown = () => [...document.querySelectorAll("figure .pane")].filter((one) => one.offsetParent).length;
    const before = [...document.querySelectorAll("figure .pane")].map((one) => Boolean(one.offsetParent)).join();
    const count = shown();
    document.querySelector("figure .pick input:not(:checked)").click();
    const after = [...document.querySelectorAll("figure .pane")].map((one) => Boolean(one.offsetParent)).join();
    say("panes", `${count === shown()} ${before !== after}`);
    const speed = [...document.querySelectorAll("th button")].find((head) => head.textContent === "tokens/s");
    speed.click();
    speed.click();
    const box = point.getBoundingClientRect();
    point.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: box.x + 3, clientY: box.y + 3 }));
    dispatchEvent(new Event("beforeprint"));
    say("closed", document.querySelectorAll("details:not([open]):not(.unprinted, .unprinted *)").length);
    dispatchEvent(new Event("afterprint"));
    await wait(50);
    say("wide", document.documentElement.scrollWidth <= document.documentElement.clientWidth);
    say("driven", "yes");
  })();
})();
"""


def test_a_browser_runs_no_payload(tmp_path, monkeypatch):
    """No dialog, and no request: the browser would say in its console that the policy refused one."""
    read = html._text
    watch = "for (const name of ['alert', 'confirm', 'prompt']) window[name] = () => document.title = 'owned';"
    monkeypatch.setattr(html, "_text", lambda name: watch + read(name) if name == "page.js" else read(name))
    path = tmp_path / "report.html"
    written(path, attacked(), [PAYLOAD, *KEYS, "seed"], title="harmless", command=PAYLOAD)
    seen = browsed(path)
    assert 'data-ready="yes"' in seen[:2000] and "<title>harmless</title>" in seen
    assert not re.search(r"<(img|iframe|link|base|form|a)[\s>]", re.sub(r'"[^"]*"', '""', seen))


@pytest.mark.parametrize("width", [1200, 400])
def test_a_series_chosen_anywhere_stands_out_everywhere(tmp_path, monkeypatch, width):
    read = html._text
    # Part of the page's own script, so that it runs under the same policy.
    monkeypatch.setattr(html, "_text", lambda name: read(name) + (DRIVER if name == "page.js" else ""))
    path = tmp_path / "report.html"
    written(path, sample(HOSTILE), KEYS, title="harmless")
    seen = browsed(path, width)
    said = dict(re.findall(r'data-(\w+)="([^"]*)"', seen[: seen.index("<head>")]))
    assert said["driven"] == "yes" and said["wide"] == "true" and said["closed"] == "0"
    assert said["panes"] == "true true"
    for way in ("legend", "arrow", "point", "row"):
        lit, dim, pressed = map(int, said[way].split())
        assert 0 < lit < dim and pressed == 7  # in the legend, and tables for three lengths of two tasks
    lit, dim, pressed = map(int, said["escaped"].split())
    assert lit > 0 and dim == 0 and pressed == 0
    (tip,) = re.findall(r'<div id="tip"[^>]*>(.*?)</div></div>', seen, re.S)
    assert "<div>" in tip and "<img" not in tip and "tokens" in tip
    body = of_cells(seen)
    # The speed is the first of a row's numbers that is written in thousands.
    speeds = [re.search(r'data-sort="([\d.]+)"[^>]*>[^<]*k</td>', line) for line in body.split("</tr>")]
    speeds = [float(match.group(1)) for match in speeds if match]
    assert len(speeds) == 27
    assert speeds == sorted(speeds, reverse=True)


def test_without_its_script_the_page_says_all_the_same(tmp_path, monkeypatch):
    read = html._text
    monkeypatch.setattr(html, "_text", lambda name: "" if name == "page.js" else read(name))
    path = tmp_path / "report.html"
    written(path, sample(), KEYS)
    seen = browsed(path)
    assert "data-ready" not in seen and seen.count('<svg class="plot"') >= 10
    assert "<title>full" in seen  # a browser shows it where the pointer rests
