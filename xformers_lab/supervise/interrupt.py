"""Ctrl-C and SIGTERM as a flag that training polls, so that it stops where nothing is lost."""

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from xformers_lab.errors import LabError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEATED = 0.5  # seconds within which signals are one wish: what a terminal sends, wrappers may send once more
GRACE = 1.0  # seconds that the main thread has to hear a second signal, before the process ends without it


class Interrupted(LabError):
    """A signal had the run stop, which saved itself first; the message says how to go on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def handling(note: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile Ctrl-C and SIGTERM call note(number), once for those that come together; in the main thread alone.

    Python calls it between two of the main thread's own instructions, which native code that hangs never returns to. A
    second wish that it cannot hear ends the process.
    """
    last = ran = -math.inf

    def once(number: int, frame) -> None:
        nonlocal last, ran
        before, last = last, time.monotonic()
        ran = last
        if last - before > REPEATED:
            note(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, once) for number in SIGNALS}
    try:
        with _unheard(lambda: ran):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ending(name: str) -> Iterator[None]:
    """Meanwhile Ctrl-C and SIGTERM end the process at once, in one line, whatever it is in the middle of: imports,
    which may swallow an exception, or native code that compiles and returns to no handler. Where something is to be
    saved, `handling` takes over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    once = threading.Lock()

    def end(number: int, frame=None) -> None:
        if once.acquire(blocking=False):
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: interrupted\n".encode())
            os._exit(128 + number)

    def hear(reads: socket.socket) -> None:
        while number := reads.recv(1):
            if signal.getsignal(number[0]) is end:
                end(number[0])
        reads.close()

    reads, writes = socket.socketpair()
    writes.setblocking(False)
    threading.Thread(target=hear, args=(reads,), name="signals at once", daemon=True).start()
    heard = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(heard)
        writes.close()


@contextlib.contextmanager
def listening(stop: Callable[[], bool] | None = None) -> Iterator[Callable[[], int]]:
    """Gives a function that tells which signal asked to stop, 0 for none; `stop` may ask too, and counts as Ctrl-C.

    A second signal ends the process at once. Outside the main thread only `stop` is heard.
    """
    heard: list[int] = []

    def note(number: int) -> None:
        if heard:
            raise KeyboardInterrupt if heard[0] == signal.SIGINT else SystemExit(128 + heard[0])
        heard.append(number)

    with handling(note):
        yield lambda: heard[0] if heard else int(signal.SIGINT) if stop is not None and stop() else 0


@contextlib.contextmanager
def _unheard(ran: Callable[[], float]) -> Iterator[None]:
    """Meanwhile a thread hears signals too, and ends the process at a second one that the main thread does not take.

    ran() is when the main thread last ran its handler. The thread needs the interpreter's lock, which native code that
    blocks has mostly released.
    """
    reads, writes = socket.socketpair()
    writes.setblocking(False)
    before = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
    over = threading.Event()

    def hear() -> None:
        wishes, last = 0, -math.inf
        while number := reads.recv(1):
            if before >= 0:  # an event loop's, which hears signals by it
                with contextlib.suppress(OSError):
                    os.write(before, number)
            if number[0] not in SIGNALS:
                continue
            now = time.monotonic()
            wishes, last = wishes + (now - last > REPEATED), now
            # The handler may have run just before this thread did.
            if wishes > 1 and not over.wait(GRACE) and ran() < now - REPEATED / 2:
                os._exit(128 + number[0])
        reads.close()

    threading.Thread(target=hear, name="signals", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        writes.close()
