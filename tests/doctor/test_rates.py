"""What is said of rates, from times that are made up; and one product that is really timed, on small matrices."""

import jax
import numpy as np
import pytest

from xformers_lab.doctor import memory, rates
from xformers_lab.doctor.peaks import Peaks
from xformers_lab.measure.speed import Timing

GPU = Peaks({"float32": 67e12, "tf32": 500e12, "bfloat16": 1000e12}, True, {})
CPU = Peaks({"float32": 160e9}, False, {"float32": "2 cores x 32 FLOPs a cycle x 2.50 GHz"})
STEADY = lambda seconds: Timing(seconds, seconds)


def cut(x: np.ndarray, bits: int, nearest: bool) -> np.ndarray:
    """float32 numbers with so many bits of mantissa, the nearest ones or those towards 0."""
    whole = x.view(np.uint32)
    drop = 23 - bits
    half = np.uint32(1 << (drop - 1) if nearest else 0)
    return ((whole + half) & ~np.uint32((1 << drop) - 1)).view(np.float32)


@pytest.mark.parametrize(("bits", "nearest", "name"), [
    (23, False, "float32"), (16, True, "float32"),
    (10, True, "tf32"), (10, False, "tf32"),
    (7, True, "bfloat16"), (7, False, "bfloat16"),
])  # fmt: skip
def test_the_error_of_a_product_tells_its_type(bits, nearest, name):
    x, y = np.random.default_rng(1).normal(size=(2, 256, 256)).astype(np.float32)
    exact = x.astype(np.float64) @ y.astype(np.float64)
    if bits < 23:
        x, y = cut(x, bits, nearest), cut(y, bits, nearest)
    assert rates.told_by(x @ y, exact) == name


def test_a_processor_multiplies_float32_in_full():
    assert rates.arithmetic(jax.devices("cpu")[0]) == "float32"


def test_a_rate_stands_beside_what_is_published():
    told = rates.rate("bfloat16 product", STEADY(1e-3), 4 * 10**11, "8192 x 8192", "bfloat16", GPU, True)
    assert told["found"] == "400 TFLOP/s (8192 x 8192), 40% of the published 1000 TFLOP/s" and told["ok"] is True
    assert told["measured"] == {
        "flops_per_second": 4e14, "computed_in": "bfloat16", "peak_flops_per_second": 1e15
    }  # fmt: skip


def test_a_rate_stands_beside_what_the_processor_could():
    told = rates.rate("float32 product", STEADY(0.5), 4 * 10**10, "1024 x 1024", "float32", CPU, True)["found"]
    assert told == "80 GFLOP/s (1024 x 1024), 50% of what 2 cores x 32 FLOPs a cycle x 2.50 GHz make, 160 GFLOP/s"


@pytest.mark.parametrize(
    ("of", "peaks", "words"),
    [
        ("float32", None, "what it could do at most is not known here"),
        ("bfloat16", CPU, "and no peak of bfloat16 is known: it has no units for it"),
        ("float32", Peaks({"bfloat16": 1e14}, True, {}), "and no peak of float32 is published"),
    ],
)
def test_a_peak_that_nobody_tells(of, peaks, words):
    assert rates.rate("x", STEADY(1.0), 10**9, "4 x 4", of, peaks, True)["found"] == f"1 GFLOP/s (4 x 4), {words}"


@pytest.mark.parametrize(("seconds", "times", "advice"), [
    (2.5, "0.4", "keep dtype=float32"),
    (0.5, "2", "dtype=bfloat16 pays"),
    (0.9, "1.1", "dtype=bfloat16 saves memory, not time"),
])  # fmt: skip
def test_whether_bfloat16_pays(seconds, times, advice):
    told = rates.worth(STEADY(1.0), STEADY(seconds), True)
    assert told["found"] == f"{times} times the rate of float32 in a layer's forward and backward pass: {advice}"
    assert told["ok"] is True


@pytest.mark.parametrize(("timing", "quiet"), [(Timing(1.0, 1.4), True), (STEADY(1.0), False)])
def test_on_a_busy_machine_nothing_is_advised(timing, quiet):
    rate = rates.rate("x", timing, 10**9, "", "float32", None, quiet)
    assert rate["ok"] is None and rate["found"].endswith("; at least, for the machine was busy")
    worth = rates.worth(STEADY(2.5), timing, quiet)
    assert worth["ok"] is None and "run it again when it is quiet" in worth["found"]
    assert worth["measured"] == {"ratio": 2.5}


def test_what_could_not_be_timed_says_why():
    full = rates.rate("x", RuntimeError("RESOURCE_EXHAUSTED: 256MiB"), 1, "", "float32", None, True)
    assert full["ok"] is None and "no memory is free for it" in full["found"]
    broken = rates.worth(STEADY(1.0), ValueError("no bfloat16 here"), True)
    assert broken["ok"] is False and "not measured: ValueError: no bfloat16 here" in broken["found"]


@pytest.mark.parametrize("kind", ["float32", "tf32"])
def test_rates_are_measured(monkeypatch, kind):
    """On matrices of a test's size; where float32 is not full by default, full float32 is timed too."""
    monkeypatch.setattr(rates, "SQUARE", {"cpu": 32, "gpu": 32})
    monkeypatch.setattr(rates, "LAYER", {"cpu": (16, 8), "gpu": (16, 8)})
    monkeypatch.setattr(rates, "arithmetic", lambda device: kind)
    findings = {finding["what"]: finding for finding in rates.examine(jax.devices("cpu")[0], CPU, True)}
    exact = [] if kind == "float32" else ["float32 at precision highest"]
    assert list(findings) == ["float32 product", *exact, "bfloat16 product", "bf16 in training"]
    assert findings["float32 product"]["measured"]["computed_in"] == kind
    assert ("inputs cut to TF32" in findings["float32 product"]["found"]) == (kind == "tf32")
    assert all(finding["measured"].get("flops_per_second", 1) > 0 for finding in findings.values())
    assert findings["bf16 in training"]["measured"]["ratio"] > 0


def test_the_layer_counts_its_products(monkeypatch):
    from xformers_lab.measure.flops import count_flops

    monkeypatch.setattr(rates, "LAYER", {"cpu": (16, 8), "gpu": (16, 8)})
    flops = dict(rates._work(jax.devices("cpu")[0], "float32"))[rates.LAYER16][1]
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((16, 8), (8, 32), (32, 8))]
    step = jax.grad(lambda *arrays: rates._loss("bfloat16", *arrays), argnums=(0, 1, 2))
    assert flops == count_flops(step, *shapes)


def test_memory_in_words():
    GiB = 2**30
    assert memory.told(24 * GiB, 21 * GiB, [])["found"] == "host: 24.0 GiB, 21.0 GiB free"
    assert memory.told(8 * GiB, 21 * GiB, [60 * GiB] * 2)["found"] == (
        "host: 8.0 GiB, 8.0 GiB free; 2 x 60.0 GiB of the devices for jax"
    )
    assert memory.told(None, None, [None])["found"] == "host: unknown; a device does not tell its own"


def test_free_memory_is_read(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   64 kB\n")
    assert memory.available(tmp_path / "meminfo") == 64 * 1024
    assert memory.available(tmp_path / "none") is None
