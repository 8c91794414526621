"""Power laws of a loss over sizes, L(x) = E + A x^-a, and how far draws of the seeds move them.

Kaplan et al., 2020 (arXiv 2001.08361) fit lines on logarithmic axes; Hoffmann et al., 2022 (arXiv 2203.15556) add the
floor E, which no size goes below, and Huber's loss. Besiroglu et al., 2024 (arXiv 2404.10102) found the latter's fit
stopped before its minimum, and its intervals too narrow. Here nothing is started that could stop early: with the
exponent given, E and A follow in one step, so that the exponent alone is searched, over a grid that narrows.

Errors are relative, f / y - 1, which is log f - log y to first order. An error beyond HUBER times the usual one counts
by its size, not by its square, so that one seed that went astray moves little.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Through two sizes a line always goes; a floor is one number more to tell.
LEAST, LEAST_WITH_FLOOR = 3, 4
HUBER = 2.0
ROBUST = 3  # seeds: two do not say which of them went astray
REWEIGHTED = 3  # times that errors are weighed anew
# Exponents that are searched, by how much x^-a falls over the sizes: e^-0.02 looks level, e^-10 is a step.
LEVEL, STEEP = 0.02, 10.0
GRID, ZOOMS, ZOOM = 120, 3, 25
WHOLE = 5  # seeds of which every draw is taken, with its probability; of more, so many draws by chance
DRAWS = 500
SEED = 0


class Draws(NamedTuple):
    """How often each draw has each seed (D, S), and its probability (D)."""

    counts: np.ndarray
    shares: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fit:
    """The curve of one series, and those of the draws of its seeds.

    floor: whether there is an E; why: why there is none though the sizes would do. exponent, scale and offset (1 + D):
    a, A at the sizes' geometric mean `centre`, and E, of all seeds first, then of each draw. residuals: relative, of
    the mean over the seeds at each size. r2: of the means' logarithms. strays: the p-value that the means stray no
    further from the curve than the seeds explain, None where that cannot be told.
    """

    sizes: np.ndarray
    means: np.ndarray
    floor: bool
    why: str
    centre: float
    exponent: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    residuals: np.ndarray
    r2: float
    strays: float | None

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """The curves (1 + D, n) at sizes (n)."""
        falls = (np.asarray(sizes, float) / self.centre) ** -self.exponent[:, None]
        return self.offset[:, None] + self.scale[:, None] * falls

    @property
    def numbers(self) -> int:
        """How many numbers the sizes have to tell."""
        return 3 if self.floor and self.offset[0] > 0 else 2

    def residual_error(self) -> float | None:
        """The standard error of the exponent (with a floor: of its logarithm) by what the curve misses, to first order;
        None where no size is left over to tell it."""
        freedom = len(self.sizes) - self.numbers
        if freedom < 1:
            return None
        falls = (self.sizes / self.centre) ** -self.exponent[0]
        moved = -self.scale[0] * falls * np.log(self.sizes / self.centre) * (self.exponent[0] if self.floor else 1.0)
        slopes = np.stack([falls, moved, *([np.ones_like(falls)] if self.numbers == 3 else [])], 1)
        slopes /= self.means[:, None]
        spread = np.linalg.pinv(slopes.T @ slopes)[1, 1] * (self.residuals @ self.residuals) / freedom
        return math.sqrt(spread)


def draws(seeds: int) -> Draws:
    """Bootstrap draws of so many seeds with replacement: every one with its probability, or of many seeds some."""
    if seeds > WHOLE:
        drawn = np.random.default_rng(SEED).multinomial(seeds, [1 / seeds] * seeds, DRAWS)
        return Draws(drawn.astype(float), np.full(DRAWS, 1 / DRAWS))
    whole = [counts for counts in itertools.product(range(seeds + 1), repeat=seeds) if sum(counts) == seeds]
    ways = [math.factorial(seeds) / math.prod(map(math.factorial, counts)) for counts in whole]
    return Draws(np.array(whole, float), np.array(ways) / seeds**seeds)


def spread(values: np.ndarray, drawn: Draws, seeds: int) -> np.ndarray:
    """The standard error of what draws of the seeds make of a number (D, ...), about the number of all seeds."""
    mean = np.tensordot(drawn.shares, values, 1)
    variance = np.tensordot(drawn.shares, (values - mean) ** 2, 1)
    return np.sqrt(variance * seeds / (seeds - 1))  # n draws of n values vary less than the values by (n - 1) / n


def fit(
    sizes: "Sequence[float] | np.ndarray", losses: np.ndarray, drawn: Draws | None = None, *, floor: bool | None = None
) -> Fit:
    """The curve through losses (sizes, seeds), each seed at every size, and those of the draws of the seeds.

    floor: whether there is an E; by default with LEAST_WITH_FLOOR different sizes, unless these do not tell it from the
    exponent. Raises ValueError with fewer than LEAST different sizes, or at what is not positive and finite.
    """
    x, y = np.asarray(sizes, float), np.asarray(losses, float)
    if y.shape != (len(x), *y.shape[1:2]) or y.ndim != 2:
        raise ValueError(f"losses are of (sizes, seeds): got {y.shape} for {len(x)} sizes")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError("a power law needs positive, finite sizes and losses")
    if (different := len(np.unique(x))) < LEAST:
        raise ValueError(f"a power law needs at least {LEAST} different sizes, got {different}")
    counts = np.ones((1, y.shape[1]))
    counts = counts if drawn is None else np.concatenate([counts, drawn.counts])
    why = f"{different} sizes do not tell a floor from the exponent" if different < LEAST_WITH_FLOOR else ""
    if floor is None and not why:
        with_floor, why = _with_floor(x, y, counts)
        if not why:
            return with_floor
    elif floor:
        return _with_floor(x, y, counts)[0]
    return _line(x, y, counts, why)


def _line(x: np.ndarray, y: np.ndarray, counts: np.ndarray, why: str) -> Fit:
    """log L = log A - a log x."""
    centre = math.exp(np.log(x).mean())
    u, logs = np.log(x / centre), np.log(y)

    def solve(weights: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values (D, 2), what is fitted (D, sizes)) of weights and weighted means (D, sizes)."""
        total = weights.sum(1, keepdims=True)
        at, of = (weights @ u)[:, None] / total, (weights * means).sum(1, keepdims=True) / total
        apart = u - at
        slope = (weights * apart * (means - of)).sum(1, keepdims=True) / (weights * apart**2).sum(1, keepdims=True)
        return np.concatenate([-slope, of - slope * at], 1), of + slope * apart

    values = _robust(logs, counts, 2, solve)
    exponent, scale = values[:, 0], np.exp(values[:, 1])
    return _told(x, y, False, why, centre, exponent, scale, np.zeros_like(scale))


