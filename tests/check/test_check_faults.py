"""The kit passes right mechanisms of every kind, and names the property that each planted fault breaks."""

import functools

import pytest
from mutants import costs, declarations, gradients, masks, running, values
from mutants.right import (
    BothSides,
    Decayed,
    Gated,
    Noted,
    Plain,
    Residual,
    Span,
    TalkingHeads,
    Whole,
    subject,
)

from xformers_lab import spec
from xformers_lab.attention import Attention, OneHead
from xformers_lab.attention.multiscale import Multiscale
from xformers_lab.check.masks import no_padding
from xformers_lab.check.run import PROPERTIES, examine

pytestmark = pytest.mark.full

NAMED = {holds.__name__: holds for holds in PROPERTIES}
FAULTS = declarations.FAULTS | values.FAULTS | gradients.FAULTS | running.FAULTS | masks.FAULTS | costs.FAULTS
OPTIONS = values.OPTIONS | masks.OPTIONS | costs.OPTIONS
PER_HEAD = {
    "carried",
    "full_in_the_limit",
    "samples_apart",
    "auxiliary",
    "documents_apart",
    "marks_in_time",
    "pair_values",
}


@pytest.mark.parametrize("kind, skipped", [
    (Plain, PER_HEAD),
    (Span, PER_HEAD),
    (Residual, PER_HEAD - {"carried"}),
    (BothSides, PER_HEAD | {"decoding", "state_size", "no_future"}),
    (TalkingHeads, PER_HEAD - {"samples_apart"} | {"heads_apart"}),
    (Gated, PER_HEAD),
    (Decayed, PER_HEAD),
    (Noted, PER_HEAD - {"auxiliary"}),
])  # fmt: skip
def test_right_mechanisms_of_every_kind_pass(kind, skipped):
    report = examine(subject(kind), PROPERTIES)
    assert report.passed, report.failed
    assert {skip.property for skip in report.skipped} == skipped
    assert all(skip.reason for skip in report.skipped)


def test_a_mechanism_that_overrides_the_whole_call():
    names = [
        "signature",
        "equals_reference",
        "jit_equals_eager",
        "no_retrace",
        "bfloat16",
        "no_future",
        "no_padding",
        "nothing_to_see",
        "memory",
    ]
    report = examine(subject(Whole), [NAMED[name] for name in names])
    assert report.passed, report.failed
    assert [skip.property for skip in report.skipped] == ["equals_reference"]


# The first of each property, and all in make test-deep.
FIRST = {expected: kind for kind, expected in reversed(FAULTS.items())}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind is FIRST[expected] else [pytest.mark.slow])
        for kind, expected in FAULTS.items()
    ],
    ids=lambda kind: kind.__name__,
)
def test_planted_fault_is_caught_by_its_property(kind):
    expected = FAULTS[kind]
    report = examine(subject(kind, **OPTIONS.get(kind, {})), [NAMED[expected]])
    assert [failure.property for failure in report.failed] == [expected]
    # A message for the author, not an exception that happened on the way.
    message = report.failed[0].message
    assert len(message) > 40 and "Error: " not in message, message


LEAKS = [kind for kind, expected in masks.FAULTS.items() if expected in ("no_future", "no_padding")]


@pytest.mark.parametrize("kind", LEAKS, ids=lambda kind: kind.__name__)
def test_values_alone_show_a_leak(kind):
    """As the brief look at the shelf has it, which compiles no gradients."""
    expected, one = FAULTS[kind], subject(kind, **OPTIONS.get(kind, {}))
    one.gradients = False
    assert [failure.property for failure in examine(one, [NAMED[expected]]).failed] == [expected]
    assert not one._pulled


def ignoring_padding(kind: type[Attention]) -> type[Attention]:
    """The mechanism, but neither form is told what is padding."""

    def without_valid(method):
        return functools.wraps(method)(
            lambda self, *arrays, valid=None, **options: method(self, *arrays, valid=None, **options)
        )

    return type(kind.__name__, (kind,), {name: without_valid(getattr(kind, name)) for name in ("attend", "reference")})


QUICK = ["performer", "reformer", "gla", "nystrom"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in spec.names("attention")]
)
def test_padding_that_nobody_heard_of_is_caught(name):
    kind = type(spec.build("attention", name, length=67, dim=32, heads=4))
    if not issubclass(kind, OneHead) or kind is Multiscale:
        pytest.skip("its attend_heads does not go through attend")
    report = examine(subject(ignoring_padding(kind)), [no_padding])
    assert [failure.property for failure in report.failed] == ["no_padding"]


def test_every_property_has_a_fault_that_it_catches():
    assert set(NAMED) == set(FAULTS.values())
