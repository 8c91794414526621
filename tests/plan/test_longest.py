"""The search for the longest sequence that fits: it ends, it is right, and close."""

from hypothesis import given
from hypothesis import strategies as st

from xformers_lab.plan.longest import CLOSE, MOST, Found, longest


@given(st.integers(1, 5000), st.integers(0, 2 * MOST))
def test_the_longest_is_close_to_the_most_that_fits(first, most):
    tried = []

    def fits(length):
        tried.append(length)
        return length <= most

    found = longest(fits, first)
    assert len(tried) == len(set(tried)) <= 40
    assert found.stopped is None
    if found.fits is None:  # halved as often as it could be
        assert found.too_long is not None and found.too_long % 2 and found.too_long > most
        return
    assert found.fits <= most
    if found.too_long is None:
        assert 2 * found.fits > MOST
        return
    assert most < found.too_long
    step = min(first, found.fits)
    assert found.too_long - found.fits <= max(2 * step, found.fits // CLOSE)


def test_a_length_of_which_nothing_tells_ends_the_search():
    assert longest(lambda length: None, 64) == Found(stopped=64)
    assert longest(lambda length: None if length == 256 else True, 64) == Found(fits=128, stopped=256)
    assert longest(lambda length: None if length % 64 else length < 100, 64) == Found(64, 128), "nothing between"
    assert longest(lambda length: None if length == 32 else length < 40, 64) == Found(too_long=64, stopped=32)
