"""What a mechanism says of itself in class attributes: its kind, how exact it is, what it costs, what it refuses."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

from flax import nnx

# The families of the survey (Lin et al., 2021, section 4) and what came since.
Kind = Literal[
    "full",
    "sparse by position",
    "sparse by content",
    "linearised",
    "memory compression",
    "low rank",
    "prior",
    "multi-head",
    "without attention",
]
KINDS: tuple[str, ...] = get_args(Kind)

# What a mechanism may refuse, and how its page says so.
REFUSALS = {
    "causal": "Not causal",
    "bidirectional": "One way",
    "cross": "Not cross",
    "bias": "No bias",
    "decoding": "No decoding",
}


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What one head costs as length grows, in words that its page prints; `cost(T, S)` has the numbers.

    time and memory are O(...), and the notes say more of them (", half of it where ..."); decoding is what it keeps.
    """

    time: str
    memory: str
    decoding: str = ""
    time_note: str = ""
    memory_note: str = ""


class Declared(nnx.Module):
    """Attributes of the class that say what a mechanism is and can do. A subclass inherits them like any other."""

    kind: ClassVar[Kind | None] = None

    # Whether it computes what its formula says; None: it does not say. `accuracy` goes on where the page says "Exact"
    # or "Approximate": "on its pattern", or "; with a landmark for every position it is full attention".
    exact: ClassVar[bool | None] = None
    accuracy: ClassVar[str] = ""

    complexity: ClassVar[Complexity | None] = None

    # What it cannot do, a key of REFUSALS, and why, as a clause: {"causal": "its mean is over every position"}.
    refuses: ClassVar[Mapping[str, str]] = {}

    def refusals(self) -> Mapping[str, str]:
        """What a mechanism with these options refuses, and why: `refuses`, unless a subclass adds what options decide.

        Returns:
            Reasons by key of REFUSALS; what is not there it can do.
        """
        return type(self).refuses
