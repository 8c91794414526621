"""Fits over sizes: where curves cross, what is told of whom, what is left out; an extrapolation is no finding."""

import io
import json
import math

import numpy as np
import pytest
from report_rows import HOSTILE, cell, printed, written
from rich.console import Console

from xformers_lab.compare.scaling import Scale
from xformers_lab.report import listing, scaling, scaling_words, table
from xformers_lab.report.figures import write_figures

KEYS = ["seed", "attention", "dim"]
SIZES = np.geomspace(1e4, 1e6, 5)


def law(floor, scale, exponent):
    return lambda x: floor + scale * (x / 1e4) ** -exponent


# They cross at 21,040: linear is lower below, full above; local is lower nowhere.
FULL, LINEAR, LOCAL = law(1.5, 2.0, 0.3), law(1.7, 1.75, 0.3), law(1.5, 2.2, 0.3)
CROSSING = 1e4 * (0.25 / 0.2) ** (1 / 0.3)


def study(curves: dict, sizes=SIZES, seeds=3, noise=0.003, more=lambda row: {}) -> list[dict]:
    """Rows of losses that are functions of the size, with noise of its own in each."""
    dice, cells = np.random.default_rng(1), []
    for at, x in enumerate(sizes):
        for name, curve in curves.items():
            for seed in range(seeds):
                loss = curve(x) * math.exp(noise * dice.standard_normal())
                about = {"dim": 32 * (at + 1), "loss": loss, "parameters": round(x) + 500, "embedding_parameters": 500}
                about |= {"flops": 6 * x * 1024, "seconds_median": x / 1e7, "steps": 100, "lr": 0.003, "batch": 16}
                row = cell(name, task="lm", seq_len=64, seed=seed, metric=loss / math.log(2), **about)
                cells.append(row | more(row))
    return cells


def fit_of(cells, scale=None, keys=KEYS) -> scaling.Scaling:
    (found,) = scaling.of(cells, keys, scale or Scale())
    return found


def test_a_crossing_is_found_with_an_interval_that_holds_it():
    found = fit_of(study({"full": FULL, "linear": LINEAR, "local": LOCAL}))
    assert [curve.name for curve in found.curves] == ["full", "linear", "local"]
    for curve in found.curves:
        assert curve.fit.floor and curve.exponent is not None and curve.fit.exponent[0] == pytest.approx(0.3, abs=0.02)
        assert curve.exponent[0] < curve.fit.exponent[0] < curve.exponent[1]
        assert curve.seeds == (0, 1, 2) and curve.sizes == ((32,), (64,), (96,), (128,), (160,))
    pairs = {pair.names: pair for pair in found.pairs}
    crossing = pairs["full", "linear"]
    (where,) = crossing.crossings
    assert crossing.status == "crosses" and crossing.lower == ("linear", "full")
    assert 1e4 < where.low < CROSSING < where.high < 5e4 and where.low < where.at < where.high
    assert pairs["full", "local"].lower[0] == "full" and not pairs["full", "local"].crossings
    first, *others = scaling_words.sentences(found)
    assert first.startswith("full and linear cross at ") and "within the sizes measured (10k to 1M)" in first
    assert "at smaller sizes linear has the lower loss, at larger ones full" in first
    assert any("order changes with the size: linear, full and local at the smallest (dim=32)" in one for one in others)
    assert any("exponents a: 0.3" in one or "exponents a: 0.2" in one for one in others)


def test_curves_that_differ_everywhere_do_not_cross():
    found = fit_of(study({"full": FULL, "worse": lambda x: 1.1 * FULL(x)}))
    (pair,) = found.pairs
    assert pair.status == "apart" and pair.lower == ("full", "full") and not pair.meets
    assert scaling_words.sentences(found)[0].startswith("No crossing, told at every size")


