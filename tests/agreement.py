"""How near two float32 results are that come from different sums of the same numbers."""

import numpy as np


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=1e-4)
