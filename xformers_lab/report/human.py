"""Numbers, sizes, times and outcomes as people read them. None, NaN and infinity are a dash."""

import math
from collections.abc import Callable, Mapping

from xformers_lab import record
from xformers_lab.terminal import visible

NONE = "\N{EN DASH}"


def number(value: object) -> float | None:
    """A finite number, or None for everything else (missing, text, truth values, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        finite = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return finite if math.isfinite(finite) else None


def count(value: object) -> str:
    """950, 1.2k, 34M, 5.6G."""
    return _scaled(value, ("", "k", "M", "G", "T", "P"), 1000.0, "")


def size(value: object) -> str:
    """Bytes in binary units: 512 B, 3.4 MiB."""
    return _scaled(value, ("B", "KiB", "MiB", "GiB", "TiB"), 1024.0, " ")


def duration(value: object) -> str:
    """Seconds as 340 µs, 12 ms, 1.2 s or 3 min 20 s."""
    seconds = number(value)
    if seconds is None:
        return NONE
    if abs(seconds) >= 119.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= 0.9995 * scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs"


def score(value: object) -> str:
    """A metric or loss: three decimals below ten, else a whole number."""
    finite = number(value)
    if finite is None:
        return NONE
    return f"{finite:.3f}" if abs(finite) < 10 else _digits(finite)


def significant(value: object) -> str:
    """Any number, to three significant digits."""
    finite = number(value)
    return NONE if finite is None else f"{finite:.3g}"


def power(value: object) -> str:
    """How a cost grows with the length N: N^1.98."""
    finite = number(value)
    return NONE if finite is None else f"N^{finite:.2f}"


def times(ratio: float) -> str:
    """How often one cost holds another: 1.47 times."""
    return f"{ratio:.3g} times" if ratio < 100 else f"{ratio:,.0f} times"


FORMS: Mapping[record.Form, Callable[[object], str]] = {
    "count": count,
    "duration": duration,
    "power": power,
    "score": score,
    "significant": significant,
    "size": size,
}


def in_column(figure: record.Figure, value: object) -> str:
    """A figure under its heading."""
    return FORMS[figure.form](value)


def alone(figure: record.Figure, value: object) -> str:
    """A figure away from its heading: with its unit, 1.2k tok/s."""
    text = in_column(figure, value)
    return text if text == NONE else text + figure.unit


def plain(text: object) -> str:
    """Text on one line with control characters escaped, so that no name can steer a terminal or turn the reading
    order."""
    return visible(" ".join(str(text).split()))


def status(row: dict) -> str:
    """The kind of ending in words, without its reason."""
    kind = str(row.get("status", "ok"))
    return record.STATUSES.get(kind, plain(kind))


def outcome(row: dict) -> str:
    """How a cell ended, in words: "ok", or the kind of failure with its reason."""
    words, reason = status(row), row.get("reason")
    return f"{words}: {plain(reason)}" if words != "ok" and reason else words


def listing(words: list[str], most: int = 8) -> str:
    """a, b and c; a long list is cut and says so."""
    shown, left = words[:most], len(words) - most
    if left > 0:
        return f"{', '.join(shown)} and {left} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _scaled(value: object, units: tuple[str, ...], step: float, gap: str) -> str:
    scaled = number(value)
    if scaled is None:
        return NONE
    for unit in units[:-1]:
        # 999.6 would be printed as 1000, which is one of the next unit.
        if abs(scaled) < step - 0.5:
            return f"{_digits(scaled)}{gap}{unit}"
        scaled /= step
    return f"{_digits(scaled)}{gap}{units[-1]}"


def _digits(value: float) -> str:
    """Two significant digits below ten, else a whole number; no trailing zero."""
    return f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.2g}"
