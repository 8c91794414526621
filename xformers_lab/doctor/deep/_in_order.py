"""Lines of several that speak at once, shown as if one came after the other."""

import threading
from collections.abc import Callable


class InOrder:
    """The first that is not over is shown as it speaks, the others once those before them are over."""

    def __init__(self, show: Callable[[str], object], count: int):
        self._show, self._turn = show, 0
        self._lines: list[list[str]] = [[] for _ in range(count)]
        self._over = [False] * count
        self._lock = threading.Lock()

    def say(self, place: int, line: str) -> None:
        """A line of the one at this place, from whichever thread."""
        with self._lock:
            self._lines[place].append(line)
            self._go_on()

    def over(self, place: int) -> None:
        """The one at this place says no more."""
        with self._lock:
            self._over[place] = True
            self._go_on()

    def _go_on(self) -> None:
        while self._turn < len(self._lines):
            lines = self._lines[self._turn]
            while lines:
                self._show(lines.pop(0))
            if not self._over[self._turn]:
                return
            self._turn += 1
