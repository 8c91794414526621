"""Runs the kit on one mechanism: every property in turn, each with a verdict and, where it fails, what to look at."""

import contextlib
import dataclasses
import importlib
import pathlib
import time
from collections.abc import Callable, Sequence

from flax import nnx

from xformers_lab import spec
from xformers_lab.attention import Attention
from xformers_lab.check import SAME, costs, masks, values
from xformers_lab.check.subject import HEAD, HEADS, KEY_HEADS, LENGTH, Broken, NotApplicable, Subject
from xformers_lab.errors import UsageError, contained, in_words, outside, place, said
from xformers_lab.nn.size import Size

PROPERTIES: list[Callable[[Subject], None]] = [*values.PROPERTIES, *masks.PROPERTIES, *costs.PROPERTIES]
Doing = Callable[[str], None]
_KITS = pathlib.Path(__file__).parent / "kits"
# What decides whether a mechanism may be used at all is said first, whatever else fails because of it.
FIRST = ("no_future",)
# Whole-number options from here on are shrunk for the kit, so that its lengths hold several windows or chunks.
LARGE, SMALL = 8, 5


@dataclasses.dataclass(frozen=True)
class Failure:
    property: str
    message: str

    def __str__(self) -> str:
        return self.property


@dataclasses.dataclass(frozen=True)
class Skip:
    property: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The kit's verdict on one mechanism."""

    name: str
    passed: bool
    failed: list[Failure]
    skipped: list[Skip]
    seconds: float
    # The largest difference between attend and reference, relative to the largest output; None where none was compared.
    error: float | None = None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def check(choice: str, shelf: str = "attention", *, deep: bool = False, doing: Doing = lambda words: None) -> Report:
    """Run a shelf's kit on a choice: a name with options, a dotted module, or the path of a file.

    deep adds many more lengths of attention (minutes). doing(name) is told each property before it runs. Raises
    UsageError where the choice does not exist, or its shelf has no kit; whatever else goes wrong in it is a failed
    property.
    """
    if shelf != "attention":
        return _inside(choice, shelf, doing)
    resolved = spec.resolve("attention", choice)
    begun = time.perf_counter()
    try:
        with contained():
            subject = Subject(choice, lambda size, small: _fitted(choice, resolved, size, small))
    except Exception as error:
        return Report(choice, False, [Failure("build", _mistake(error))], [], time.perf_counter() - begun)
    properties = PROPERTIES + (values.DEEP if deep else [])
    if subject.per_head and values.undefined(subject, "attend"):  # nothing else can be asked
        report = examine(subject, [values.signature], doing)
        report.skipped.extend(Skip(holds.__name__, "it defines no attend") for holds in properties[1:])
        return report
    report = examine(subject, properties, doing)
    return dataclasses.replace(report, skipped=_left_out(choice, resolved) + report.skipped)


def kits() -> list[str]:
    """The shelves that have a kit: attention, and by listing the others."""
    return ["attention", *sorted(file.stem for file in _KITS.glob("*.py") if not file.stem.startswith("_"))]


def _inside(choice: str, shelf: str, doing: Doing) -> Report:
    """A choice of another shelf than attention, inside tiny models."""
    if shelf not in kits():
        raise UsageError(f'check: shelf "{shelf}" has no kit; there are kits of {", ".join(kits())}')
    kit = importlib.import_module(f"xformers_lab.check.kits.{shelf}")
    spec.resolve(shelf, choice)
    begun = time.perf_counter()
    try:
        with contained():
            subject = kit.subject(choice)
    except Exception as error:
        return Report(choice, False, [Failure("build", _mistake(error))], [], time.perf_counter() - begun)
    return examine(subject, kit.PROPERTIES, doing)


def examine(subject, properties: Sequence[Callable[..., None]], doing: Doing = lambda words: None) -> Report:
    """Run some properties on a subject, in order; it has a `name` and an `error()`."""
    begun = time.perf_counter()
    failed, skipped = [], []
    mistakes: dict[tuple[str, str], str] = {}  # exceptions by kind and line: the property that met each first
    for holds in properties:
        name = holds.__name__
        doing(f"{subject.name}: {name}")
        try:
            with contained():
                holds(subject)
        except Broken as broken:
            failed.append(Failure(name, str(broken)))
        except NotApplicable as reason:
            skipped.append(Skip(name, str(reason)))
        except Exception as error:
            if isinstance(error, NotImplementedError) and any(said(error) in known.message for known in failed):
                skipped.append(Skip(name, said(error)))  # what is not defined is said once
                continue
            first = mistakes.setdefault((type(error).__name__, place(error)), name)
            failed.append(Failure(name, _mistake(error) if first == name else SAME + first))
    failed.sort(key=lambda failure: failure.property not in FIRST or failure.message.startswith(SAME))
    return Report(subject.name, not failed, failed, skipped, time.perf_counter() - begun, subject.error())


def _mistake(error: Exception) -> str:
    """In words, with how to refuse on purpose where that may be what a ValueError of the checked file is for."""
    hint = "; to refuse on purpose, raise xformers_lab.errors.Refused"
    return in_words(error) + (hint if type(error) is ValueError and outside(error) else "")


def _fitted(text: str, choice: spec.Choice, size: Size, small: bool) -> Attention:
    """The mechanism at a size of the kit: large options shrunk if `small`, those that fit another length left out."""
    asked = spec.parse(text).options
    shrunk = (
        {name: SMALL for name, value in choice.options.items() if type(value) is int and value >= LARGE}
        if small
        else {}
    )
    kept = {name: choice.options[name] for name in asked}
    attempts = [kept | shrunk, kept]
    attempts += [{name: value for name, value in (kept | shrunk).items() if name != left} for left in kept]
    attempts += [shrunk, {}]
    for options in attempts[:-1]:
        with contextlib.suppress(UsageError):
            return _build(text, choice.name, options, size)
    return _build(text, choice.name, attempts[-1], size)


def _build(text: str, name: str, options: dict, size: Size) -> Attention:
    return spec.build("attention", str(spec.Choice(name, options)), size, rngs=nnx.Rngs(0), where=text)


def _left_out(text: str, choice: spec.Choice) -> list[Skip]:
    """Says so where the options as asked do not fit the kit's length, so that some of them are left out."""
    try:
        _build(text, choice.name, spec.parse(text).options, Size(LENGTH, HEADS * HEAD, HEADS, KEY_HEADS))
    except UsageError as refusal:
        return [Skip("options", f"checked without what fits only another length: {refusal}")]
    return []