def _with_floor(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> tuple[Fit, str]:
    """L = E + A x^-a with E and A at least 0; and why its numbers are not to be told, empty where they are."""
    centre, means = math.exp(np.log(x).mean()), y.mean(1)
    u, relative = x / centre, y / means[:, None]
    span = math.log(x.max() / x.min())
    low, high = LEVEL / span, STEEP / span

    def solve(weights: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        grid = np.broadcast_to(np.geomspace(low, high, GRID), (len(weights), GRID))
        factor = (high / low) ** (1 / (GRID - 1))
        best, numbers, fitted = _best(u, means, weights, targets, grid)
        for _ in range(ZOOMS):
            around = np.clip(np.geomspace(best / factor, best * factor, ZOOM, axis=1), low, high)
            best, numbers, fitted = _best(u, means, weights, targets, around)
            factor = factor ** (2 / (ZOOM - 1))
        return np.concatenate([best[:, None], numbers], 1), fitted

    values = _robust(relative, counts, 3, solve)
    exponent, offset, scale = values.T
    found = _told(x, y, True, "", centre, exponent, scale, offset)
    if scale[0] <= 0 or exponent[0] <= low * 1.01:
        return found, "the loss does not fall towards a floor"
    if exponent[0] >= high * 0.99:
        return found, "only the smallest size is above the floor"
    return found, ""


def _best(
    u: np.ndarray, means: np.ndarray, weights: np.ndarray, targets: np.ndarray, grid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of exponents (D, G) the best of each draw (D), its E and A (D, 2), and its curve over the means (D, sizes)."""
    flat, falls = 1 / means, u ** -grid[:, :, None] / means  # the two parts of the curve, over the means
    w, t = weights[:, None, :], targets[:, None, :]
    ff, fp, pp = ((w * one * other).sum(2) for one, other in ((flat, flat), (flat, falls), (falls, falls)))
    ft, pt = (w * flat * t).sum(2), (w * falls * t).sum(2)
    both = ff * pp - fp**2
    safe = np.where(both > 1e-12 * ff * pp, both, np.inf)
    offset, scale = (pp * ft - fp * pt) / safe, (ff * pt - fp * ft) / safe
    # Where one would be negative it is 0, and the other alone.
    alone = (offset < 0) | np.isinf(safe)
    offset, scale = np.where(alone, 0, offset), np.where(alone, pt / pp, scale)
    level = scale < 0
    offset, scale = np.where(level, ft / ff, offset), np.where(level, 0, scale)
    curve = offset[:, :, None] * flat + scale[:, :, None] * falls
    at = ((w * (curve - t) ** 2).sum(2)).argmin(1)
    rows = np.arange(len(grid))
    return grid[rows, at], np.stack([offset[rows, at], scale[rows, at]], 1), curve[rows, at]


def _robust(y: np.ndarray, counts: np.ndarray, numbers: int, solve) -> np.ndarray:
    """What solve(weights, means) finds of the draws, with Huber's weights of the errors. y: (sizes, seeds); counts:
    (D, seeds)."""
    seeds, freedom = counts.shape[1], y.size - numbers
    weigh = lambda weights: solve(total := weights.sum(2), (weights * y).sum(2) / total)
    values, fitted = weigh(np.broadcast_to(counts[:, None, :], (len(counts), *y.shape)))
    if seeds < ROBUST or freedom < 1:
        return values
    # The usual error is that of all seeds, the same for every draw.
    usual = 1.4826 * np.median(np.abs(y - fitted[0][:, None])) * math.sqrt(y.size / freedom)
    for _ in range(REWEIGHTED):
        errors = np.maximum(np.abs(y - fitted[:, :, None]), 1e-300)
        values, fitted = weigh(counts[:, None, :] * np.minimum(1, HUBER * max(usual, 1e-12) / errors))
    return values


def _told(x, y, floor: bool, why: str, centre: float, exponent, scale, offset) -> Fit:
    means = np.exp(np.log(y).mean(1))
    curve = offset[0] + scale[0] * (x / centre) ** -exponent[0]
    residuals, logs = curve / means - 1, np.log(means)
    around = ((logs - logs.mean()) ** 2).sum()
    r2 = 1 - ((logs - np.log(curve)) ** 2).sum() / around if around else math.nan
    found = Fit(x, means, floor, why, centre, exponent, scale, offset, residuals, float(r2), None)
    return dataclasses.replace(found, strays=_strays(np.log(y), logs - np.log(curve), found.numbers))


def _strays(logs: np.ndarray, residuals: np.ndarray, numbers: int) -> float | None:
    """The p-value of an F-test: whether the means stray from the curve by no more than the seeds explain."""
    from scipy import special

    sizes, seeds = logs.shape
    left, freedom = sizes - numbers, sizes * (seeds - 1)
    if left < 1 or freedom < 1:
        return None
    within = ((logs - logs.mean(1, keepdims=True)) ** 2).sum() / freedom
    if within <= 0:
        return None
    return float(special.fdtrc(left, freedom, seeds * (residuals @ residuals) / left / within))
