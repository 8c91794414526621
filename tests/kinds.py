"""Which choices a long test looks at before a change lands; `make test-deep` looks at the others."""

from collections.abc import Sequence

import pytest

from xformers_lab import spec

# Of attention, one for each kind: those that other tests and pages use anyway, so that what they compile is shared.
# A kind that has none here, or not among the names that a test is about, is looked at by its first.
USUAL = ("full", "local", "linear", "linformer", "nystrom", "average", "talking_heads", "realformer", "reformer")


def one_of_each_kind(
    names: Sequence[str] | None = None,
    mark: pytest.MarkDecorator | None = None,
    others: pytest.MarkDecorator | None = pytest.mark.slow,
) -> list:
    """Parameters: attention by name, by default all of the shelf; one of each kind has one mark, all others another."""
    names = spec.names("attention") if names is None else names
    chosen = {}
    for name in sorted(names, key=lambda name: name not in USUAL):
        chosen.setdefault(spec.entry("attention", name).kind, name)
    marks = [mark if name in chosen.values() else others for name in names]
    return [pytest.param(name, marks=[] if one is None else [one]) for name, one in zip(names, marks, strict=True)]


def every_third(
    values: Sequence, mark: pytest.MarkDecorator | None = None, others: pytest.MarkDecorator | None = pytest.mark.slow
) -> list:
    """Parameters: every third value, from the first on, has one mark, all others another."""
    marks = [others if number % 3 else mark for number in range(len(values))]
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=[] if one is None else [one])
        for value, one in zip(values, marks, strict=True)
    ]
