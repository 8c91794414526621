"""Which choices a long test looks at before a change lands; `make test-deep` looks at the others."""

from collections.abc import Sequence

import pytest

from xformers_lab import spec


def one_of_each_kind(
    names: Sequence[str] | None = None,
    mark: pytest.MarkDecorator | None = None,
    others: pytest.MarkDecorator | None = pytest.mark.slow,
) -> list:
    """Parameters: attention by name, by default all of the shelf; the first of each kind has one mark, all others
    another."""
    marked, seen = [], set()
    for name in spec.names("attention") if names is None else names:
        kind = spec.entry("attention", name).kind
        one = others if kind in seen else mark
        marked.append(pytest.param(name, marks=[] if one is None else [one]))
        seen.add(kind)
    return marked


def every_third(
    values: Sequence, mark: pytest.MarkDecorator | None = None, others: pytest.MarkDecorator | None = pytest.mark.slow
) -> list:
    """Parameters: every third value, from the first on, has one mark, all others another."""
    marks = [others if number % 3 else mark for number in range(len(values))]
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=[] if one is None else [one])
        for value, one in zip(values, marks, strict=True)
    ]