def test_alike_curves_are_not_told_apart_and_one_seed_tells_nothing():
    (pair,) = fit_of(study({"full": FULL, "same": FULL}, noise=0.01)).pairs
    assert pair.status == "untold" and not pair.crossings
    found = fit_of(study({"full": FULL, "linear": LINEAR}, seeds=1))
    (pair,) = found.pairs
    assert pair.status == "untested" and not pair.crossings and len(pair.meets) == 1
    said = scaling_words.sentences(found)
    assert said[0].startswith("Not tested, with one seed: the curves of full and linear meet at")
    assert any("order changes with the size, which the seeds do not tell: linear and full at" in one for one in said)
    assert found.notes[0].startswith("One seed: intervals of exponents are by what the curves miss")
    assert all(curve.exponent is not None and curve.floor is None for curve in found.curves)


def test_a_difference_in_a_part_of_the_sizes_is_said_of_that_part():
    closing = lambda x: FULL(x) * (1 + 0.08 * (x / 1e4) ** -0.8)
    (pair,) = fit_of(study({"full": FULL, "closing": closing}, noise=0.003)).pairs
    assert pair.status == "partly" and pair.lower == ("full", "full") and pair.told is not None
    assert pair.told[0] == pytest.approx(1e4) and pair.told[1] < 5e5


def test_an_extrapolated_crossing_is_no_finding():
    """Lines that meet at 4e6, four times the largest size."""
    first, second = (lambda x: 2.0 * (x / 4e6) ** -0.1), (lambda x: 2.0 * (x / 4e6) ** -0.13)
    found = fit_of(study({"full": first, "linear": second}, sizes=SIZES[::2], noise=0.001))
    (pair,) = found.pairs
    assert pair.status == "apart" and not pair.crossings and not pair.meets
    assert pair.extrapolated == pytest.approx(4e6, rel=0.1)
    said = scaling_words.sentences(found)
    (line,) = [sentence for sentence in said if "would meet" in sentence]
    assert line.startswith("Extrapolated, and so no finding") and "the largest size measured" in line
    assert not any("cross at" in sentence for sentence in said)
    far = lambda x: 2.0 * (x / 4e8) ** -0.13
    (pair,) = fit_of(study({"full": lambda x: 2.0 * (x / 4e8) ** -0.1, "linear": far}, sizes=SIZES[::2])).pairs
    assert pair.extrapolated is None


def test_who_is_below_whom_is_said_of_the_means_where_a_curve_misses_them():
    """A hump that no power law has: the lines of three sizes would have full below humped at the middle one."""
    humped = lambda x: FULL(x) * (0.93 if 5e4 < x < 5e5 else 1.07)
    found = fit_of(study({"full": FULL, "humped": humped}, sizes=SIZES[::2], noise=0.002))
    (pair,) = found.pairs
    assert pair.straight and pair.status == "crosses" and len(pair.crossings) == 2 and pair.lower == ("full", "full")
    said = scaling_words.sentences(found)
    assert any(sentence.startswith("Curves that miss their means by more than the seeds explain") for sentence in said)
    assert any("full has the lower loss at both ends" in sentence for sentence in said)
    assert scaling_words.as_json(found)["pairs"][0]["by"] == "means"


def test_a_floor_that_the_seeds_do_not_tell_is_left_out():
    straight = lambda x: 4.0 * (x / 1e4) ** -0.1
    found = fit_of(study({"full": straight, "linear": lambda x: 1.1 * straight(x)}, noise=0.01))
    for curve in found.curves:
        assert not curve.fit.floor and curve.fit.why == scaling.UNTOLD and curve.floor is None
        assert curve.fit.exponent[0] == pytest.approx(0.1, abs=0.01)
    assert any("the seeds do not tell its floor from 0" in sentence for sentence in scaling_words.sentences(found))


def test_a_size_that_a_variant_lacks_is_in_no_curve_and_said():
    oom = {"status": "oom", "reason": "2 GiB asked"}
    gone = lambda row: oom if (row["attention"], row["dim"]) == ("linear", 160) else {}
    found = fit_of(study({"full": FULL, "linear": LINEAR}, more=gone))
    assert all(curve.sizes[-1] == (128,) and len(curve.seeds) == 3 for curve in found.curves)
    (said,) = found.left_out
    assert said.startswith("dim=160: linear has no result (out of memory: 2 GiB asked)")
    assert scaling_words.sentences(found)[-1] == f"Left out of the fits: {said}."


