"""What a platform, or a run, decides about how a model runs. What it computes is the same under every plan."""

import dataclasses
from typing import Literal, Protocol

# From so many queries on, in all rows together, XLA:CPU runs narrow rows of blocks as one kernel.
FUSED = 4096
# So many scores make products of several heads that keep all cores busy, and 32 MiB, which caches still soften.
SCORES = 1 << 23

Remat = Literal["none", "dots", "full"]
Kernel = Literal["auto", "blocks", "splash", "cudnn", "pallas"]
AUTO, BLOCKS = "auto", "blocks"  # what the platform has, if it can; and the block engine, that every platform has


@dataclasses.dataclass(frozen=True)
class Plan:
    """How heads, samples and layers are run.

    Args:
        loop_from: from so many scores (T S) on, heads run in a loop, and so do samples where mechanisms know one at a
            time; below it they run as a batch. None: always as a batch.
        unrolled: a stack of at most so many layers is written out in the program; a deeper one is a loop.
        fused: of heads that run in a loop and have narrow rows, so many come at once that they have about this many
            queries together.
        scores: of those that have wide rows, so many that a row of each is about this many scores together.
        remat: what layers compute again in the backward pass: nothing, all but what linear layers gave, or all but
            what they were given.
        kernel: what runs attention over a pattern of positions, see `attention/_engine/kernels.py`.
    """

    loop_from: int | None = None
    unrolled: int = 0
    fused: int = FUSED
    scores: int = SCORES
    remat: Remat = "none"
    kernel: Kernel = AUTO

    @classmethod
    def of(cls, platform: str) -> "Plan":
        """The plan of a platform, as `nn.platform` names it."""
        if platform != "cpu":
            return cls()
        # A loop over heads keeps scores in cache; below so many of them per head its own cost is larger than what it
        # saves. Layers of a shallow stack that are written out run faster than a loop over them (see benchmarks/).
        return cls(loop_from=256 * 256, unrolled=8)

    def loops(self, T: int, S: int) -> bool:
        """Whether heads or samples with T queries and S keys run in a loop."""
        return self.loop_from is not None and self.loop_from <= T * S

    def heads_of_narrow_rows(self, T: int) -> int:
        """How many heads of T queries run at once, where heads run in a loop and each is a batch of narrow rows."""
        return max(1, self.fused // T)

    def heads_of_wide_rows(self, scores: int) -> int:
        """The same where a head runs row after row, of so many scores each."""
        return max(1, self.scores // scores)

    def unroll(self, length: int, places: int) -> int:
        """How many of `length` periods of so many layers a scan runs between two looks at its counter."""
        # Written out, XLA:CPU has what several layers compute again in memory at once.
        return length if length * places <= self.unrolled and self.remat == "none" else 1


class _Sized(Protocol):
    """A Size, which holds a Plan, so that it cannot be imported here."""

    @property
    def plan(self) -> Plan | None: ...


def plan_of(size: _Sized) -> Plan:
    """The plan that a Size asks for, else that of the platform the program is traced for."""
    from xformers_lab.nn.platform import platform  # here, since plans are read by commands that need no device

    return Plan.of(platform()) if size.plan is None else size.plan
