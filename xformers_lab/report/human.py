"""Numbers, sizes, times and outcomes as people read them. None, NaN and infinity are a dash."""

import math

NONE = "\N{EN DASH}"
STATUS = {
    "ok": "ok",
    "failed": "failed",
    "nan": "not a number",
    "oom": "out of memory",
    "stalled": "stalled",
    "refused": "refused",
    "interrupted": "interrupted",
}


def number(value: object) -> float | None:
    """A finite number, or None for everything else (missing, text, truth values, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def count(value: object) -> str:
    """950, 1.2k, 34M, 5.6G."""
    return _scaled(value, ("", "k", "M", "G", "T", "P"), 1000.0, "")


def rate(value: object) -> str:
    """Tokens per second: 1.2k tok/s."""
    return NONE if number(value) is None else f"{count(value)} tok/s"


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
    found = number(value)
    if found is None:
        return NONE
    return f"{found:.3f}" if abs(found) < 10 else _digits(found)


def significant(value: object) -> str:
    """Any number, to three significant digits."""
    found = number(value)
    return NONE if found is None else f"{found:.3g}"


def power(value: object) -> str:
    """How a cost grows with the length N: N^1.98."""
    found = number(value)
    return NONE if found is None else f"N^{found:.2f}"


def plain(text: object) -> str:
    """Text on one line without control characters, so that no name can steer a terminal or turn the reading order."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(str(text).split()))


def status(row: dict) -> str:
    """The kind of ending in words, without its reason."""
    found = str(row.get("status", "ok"))
    return STATUS.get(found, plain(found))


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
    found = number(value)
    if found is None:
        return NONE
    for unit in units[:-1]:
        # 999.6 would be printed as 1000, which is one of the next unit.
        if abs(found) < step - 0.5:
            return f"{_digits(found)}{gap}{unit}"
        found /= step
    return f"{_digits(found)}{gap}{units[-1]}"


def _digits(value: float) -> str:
    """Two significant digits below ten, else a whole number; no trailing zero."""
    return f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.2g}"
