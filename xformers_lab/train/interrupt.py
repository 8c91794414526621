"""Ctrl-C and SIGTERM as a flag that training polls, so that it stops where nothing is lost."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator

from xformers_lab.errors import LabError

REPEATED = 0.5  # seconds within which signals are one wish: what a terminal sends, wrappers may send once more


class Interrupted(LabError):
    """The run was asked to stop, and saved itself first; the message says how to go on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def handling(note: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile Ctrl-C and SIGTERM call note(number), once for those that come together; in the main thread alone."""
    last = -math.inf

    def once(number: int, frame) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > REPEATED:
            note(number)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, once) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def listening(stop: Callable[[], bool] | None = None) -> Iterator[Callable[[], int]]:
    """Gives a function that tells which signal asked to stop, 0 for none; `stop` may ask too, and counts as Ctrl-C.

    A second signal ends the process at once. Outside the main thread only `stop` is heard.
    """
    heard: list[int] = []

    def note(number: int) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    with handling(note):
        yield lambda: heard[0] if heard else int(signal.SIGINT) if stop is not None and stop() else 0
