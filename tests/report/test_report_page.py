"""The report as one offline file: its charts, every row and reason, names harmless, nothing needed from outside."""

import json
import math
import pathlib
import re
import shutil
import subprocess

import pytest
from report_rows import ATTENTIONS, HOSTILE, KEYS, PAYLOAD, bench, cell, failed, sample, written

from xformers_lab.report import charts, html, rows


def specs(page: str) -> str:
    """The text of the block that holds the charts."""
    return re.findall(r'<script type="application/json" id="specs">(.*?)</script>', page, re.S)[0]


def without_library(page: str) -> str:
    """The page without the bundled Vega library."""
    return page.replace(html._library(), "")


# ---- charts -----------------------------------------------------------------------------------------------------


def test_charts_hold_the_aggregated_numbers():
    cells = [cell(seed=seed, metric=value) for seed, value in enumerate((0.8, 0.9, 1.0))]
    cells += [cell(seq_len=128, metric=0.5), cell("linear", metric=0.2)]
    (group,) = rows.groups(cells, [*KEYS, "seed"])
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
    cells = [cell("full", metric=0.9, computation=4.0), cell("linear", metric=0.8, computation=2.5), cell("axial")]
    names = ["full", "linear", "axial"]
    title = "Accuracy against computation per token"
    drawn = {chart.title: chart for chart in charts.of_group(rows.groups(cells, KEYS)[0], names, KEYS)}
    spec = drawn[title].spec
    assert [(item["name"], item["cost"], item["value"]) for item in spec["data"]["values"]] == [
        ("full", 4.0, 0.9), ("linear", 2.5, 0.8),
    ]  # fmt: skip
    assert spec["data"]["values"][1]["cost_text"] == "2.5 layers per token"
    assert "far left and high" in drawn[title].note
    same = [row | {"computation": 4.0} for row in cells]
    assert title not in [chart.title for chart in charts.of_group(rows.groups(same, KEYS)[0], names, KEYS)]


def test_a_logarithmic_axis_says_what_it_has_no_place_for():
    cells = [cell("full", temp_bytes=0), cell("linear", temp_bytes=2**20)]
    (group,) = rows.groups(cells, KEYS)
    chart = next(chart for chart in charts.of_group(group, ["full", "linear"], KEYS) if "memory" in chart.title)
    assert "logarithmic, where 0 has no place: full." in chart.note
    assert [item["name"] for item in chart.spec["data"]["values"]] == ["linear"]


def test_a_thinned_curve_keeps_its_end():
    cells = [cell(name, curve=[[step, 1.0] for step in range(1, 951)]) for name in ATTENTIONS * 30]
    (group,) = rows.groups(cells, KEYS)
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


def test_validation_is_drawn_over_its_steps():
    points = [[100, 1.5, 0.4], [200, None, None], [300, 0.9, 0.8]]
    cells = [cell("full", validation=points), cell("linear", validation=[[300, 1.0, 0.7]])]
    drawn = {chart.title: chart for chart in charts.of_group(rows.groups(cells, KEYS)[0], ["full", "linear"], KEYS)}
    scores = drawn["Validation accuracy"].spec["data"]["values"]
    assert [(item["step"], item["loss"]) for item in scores] == [([100, 300], [0.4, 0.8]), ([300], [0.7])]
    assert drawn["Validation accuracy"].note.startswith("Higher is better; on the validation split")
    assert drawn["Validation loss"].spec["data"]["values"][0]["loss"] == [1.5, 0.9]
    assert drawn["Validation loss"].spec["layer"][0]["mark"]["point"]
    once = [cell("full", validation=points[:1])]
    titles = [chart.title for chart in charts.of_group(rows.groups(once, KEYS)[0], ["full"], KEYS)]
    assert "Validation accuracy" not in titles and "Training loss" in titles


def test_the_table_says_of_which_step_a_metric_is(tmp_path):
    cells = [cell("full", validation=[[250, 0.31, 0.912]], step=300), cell("linear", steps=200, seconds_ratio=1.1)]
    page = written(tmp_path / "r.html", cells, KEYS)
    body = page[page.index("<thead>") : page.index("</tbody>")]
    assert ">after step</button>" in body and "0.912 (loss 0.310) at step 250" in body
    assert "<span>300</span>" in body and "<span>200</span>" in body


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
    text = without_library(page)
    assert len(text) < len(page) - 500_000
    assert not re.search(r"https?://|[\"'(]//|url\(|@import|<link|<iframe|<img", text, re.I)
    assert "src=" not in text and "href=" not in text


def test_a_large_comparison_stays_below_two_megabytes(tmp_path):
    cells = sample(seeds=range(7), lengths=(64, 128, 256, 512, 1024, 2048))
    assert len(cells) == 420
    assert len(written(tmp_path / "r.html", cells, [*KEYS, "seed"]).encode()) < 2_000_000


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
    cells = [row | payload | {"machine": {PAYLOAD: f"{PAYLOAD}{at % 2}"}} for at, row in enumerate(sample(HOSTILE))]
    more = {"title": PAYLOAD, "command": PAYLOAD}
    text = without_library(written(tmp_path / "r.html", cells, [PAYLOAD, *KEYS], **more))
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
    cells = [row | {"id": PAYLOAD, "metric_name": HOSTILE[-1]} for row in sample(HOSTILE)]
    written(path, cells, KEYS, title="harmless", command=PAYLOAD)
    seen = browsed(path)
    assert 'data-charts="drawn"' in seen[:2000]
    assert seen.count("<svg") >= 10 + len(HOSTILE)
    assert len(re.findall(r'<g class="mark-line', seen)) >= 8
    assert "<title>harmless</title>" in seen
    assert "<img" not in without_library(seen)


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
    speeds = [float(match.group(1)) for match in speeds if match]
    assert len(speeds) == 27
    assert speeds == sorted(speeds, reverse=True)
    assert "<title>harmless</title>" in seen
