"""How a cost grows with length: the p of cost ~ length^p."""

from collections.abc import Sequence

import numpy as np

# Through two points a line always goes, and says nothing of whether it is one.
LEAST = 3


def fit(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of the power law values = c * lengths^p: the least-squares slope on logarithmic axes.

    Raises ValueError with fewer than LEAST different lengths, or where a length or a value is not positive and finite.
    """
    x, y = np.asarray(lengths, float), np.asarray(values, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"one value for each length: got {x.shape} lengths and {y.shape} values")
    if len(set(x.tolist())) < LEAST:
        raise ValueError(f"an exponent needs at least {LEAST} different lengths, got {sorted(set(x.tolist()))}")
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise ValueError("an exponent needs positive, finite lengths and values")
    x, y = np.log(x), np.log(y)
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x))