def test_a_seed_that_one_cell_lacks_is_dropped_where_that_loses_least():
    gone = lambda row: {"status": "nan", "reason": "loss nan"} if (row["seed"], row["attention"]) == (1, "full") else {}
    found = fit_of(study({"full": FULL, "linear": LINEAR}, sizes=SIZES[:3], more=gone))
    assert all(curve.seeds == (0, 2) for curve in found.curves) and len(found.curves[0].sizes) == 3
    assert found.left_out[0].startswith("seed 1: full at dim=32 has no result (not a number")
    one = lambda row: {"status": "nan"} if (row["seed"], row["attention"], row["dim"]) == (1, "full", 32) else {}
    kept = fit_of(study({"full": FULL, "linear": LINEAR}, more=one))
    assert kept.curves[0].seeds == (0, 1, 2) and kept.left_out[0].startswith("dim=32: full has no result")


def test_a_variant_with_too_few_sizes_is_left_out_whole():
    gone = lambda row: {"status": "failed", "reason": "x"} if row["attention"] == "linear" and row["dim"] > 64 else {}
    found = fit_of(study({"full": FULL, "linear": LINEAR}, more=gone))
    assert [curve.name for curve in found.curves] == ["full"] and not found.pairs and len(found.curves[0].sizes) == 5
    assert found.left_out == ("linear: 2 different sizes have a result, and a fit takes 3 (failed: x)",)
    none = fit_of(study({"full": FULL}, more=lambda row: {"status": "failed"}))
    assert scaling_words.sentences(none)[0] == "No variant has results at enough sizes for a fit."


def test_variants_that_share_no_three_sizes_are_fitted_alone():
    mine = {"full": (32, 64, 96), "linear": (96, 128, 160)}
    gone = lambda row: {} if row["dim"] in mine[row["attention"]] else {"status": "nan"}
    found = fit_of(study({"full": FULL, "linear": LINEAR}, more=gone))
    assert [len(curve.sizes) for curve in found.curves] == [3, 3] and not found.pairs and found.orders is None
    assert "no crossings: the variants share fewer than 3 sizes" in found.left_out


def test_what_a_size_is():
    cells = study({"full": FULL, "linear": LINEAR})
    without = fit_of(cells)
    assert (
        without.curves[0].fit.sizes == pytest.approx(np.round(SIZES)) and "without those of embeddings" in without.sized
    )
    older = [{key: value for key, value in row.items() if key != "embedding_parameters"} for row in cells]
    everything = fit_of(older)
    assert (
        everything.curves[0].fit.sizes == pytest.approx(np.round(SIZES) + 500) and "all parameters" in everything.sized
    )
    flops = fit_of(cells, Scale(x="flops"))
    assert flops.curves[0].fit.sizes == pytest.approx(6 * SIZES * 1024 * 100)
    seconds = fit_of(cells, Scale(x="seconds"))
    assert seconds.curves[0].fit.sizes == pytest.approx(SIZES / 1e7 * 100)
    assert "Seconds are of this machine" in seconds.notes[-1]
    untimed = fit_of([row | {"seconds_median": None} for row in cells], Scale(x="seconds"))
    assert not untimed.curves and "seconds of training are not known" in untimed.left_out[0]


def test_what_is_fitted():
    cells = study({"full": FULL, "linear": LINEAR})
    bits = fit_of(cells, Scale(y="metric"))
    assert bits.scored == "bits/byte"
    assert bits.curves[0].losses == pytest.approx(fit_of(cells).curves[0].losses / math.log(2))
    accuracy = [
        row | {"metric": 1 - row["loss"] / 10, "higher_is_better": True, "metric_name": "accuracy"} for row in cells
    ]
    wrong = fit_of(accuracy, Scale(y="metric"))
    assert wrong.scored == "1 - accuracy" and wrong.curves[0].losses == pytest.approx(
        fit_of(cells).curves[0].losses / 10
    )
    perfect = [row | {"metric": 1.0, "higher_is_better": True} for row in cells]
    assert "has no logarithm" in fit_of(perfect, Scale(y="metric")).left_out[0]


