"""Windows of positions that become one slot each: what they hold, and which of them a query may see."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from xformers_lab.attention._engine.algebra import FAR, Pattern, everything, settled


def count(length: int, width: int, step: int) -> int:
    """How many windows of `width` positions, one every `step`, cover `length` positions; the last may reach beyond."""
    return 1 + max(0, -(-(length - width) // step))


def windows(x, width: int, step: int):
    """(S, ...) -> (count, width, ...), zeros beyond the end."""
    slots, more = count(x.shape[0], width, step), -(-width // step)
    space = (slots + more - 1) * step
    x = jnp.pad(x, [(0, max(0, space - x.shape[0]))] + [(0, 0)] * (x.ndim - 1))[:space]
    blocks = x.reshape(-1, step, *x.shape[1:])
    return jnp.concatenate([blocks[place : place + slots] for place in range(more)], 1)[:, :width]


@dataclasses.dataclass(frozen=True)
class Windows(Pattern):
    """Slots in the place of keys: slot lead + c holds the positions c step to c step + width - 1 of `length` ones.

    With lead = 1 slot 0 holds position 0 alone. A query sees the slots whose positions all lie at most `behind` before
    it (None: however far) and at most `ahead` after it; where nothing ahead is seen, a window that reaches beyond the
    end is not finished. The engine counts the last query as position slots - 1; here it is length - 1.
    """

    width: int
    step: int
    slots: int
    length: int
    behind: int | None
    ahead: int
    lead: int = 0

    def _first(self, slot):
        return (slot >= self.lead) * (slot - self.lead) * self.step

    def _last(self, slot):
        last = (slot >= self.lead) * ((slot - self.lead) * self.step + self.width - 1)
        end = self.length - 1
        return last - (last > end) * (last - end) if self.ahead else last

    def __call__(self, q, k):
        at = q + self.length - self.slots
        seen = self._last(k) <= at + self.ahead
        return seen if self.behind is None else seen & (self._first(k) >= at - self.behind)

    def state(self, q, k):
        low, high = (at + self.length - self.slots for at in (q.low, q.high))
        possible, certain = self._last(k.low) <= high + self.ahead, self._last(k.high) <= low + self.ahead
        if self.behind is not None:
            possible = possible & (self._first(k.high) >= low - self.behind)
            certain = certain & (self._first(k.low) >= high - self.behind)
        return settled(possible, certain)

    def spans(self, low, high):
        low, high = (q + self.length - self.slots for q in (low, high))
        first, last = everything(low)[0], self.lead + (high + self.ahead - self.width + 1) // self.step
        if self.behind is not None:
            first = self.lead - (self.behind - low) // self.step
        return [(first, np.where((self.ahead > 0) & (high + self.ahead >= self.length - 1), FAR, last))]
