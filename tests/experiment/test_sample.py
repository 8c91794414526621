"""Samples are paired by trial, and findings decide by their whole interval."""

import math
import random

import pytest

from xformers_lab.experiment import (
    Finding,
    Sample,
    at_least,
    at_most,
    highest,
    lowest,
    rank_correlation,
    reported,
    slope,
)
from xformers_lab.experiment.findings import outcomes, verdict


def test_arithmetic_is_paired():
    """A shift that all seeds share leaves no spread in the difference, however far the seeds lie apart."""
    first, second = Sample({0: 1.0, 1: 5.0, 2: 9.0}), Sample({1: 5.5, 2: 9.5, 3: 1.0})
    gap = second - first
    assert gap.values == {1: 0.5, 2: 0.5}
    assert gap.estimate() == (0.5, 0.0, 2)
    assert (first / 2).values == {0: 0.5, 1: 2.5, 2: 4.5}
    assert (1 - first).values == {0: 0.0, 1: -4.0, 2: -8.0}
    assert highest(first, second).values == {1: 5.5, 2: 9.5} and lowest(first, second).values == {1: 5.0, 2: 9.0}


def test_sampling_errors_add_up():
    first, second = Sample({0: 0.8}, sampled=0.03), Sample({0: 0.4}, sampled=0.04)
    gap, ratio = (first - second).estimate(), (first / second).estimate()
    assert gap is not None and gap.half == pytest.approx(0.05)
    assert ratio is not None and ratio.half == pytest.approx(2 * math.hypot(0.03 / 0.8, 0.04 / 0.4))


def test_what_is_missing_stays_said():
    gap = Sample({0: 1.0}, missing=("seed 1: nan",)) - Sample({}, missing=("seed 0: out of memory",))
    assert gap.estimate() is None and gap.missing == ("seed 1: nan", "seed 0: out of memory")
    assert (Sample({0: 1.0}) / Sample({0: 0.0})).missing == ("a divisor is zero",)


def test_slope_is_the_exponent():
    sizes = (256, 512, 1024)
    costs = {size: Sample({trial: 3 * (trial + 1) * size**1.5 for trial in range(3)}) for size in sizes}
    exponent = slope(costs).estimate()
    assert exponent is not None and exponent.mean == pytest.approx(1.5) and exponent.half == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two sizes"):
        slope({256: Sample({0: 1.0})})


def test_rank_correlation_is_of_what_is_known():
    firsts = [Sample({0: 1.0, 1: 1.0}), Sample({0: 2.0, 1: 3.0}), Sample({0: 9.0, 1: 2.0}), Sample({})]
    sizes = [Sample({0: size, 1: size}, exact=True) for size in (10.0, 20.0, 30.0, 0.0)]
    assert rank_correlation(firsts, sizes).values == pytest.approx({0: 1.0, 1: 0.5})
    estimate = rank_correlation(firsts, sizes).estimate()
    assert estimate is not None and estimate.half  # an exact number beside a measured one is not exact together
    with pytest.raises(ValueError, match="three pairs"):
        rank_correlation(firsts[2:], sizes[2:])


@pytest.mark.parametrize(
    "finding, holds",
    [
        (at_least("clear", Sample({0: 1.0, 1: 1.1, 2: 1.05}), 0.5), True),
        (at_least("clearly not", Sample({0: 0.1, 1: 0.12, 2: 0.11}), 0.5), False),
        (at_least("straddles", Sample({0: 0.1, 1: 1.0, 2: 0.5}), 0.5), None),
        (at_most("one seed tells nothing", Sample({0: 0.1}), 0.5), None),
        (at_most("one count tells all", Sample({0: 0.1}, exact=True), 0.5), True),
        (at_most("nothing was measured", Sample({}), 0.5), None),
        (reported("no rule", Sample({0: 1.0, 1: 1.0})), None),
        (Finding("between", Sample({0: 1.0, 1: 1.0, 2: 1.0}), low=0.9, high=1.1), True),
    ],
    ids=lambda value: value.what if isinstance(value, Finding) else "",
)
def test_findings(finding, holds):
    assert outcomes([finding]) == [holds]


def test_a_verdict_needs_every_finding():
    yes = at_least("yes", Sample({0: 1.0, 1: 1.0}), 0.5)
    no = at_least("no", Sample({0: 0.0, 1: 0.0}), 0.5)
    open_ = at_least("open", Sample({0: 0.0, 1: 1.0}), 0.5)
    shown = reported("shown", Sample({0: 0.0, 1: 0.0}))
    assert verdict([yes, shown]) == "reproduced"
    assert verdict([yes, open_]) == "inconclusive"
    assert verdict([yes, open_, no]) == "not reproduced at this scale"
    with pytest.raises(ValueError, match="threshold"):
        verdict([shown])


def test_errors_of_a_verdict_stay_in_bounds():
    """With every true value on its threshold: what is false in one part is seldom reproduced, what is true in all parts
    seldom refuted; 5 % each, over families of four findings of three seeds."""
    draw = random.Random(0)
    sample = lambda mean: Sample({seed: draw.gauss(mean, 1) for seed in range(3)})
    runs = 1000
    wrong = sum(
        verdict([at_least("false", sample(0), 0), *(at_least("sure", sample(50), 0) for _ in range(3))]) == "reproduced"
        for _ in range(runs)
    )
    refuted = sum(
        verdict([at_least("at the edge", sample(0), 0) for _ in range(4)]) == "not reproduced at this scale"
        for _ in range(runs)
    )
    assert 0.01 < wrong / runs < 0.05  # one side of a 95 % interval
    assert 0.01 < refuted / runs < 0.05
