"""Fits over sizes in words, as a table and as JSON. An extrapolated crossing is never said as a finding."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xformers_lab.compare.scaling import AXES
from xformers_lab.report import human
from xformers_lab.report.scaling import Curve, Pair, Scaling

# How a size on the axis is written, and the word behind it.
WRITTEN = {"params": human.count, "flops": human.count, "seconds": human.duration}
UNITS = {"params": " parameters", "flops": " FLOPs", "seconds": ""}
LINE, FLOOR = "L = A x^-a", "L = E + A x^-a"


def sentences(scaling: Scaling) -> list[str]:
    """What the fits carry: where each pair of curves crosses, who is best at the ends, how losses fall, what misses and
    what was left out."""
    if not scaling.curves:
        return ["No variant has results at enough sizes for a fit.", *_left_out(scaling)]
    lines = [*_pairs(scaling), *_orders(scaling), *_falls(scaling), *_strays(scaling)]
    return [*lines, *_left_out(scaling)]


def of_several(scalings: Sequence[Scaling]) -> list[str]:
    """The sentences of fits, after the length where there are several."""
    if len(scalings) == 1:
        return sentences(scalings[0])
    return [f"{scaling.title}: {sentence}" for scaling in scalings for sentence in sentences(scaling)]


def table(scaling: Scaling) -> list[dict[str, str]]:
    """A row for each curve, as `listing.print_listing` takes it."""
    return [_line(scaling, curve) for curve in scaling.curves]


def as_json(scaling: Scaling) -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "task": scaling.task,
        "seq_len": scaling.seq_len,
        "x": scaling.scale.x,
        "x_is": scaling.sized,
        "y": scaling.scale.y,
        "y_is": scaling.scored,
        "curves": [_curve(scaling, curve) for curve in scaling.curves],
        "pairs": [_pair(pair) for pair in scaling.pairs],
        "order": None if scaling.orders is None else {"smallest": scaling.orders[0], "largest": scaling.orders[1]},
        "verdict": sentences(scaling),
        "left_out": list(scaling.left_out),
        "notes": list(scaling.notes),
    }


def size(scaling: Scaling, x: float, unit: bool = True) -> str:
    """A size on the axis: 41k parameters."""
    return WRITTEN[scaling.scale.x](x) + (UNITS[scaling.scale.x] if unit else "")


def exponent(curve: Curve) -> str:
    """The exponent with its interval: "0.213 [0.190, 0.238]"."""
    return _with_ends(float(curve.fit.exponent[0]), curve.exponent)


def law(curve: Curve) -> str:
    """The curve's kind, and why it is a line."""
    return FLOOR if curve.fit.floor else f"{LINE}: {curve.fit.why}" if curve.fit.why else LINE


# ---- sentences ----


def _pairs(scaling: Scaling) -> Iterator[str]:
    by_status: dict[str, list[Pair]] = {}
    for pair in scaling.pairs:
        by_status.setdefault(pair.status, []).append(pair)
    for pair in by_status.get("crosses", ()):
        yield _crosses(scaling, pair)
    for pair in by_status.get("partly", ()):
        low, high = (size(scaling, x) for x in pair.told or (pair.low, pair.high))
        where = f"at {low}" if low == high else f"from {low} to {high}"
        yield (
            f"No crossing is told of {_both(pair)}: {pair.lower[0]} has the lower loss {where}, and elsewhere they are "
            "not told apart."
        )
    if apart := by_status.get("apart"):
        said = [f"{pair.lower[0]} below {_other(pair, pair.lower[0])}" for pair in apart]
        yield f"No crossing, told at every size between those measured: {human.listing(said)}."
    if untold := by_status.get("untold"):
        yield f"Not told apart at any size: {human.listing([_both(pair) for pair in untold])}."
    for pair in by_status.get("untested", ()):
        if pair.meets:
            at = human.listing([size(scaling, x) for x in pair.meets])
            yield f"Not tested, with one seed: the curves of {_both(pair)} meet at {at}; {_sides(pair)}."
        else:
            yield (
                f"Not tested, with one seed: the curve of {pair.lower[0]} lies below that of "
                f"{_other(pair, pair.lower[0])} at every size."
            )
    if elsewhere := by_status.get("elsewhere"):
        yield f"Not compared, since their sizes do not overlap: {human.listing([_both(pair) for pair in elsewhere])}."
    for pair in scaling.pairs:
        if pair.extrapolated is not None and pair.status in ("apart", "partly"):  # else not even a difference is told
            larger = pair.extrapolated > pair.high
            times = human.times(pair.extrapolated / pair.high if larger else pair.low / pair.extrapolated)
            end = f"{times} the largest" if larger else f"{times} below the smallest"
            yield (
                f"Extrapolated, and so no finding: the curves of {_both(pair)} would meet at "
                f"{size(scaling, pair.extrapolated)}, {end} size measured."
            )


def _crosses(scaling: Scaling, pair: Pair) -> str:
    places = [
        f"{size(scaling, one.at)} [{size(scaling, one.low, False)}, {size(scaling, one.high, False)}]"
        for one in pair.crossings
    ]
    measured = f"{size(scaling, pair.low, False)} to {size(scaling, pair.high, False)}"
    return f"{_both(pair)} cross at {human.listing(places)}, within the sizes measured ({measured}): {_sides(pair)}."


def _sides(pair: Pair) -> str:
    small, large = pair.lower
    if small == large:
        return f"{small} has the lower loss at both ends"
    return f"at smaller sizes {small} has the lower loss, at larger ones {large}"


