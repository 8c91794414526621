"""What a mechanism's docstring says of it, and the sentences that refuse what its signature or docstring rules out."""

import inspect
import itertools
from typing import Any

# The families of the survey (Lin et al., 2021, section 4) and what came since.
KINDS = (
    "full",
    "sparse by position",
    "sparse by content",
    "linearised",
    "memory compression",
    "low rank",
    "prior",
    "multi-head",
    "without attention",
)


def stated(mechanism: type, word: str) -> str:
    """What a docstring's line that begins with `word:` says, with the indented lines after it; "" where it has none."""
    lines = (inspect.getdoc(mechanism) or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{word}:")), None)
    if start is None:
        return ""
    more = itertools.takewhile(lambda line: line.startswith(" "), lines[start + 1 :])
    return " ".join(" ".join([lines[start], *more]).partition(":")[2].split()).rstrip(".")


def why_not(mechanism: Any, what: str) -> str:
    """Why a mechanism, or a class of them, is refused, from its signature and, where it says so, from the `Not causal:`
    of its docstring."""
    kind = mechanism if isinstance(mechanism, type) else type(mechanism)
    name = kind.__name__.lower()
    if what == "bias":
        reason = stated(kind, "No bias") or "it has no scores to bias"
        rope = "" if kind is not mechanism and not mechanism.turns() else "rope, "
        return f"{name} takes no bias: {reason}; use position={rope}learned, sinusoidal or none"
    reason = stated(kind, "Not causal") or "its attend takes no `causal`"
    return f"{name} cannot be causal: {reason}; use model=encoder or another attention"


def why_not_one_way(mechanism: type) -> str:
    """Why a recurrence is refused where both sides are seen."""
    name = mechanism.__name__.lower()
    return f"{name} reads from left to right alone, so it serves no encoder: use model=decoder or another attention"
