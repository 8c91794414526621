"""What users run is proven: every choice of every shelf, compiled at XLA's default flags, each in its own process.

The other tests compile cheaply (conftest.py), and the compiler has faults that only its default flags bring out. It
takes the longest of all tests, so CI looks at a few mechanisms, each of another engine, and at a layer and a depth that
are built otherwise; `make test-deep` looks at all.
"""

import pathlib
from collections.abc import Iterator

import pytest

from default_flags import process
from xformers_lab import spec

pytestmark = pytest.mark.full

# Masks in blocks, sums in chunks, sorted buckets, and what stands around them.
QUICK = ("attention/local", "attention/gla", "attention/reformer", "ffn/moe", "depth/universal")
PLANTED = pathlib.Path(__file__).parent / "planted"


def choices() -> Iterator:
    """Every choice of every shelf; slow but for a few."""
    for shelf in spec.SHELVES:
        for name in spec.names(shelf) if shelf != "task" else ():
            yield pytest.param(shelf, name, marks=[] if f"{shelf}/{name}" in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("shelf, name", list(choices()))
def test_holds_at_default_flags(shelf, name):
    """It trains, the same at every try; attention equals its reference and can be benched."""
    ended = process.run(shelf, name)
    assert ended.fault is None, f"{shelf}={name} {ended.fault}"


@pytest.mark.slow
@pytest.mark.parametrize("name", spec.names("attention"))
def test_long_attention_holds_at_default_flags(name):
    ended = process.run("attention", name, "--deep", limit=580)
    assert ended.fault is None, f"attention={name} {ended.fault}"


FORWARD_BACKWARD = "forward and backward (causal, T=128, S=128, padded, biased)"
FAULTS = {
    "crashes": f"crashed (SIGSEGV): running {FORWARD_BACKWARD}",
    "wrong_in_chunks": "attend against reference (causal, T=128, S=128, padded, biased), gradient of inputs q: ",
    "changes": f"{FORWARD_BACKWARD}: run twice on the same arrays, ",
    "calls_lapack": f"{FORWARD_BACKWARD}: the program holds what XLA:CPU gets wrong",
    "sums_products": f"{FORWARD_BACKWARD}: the program holds what XLA:CPU gets wrong",
}


@pytest.mark.parametrize("planted", FAULTS)
def test_a_planted_fault_is_reported(planted):
    ended = process.run("attention", str(PLANTED / f"{planted}.py"))
    assert (ended.fault or "").startswith(FAULTS[planted]), ended


def test_what_never_ends_is_ended():
    ended = process.run("attention", str(PLANTED / "never_ends.py"), limit=20)
    assert (ended.fault or "").startswith("did not end in 20 s: "), ended
    assert ended.seconds < 30


def test_an_exception_is_reported():
    ended = process.run("attention", str(PLANTED / "__init__.py"))
    assert (ended.fault or "").startswith("raised an exception: before it began\n"), ended
    assert "Error" in (ended.fault or "")