def _orders(scaling: Scaling) -> Iterator[str]:
    if scaling.orders is None:
        return
    first, last = scaling.orders
    small, large = (scaling.said(scaling.curves[0].sizes[at]) for at in (0, -1))
    if first == last:
        yield f"By the means the order is the same at the smallest ({small}) and largest ({large}): {_order(first)}."
    else:
        orders = f"{_order(first)} at the smallest ({small}), {_order(last)} at the largest ({large})"
        doubt = "" if any(pair.crossings for pair in scaling.pairs) else ", which the seeds do not tell"
        yield f"By the means the order changes with the size{doubt}: {orders}."


def _falls(scaling: Scaling) -> Iterator[str]:
    x = AXES[scaling.scale.x]
    for floor in (True, False):
        mine = [curve for curve in scaling.curves if curve.fit.floor is floor]
        if mine:
            said = human.listing([f"{exponent(curve)} ({curve.name})" for curve in mine])
            what = f"{FLOOR}, x being {x}" if floor else f"{LINE}, a line without a floor"
            why = "" if floor else _why(mine)
            yield f"Fitted {what}{why}; exponents a: {said}."
    rising = [curve.name for curve in scaling.curves if curve.fit.exponent[0] < 0]
    if rising:
        yield f"The loss does not fall with the size: {human.listing(rising)}."


def _why(curves: Sequence[Curve]) -> str:
    reasons = list(dict.fromkeys(curve.fit.why for curve in curves if curve.fit.why))
    return f" ({human.listing(reasons)})" if reasons else ""


def _strays(scaling: Scaling) -> Iterator[str]:
    bent = [curve for curve in scaling.curves if curve.strays]
    if bent:
        said = human.listing(
            [f"{curve.name} ({_miss(curve)}, p={human.significant(curve.fit.strays)})" for curve in bent]
        )
        yield (
            f"Curves that miss their means by more than the seeds explain: {said}; that is no such law, or the "
            "recipe does not suit all sizes. The intervals of their exponents do not know of it, and who is below whom "
            "is said of straight lines between the means."
        )


def _left_out(scaling: Scaling) -> Iterator[str]:
    if scaling.left_out:
        yield f"Left out of the fits: {'; '.join(scaling.left_out)}."


# ---- numbers ----


def _line(scaling: Scaling, curve: Curve) -> dict[str, str]:
    fit = curve.fit
    return {
        "curve": curve.name,
        "exponent a": exponent(curve),
        "floor E": _with_ends(float(fit.offset[0]), curve.floor) if fit.floor else human.NONE,
        "misses by": _miss(curve),
        "R2": f"{fit.r2:.4f}" if math.isfinite(fit.r2) else human.NONE,
        "sizes": str(len(curve.sizes)),
        "seeds": str(len(curve.seeds)),
        AXES[scaling.scale.x]: f"{size(scaling, fit.sizes[0], False)} to {size(scaling, fit.sizes[-1], False)}",
        "fitted": FLOOR if fit.floor else LINE,
    }


def _miss(curve: Curve) -> str:
    """The largest relative residual of a mean: up to 1.2 %."""
    return f"{100 * max(abs(curve.fit.residuals)):.2g} %"


def _curve(scaling: Scaling, curve: Curve) -> Mapping[str, Any]:
    fit = curve.fit
    return {
        "variant": curve.name,
        "law": FLOOR if fit.floor else LINE,
        "why_no_floor": fit.why or None,
        "exponent": float(fit.exponent[0]),
        "exponent_interval": None if curve.exponent is None else list(curve.exponent),
        "floor": float(fit.offset[0]) if fit.floor else None,
        "floor_interval": None if curve.floor is None else list(curve.floor),
        "factor": float(fit.scale[0] * fit.centre ** fit.exponent[0]),
        "r2": fit.r2 if math.isfinite(fit.r2) else None,
        "largest_residual": float(max(abs(fit.residuals))),
        "strays_p": fit.strays,
        "seeds": list(curve.seeds),
        "points": [
            {"size": scaling.said(size), "x": float(x), "y": float(mean), "residual": float(residual)}
            for size, x, mean, residual in zip(curve.sizes, fit.sizes, fit.means, fit.residuals, strict=True)
        ],
    }


def _pair(pair: Pair) -> Mapping[str, Any]:
    return {
        "variants": list(pair.names),
        "status": pair.status,
        "from": pair.low,
        "to": pair.high,
        "lower_at_smallest": pair.lower[0] or None,
        "lower_at_largest": pair.lower[1] or None,
        "crossings": [{"at": one.at, "low": one.low, "high": one.high} for one in pair.crossings],
        "told": None if pair.told is None else list(pair.told),
        "curves_meet": list(pair.meets),
        "extrapolated": pair.extrapolated,
        "by": "means" if pair.straight else "curves",
    }


def _with_ends(value: float, ends: tuple[float, float] | None) -> str:
    if ends is None:
        return f"{value:.3f}"
    low, high = (f"{end:.3f}" if abs(end) < 100 else human.significant(end) for end in ends)
    return f"{value:.3f} [{low}, {high}]"


def _order(names: Sequence[str]) -> str:
    return human.listing(list(names))


def _both(pair: Pair) -> str:
    return f"{pair.names[0]} and {pair.names[1]}"


def _other(pair: Pair, name: str) -> str:
    return pair.names[1] if name == pair.names[0] else pair.names[0]
