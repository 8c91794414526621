"""The efficiency length: where curves cross, with an interval, and never beyond what was measured."""

import math

import numpy as np
import pytest
from report_rows import bench, cell

from xformers_lab.report import findings, rows
from xformers_lab.report.crossover import crossovers, marks

LENGTHS = (64, 128, 256, 512, 1024)
KEYS = ["attention", "seq_len", "pass"]


def timed(curves: dict, lengths=LENGTHS, noise: float = 0.0, rounds: int = 5) -> list[dict]:
    """A bench whose times are a function of the length, with noise of its own in each round."""
    rng = np.random.default_rng(0)
    cells = []
    for name, seconds in curves.items():
        for at in lengths:
            taken = [seconds(at) * math.exp(noise * rng.standard_normal()) for _ in range(rounds)]
            row = bench(name, at, sorted(taken)[rounds // 2], 1.0)
            cells.append(row | {"seconds_rounds": taken})
    return cells


def of(cells, keys=KEYS, measure="time"):
    (group,) = rows.groups(cells, keys)
    return {each.series: each for each in crossovers(group, measure)}


QUADRATIC, LINEAR = (lambda n: 1e-8 * n * n), (lambda n: 3e-6 * n)  # they cross at 300


def test_curves_that_are_powers_cross_where_they_do():
    """Lines in logarithms are interpolated without error, between any lengths."""
    (found,) = of(timed({"full": QUADRATIC, "linear": LINEAR})).values()
    assert found.at == pytest.approx(300) and (found.low, found.high) == pytest.approx((300, 300))
    assert found.words == "300 tokens" and found.reference == "full" and found.lengths == (64, 1024)
    assert dict(found.ratios)[1024] == pytest.approx(300 / 1024)


def test_the_interval_is_of_the_rounds_and_holds_the_truth():
    (found,) = of(timed({"full": QUADRATIC, "linear": LINEAR}, noise=0.1)).values()
    assert found.low is not None and found.high is not None
    assert found.low < found.at < found.high and found.low < 300 < found.high < 2 * found.low
    assert found.words == f"{found.at:,.0f} tokens [{found.low:,.0f}, {found.high:,.0f}]"
    (wide,) = of(timed({"full": QUADRATIC, "linear": LINEAR}, noise=0.4)).values()
    assert wide.low is not None and wide.high is not None and wide.high / wide.low > found.high / found.low


def test_nothing_is_extrapolated():
    slow = of(timed({"full": QUADRATIC, "linear": lambda n: 20e-6 * n}))["linear"]  # they would cross at 2,000
    assert math.isinf(slow.at) and slow.words == "not within 64 to 1,024"
    fast = of(timed({"full": QUADRATIC, "linear": lambda n: 1e-7 * n}))["linear"]  # at 10
    assert fast.at == 0 and fast.words == "from the shortest on (64)"
    open_end = of(timed({"full": QUADRATIC, "linear": lambda n: 6e-6 * n}, noise=0.4))["linear"]
    assert open_end.words.endswith("beyond 1,024]")
    untold = of(timed({"full": QUADRATIC, "linear": lambda n: 9e-6 * n}, noise=0.4))["linear"]
    assert untold.words.startswith("not within 64 to 1,024 (not told from it from")
    assert of(timed({"full": QUADRATIC, "linear": LINEAR}, lengths=(64,))) == {}


def test_what_noise_may_explain_is_said():
    alike = of(timed({"full": LINEAR, "linear": lambda n: 0.999 * LINEAR(n)}, noise=0.2))["linear"]
    assert "told from it" in alike.words or "beyond 1,024" in alike.words
    # One run tells a length, and no interval.
    (once,) = of(timed({"full": QUADRATIC, "linear": LINEAR}, rounds=1)).values()
    assert once.low is None and once.high is None and once.words == "300 tokens"


def test_a_chart_marks_what_lies_within_the_lengths():
    curves = {"full": QUADRATIC, "linear": LINEAR, "slow": lambda n: 20e-6 * n, "fast": lambda n: 1e-7 * n}
    (group,) = rows.groups(timed(curves), KEYS)
    assert marks(group) == {"linear": pytest.approx((300, 300, 300))}
    (group,) = rows.groups(timed({"full": QUADRATIC, "linear": lambda n: 6e-6 * n}, noise=0.4), KEYS)
    assert marks(group)["linear"][1:] == (None, None)  # the interval ends beyond them


def test_a_curve_that_comes_back_counts_from_where_it_stays_below():
    bumpy = of(timed({"full": QUADRATIC, "linear": lambda n: QUADRATIC(n) * (0.5 if n in (64, 1024) else 2)}))["linear"]
    assert bumpy.at == pytest.approx(math.sqrt(512 * 1024))


def test_a_variant_is_held_against_full_attention_with_its_other_keys():
    cells = []
    for norm, slower in (("pre", 1.0), ("post", 2.0)):
        curves = {"full": lambda n, s=slower: s * QUADRATIC(n), "linear": LINEAR}
        cells += [row | {"norm": norm} for row in timed(curves)]
    found = of(cells, [*KEYS, "norm"])
    assert found["linear · pre"].reference == "full · pre" and found["linear · pre"].at == pytest.approx(300)
    assert found["linear · post"].reference == "full · post" and found["linear · post"].at == pytest.approx(150)
    assert of([row for row in cells if row["attention"] != "full"], [*KEYS, "norm"]) == {}
    assert of([row for row in cells if row["norm"] == "pre"], ["seq_len", "pass"]) == {}


def test_training_rows_are_paired_by_seed_and_memory_has_no_interval():
    cells = [
        cell(name, seq_len=at, seed=seed, seconds_median=curve(at) * (1 + seed / 3), temp_bytes=size(at))
        for name, curve, size in (("full", QUADRATIC, lambda n: n * n), ("linear", LINEAR, lambda n: 100 * n))
        for at in LENGTHS
        for seed in range(3)
    ]
    keys = ["attention", "seq_len", "seed"]
    assert of(cells, keys)["linear"].words == "300 tokens"  # seeds that are slow are so for both
    assert of(cells, keys, "memory")["linear"].words == "100 tokens"
    text = "\n".join(findings.sentences(rows.groups(cells, keys)[0]))
    assert "Efficiency length, from which on time is less than that of full: linear 300 tokens." in text
    assert "Efficiency length, from which on memory is less than that of full: linear 100 tokens." in text
    beside = [row | {"role": "baseline", "name": "LSTM"} for row in cells if row["attention"] == "linear"]
    assert list(of([*cells, *beside], keys)) == ["linear"]