def test_a_recipe_that_favours_a_size_is_noted():
    cells = study({"full": FULL, "linear": LINEAR})
    notes = " ".join(fit_of(cells).notes)
    assert "lr=0.003 is the same at every size" in notes and "Every size took 100 steps of 16 sequences" in notes
    for mended in ({"tuning": {"best": {"lr": 1e-3}}}, {"parametrisation": "mup"}):
        assert "lr=" not in " ".join(fit_of([row | mended for row in cells]).notes)
    coupled = [row | {"lr": 0.1 / row["dim"]} for row in cells]
    found = fit_of(coupled, keys=[*KEYS, "lr"])
    assert len(found.curves) == 2 and "lr=" not in " ".join(found.notes)  # it follows the size, and names no variant


def test_each_task_and_length_has_its_own_curves():
    cells = study({"full": FULL, "linear": LINEAR})
    longer = [row | {"seq_len": 128, "loss": row["loss"] + 0.1} for row in cells]
    found = scaling.of([*cells, *longer], [*KEYS, "seq_len"], Scale())
    assert [one.title for one in found] == ["lm at 64 tokens", "lm at 128 tokens"]
    lines = scaling_words.of_several(found)
    assert lines[0].startswith("lm at 64 tokens: full and linear cross at") and lines[-1].startswith(
        "lm at 128 tokens: "
    )


def test_json_and_the_table_have_the_numbers():
    found = fit_of(study({"full": FULL, "linear": LINEAR}))
    whole = json.loads(json.dumps(scaling_words.as_json(found)))
    (full, linear), (pair,) = whole["curves"], whole["pairs"]
    assert (
        full["law"] == "L = E + A x^-a"
        and full["exponent_interval"][0] < full["exponent"] < full["exponent_interval"][1]
    )
    assert full["floor"] + full["factor"] * 1e4 ** -full["exponent"] == pytest.approx(3.5, rel=0.01)
    assert [point["size"] for point in linear["points"]] == [f"dim={32 * (at + 1)}" for at in range(5)]
    assert pair["status"] == "crosses" and pair["crossings"][0]["low"] < CROSSING < pair["crossings"][0]["high"]
    assert pair["extrapolated"] is None and whole["verdict"] == scaling_words.sentences(found)
    first, _ = scaling_words.table(found)
    assert first["curve"] == "full" and first["parameters"] == "10k to 1M" and first["fitted"] == "L = E + A x^-a"


def test_the_page_and_the_figures_have_the_chart(tmp_path):
    cells = study({"full": FULL, "linear": LINEAR, "local": LOCAL})
    found = scaling.of(cells, KEYS, Scale())
    page = written(tmp_path / "scale.html", cells, KEYS, scalings=found)
    assert "<h3>Loss by size</h3>" in page and "cross at" in page and "who won" not in page
    assert page.count("upright: where two curves cross") == 1 and "Content-Security-Policy" in page
    legend = page[page.index('class="legend"') :]
    assert legend.index(">full<") < legend.index(">full · dim=32<")
    paths = write_figures(cells, KEYS, tmp_path / "figures", scalings=found)
    drawn = next(path for path in paths if path.name.startswith("loss_by_size"))
    assert "linear" in drawn.read_text() and drawn.with_suffix(".pdf").exists()


def test_hostile_names_stay_words(tmp_path):
    for name in HOSTILE:
        found = scaling.of(study({"full": FULL, name: LINEAR}), KEYS, Scale())
        page = written(tmp_path / "scale.html", study({"full": FULL, name: LINEAR}), KEYS, scalings=found)
        assert "<script>document" not in page and "<img src=x" not in page
        assert all("\x1b" not in sentence for sentence in scaling_words.of_several(found))


def test_the_rows_of_sizes_have_no_winner(capsys):
    cells = study({"full": FULL, "linear": LINEAR})
    page = io.StringIO()
    table.print_rows(cells, KEYS, Console(file=page, width=200), judged=False)
    whole, alone = printed(cells, KEYS, width=200), page.getvalue()
    assert "best at its length" in whole and "Parameters differ by more than 2 %" in whole
    assert "best at its length" not in alone and "Parameters differ" not in alone and " *" not in alone
    listing.print_listing(scaling_words.table(fit_of(cells)))
    assert "exponent a" in capsys.readouterr().out
