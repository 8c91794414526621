"""How long a worker may go without a sign of life, by what it is doing.

What it does comes in words, of which the first is the kind: "training", "compiling full at 64 tokens, forward".

* A kind in STEPPING gives a sign at every step, batch or timed call. The limit is stall= seconds; by default LEAST, or
  MEDIANS times the median step of that kind where that is longer. No step of the kind measured yet: FIRST, since a
  first step may be as long as it likes to be and nothing tells how long.
* A check, of a config or a conformance kit ("checking"), has CHECK seconds.
* All else, importing, preparing data, compiling, saving, has APART times as long as the smallest stall: an hour, or
  60 x stall= where that is longer.

stall=0 lifts every limit.
"""

import collections
import math
import statistics
from collections.abc import Mapping

STEPPING = ("training", "validating", "testing", "timing")
LEAST, MEDIANS, FIRST, CHECK, APART = 60.0, 50, 600.0, 600.0, 60
RECENT = 200  # steps that a median is taken of


class Clock:
    """What a worker says that it does, and for how long it has said nothing.

    message: its latest one about that, {"doing": words, ...}; step, total: the last completed step and how many there
    will be, where a message had them. begun: whether it did anything step by step, which may be lost. quiet: seconds
    without a message, waited: seconds since the work began.
    """

    def __init__(self, stall: float | None = None, limit: float | None = None):
        """stall: the seconds of stall=, None for the default; limit: seconds for the whole work, in place of all other
        limits (0: none)."""
        self.stall, self.limit = stall, limit
        self.message: Mapping = {"doing": "starting"}
        self.step = self.total = None
        self.begun = False
        self.quiet = self.waited = 0.0
        self._seconds: dict[tuple, collections.deque[float]] = {}

    @property
    def doing(self) -> str:
        """What it does, in words."""
        return self.message["doing"]

    @property
    def kind(self) -> str:
        """The first of these words."""
        return self.doing.split(" ", 1)[0]

    @property
    def subject(self) -> tuple:
        """What the time of a step is the time of: the kind, and the number of the cell where there are several."""
        return self.kind, self.message.get("cell")

    @property
    def stepping(self) -> bool:
        """Whether it gives a sign at every step."""
        return self.kind in STEPPING

    def heard(self, message: Mapping) -> None:
        """A message came."""
        took, self.quiet = self.quiet, 0.0
        if "doing" not in message:
            return
        before, stepped, self.message = self.subject, self.stepping, message
        self.begun = self.begun or self.stepping
        self.step, self.total = message.get("step", self.step), message.get("total", self.total)
        if stepped and self.kind == before[0]:
            self._seconds.setdefault(before, collections.deque(maxlen=RECENT)).append(took)

    def wait(self, seconds: float) -> None:
        """Some time went by without a message."""
        self.quiet += seconds
        self.waited += seconds

    def allowed(self, stopping: bool = False) -> float:
        """Seconds without a message that end the worker, infinite for none. stopping: a signal had it end, which it
        may put off by a step, or until a checkpoint is saved, but not for as long as a compilation may take."""
        if self.stall == 0:
            return math.inf
        if self.kind == "checking":
            return CHECK
        if self.stepping:
            seconds = self._seconds.get(self.subject)
            usual = max(LEAST, MEDIANS * statistics.median(seconds)) if seconds else FIRST
            return usual if self.stall is None else self.stall
        if stopping and self.kind != "saving":
            return LEAST if self.stall is None else self.stall
        return APART * max(LEAST, self.stall or 0.0)

    def left(self, stopping: bool = False) -> float:
        """Seconds that the worker still has, negative where it has had too many."""
        if self.limit is not None:
            return self.limit - self.waited if self.limit else math.inf
        return self.allowed(stopping) - self.quiet

    @property
    def place(self) -> str:
        """What it was doing and after which step, in words."""
        after = f" after step {self.step}{f' of {self.total}' if self.total else ''}" if self.step is not None else ""
        return f"{self.doing}{after}"
