"""What can go wrong, by exit code: one clear message, no traceback.

0 ok, 1 our bug, 2 usage / config / data, 3 run failed (NaN, out of memory, disk), 4 integrity, 5 some cells failed.
"""

import contextlib
import difflib
import os
import pathlib
import signal
import sysconfig
import threading
import traceback
from collections.abc import Iterable, Iterator

from xformers_lab.terminal import shortened

_PACKAGE = pathlib.Path(__file__).parent
STOPPED = (130, 143)  # exit codes of Ctrl-C and SIGTERM
LONGEST_NAME = 100  # characters; nothing longer is a misspelt name


class LabError(Exception):
    """An error with a message for the user, which a long value does not flood; `exit_code` is what the process ends
    with."""

    exit_code = 1

    def __str__(self) -> str:
        return shortened(super().__str__())


class UsageError(LabError):
    """Bad input: says what is wrong, where, and the nearest right thing."""

    exit_code = 2


class BrokenChoice(UsageError):
    """A choice from outside the package raised what a choice should not: the message says what, and in which line."""


class InUse(UsageError):
    """Another process works in the folder of a run: it is to be waited for, or left to that one."""


class Refused(ValueError):
    """A choice refuses an option, a size, or another choice beside it: the message says why, and what fits.

    A refusal is a raise of this class; any other exception is a mistake, to `xlab check` too.
    """


class RunFailed(LabError):
    """A run that started and could not finish: non-finite loss, out of memory, disk full."""

    exit_code = 3


class IntegrityError(LabError):
    """Stored results that cannot be trusted, and nothing to fall back to."""

    exit_code = 4


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, the host's or the device's."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def missing_device() -> str | None:
    """What to do where JAX_PLATFORMS names no device that jax has here; None where jax has one."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms:
        return None
    import jax

    try:
        jax.devices()
    except Exception:  # an assertion or a RuntimeError, by the name and the version
        return (
            f"JAX_PLATFORMS={platforms}: jax has no such device here, it has {_platforms()}; unset JAX_PLATFORMS, or "
            "name one of these. For an NVIDIA GPU install xformers_lab[cuda13] or [cuda12], for a TPU xformers_lab[tpu]"
        )
    return None


def _platforms() -> str:
    """The platforms that jax has where nobody says which; asked where it has failed to start one."""
    import jax

    try:
        jax.config.update("jax_platforms", None)
        return ", ".join(sorted({device.platform for device in jax.devices()} | {"cpu"}))
    except Exception:
        return "cpu"


def in_words(error: BaseException) -> str:
    """One line of an unforeseen exception, with the innermost line outside jax that it passed."""
    if isinstance(error, BrokenChoice):  # which has these words already
        return str(error)
    return f"{type(error).__name__}: {(said(error).splitlines() or [''])[0]}{place(error)}"


def place(error: BaseException) -> str:
    """ " (FILE:LINE)", the innermost line outside jax that an exception passed; nothing where there is none."""
    frame = _innermost(error)
    return f" ({frame.filename}:{frame.lineno})" if frame else ""


def said(error: BaseException) -> str:
    """The text of an exception, whatever its class makes of it."""
    try:
        return str(error).strip()
    except BaseException:
        return ""


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Around what runs other people's code: an exit of any kind that it raises itself becomes a BrokenChoice, so that
    it ends nothing. Every Exception passes, and so does what a signal interrupts, as KeyboardInterrupt."""
    signalled: list[int] = []
    with _noted(signalled):
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, Exception) or signalled:
                raise
            raise BrokenChoice(in_words(error)) from error
        except BaseException as error:
            if signalled and stopped_by(error) is not None:
                raise
            raise KeyboardInterrupt if signalled else BrokenChoice(in_words(error)) from error


@contextlib.contextmanager
def _noted(signalled: list[int]) -> Iterator[None]:
    """Meanwhile a signal is noted in the list before its handler hears of it; in the main thread alone."""
    replaced = {}
    for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
        if callable(handler := signal.getsignal(number)):

            def noting(number, frame, handler=handler):
                signalled.append(number)
                return handler(number, frame)

            replaced[number] = noting, handler
            signal.signal(number, noting)
    try:
        yield
    finally:
        for number, (noting, handler) in replaced.items():
            if signal.getsignal(number) is noting:
                signal.signal(number, handler)


def stopped_by(error: BaseException) -> int | None:
    """The exit code of what a signal's handler raises, None of everything else."""
    if type(error) is KeyboardInterrupt:
        return STOPPED[0]
    return error.code if isinstance(error, SystemExit) and error.code in STOPPED else None


def foreign(error: BaseException) -> str | None:
    """What an exception says, with its innermost line in a file of the user's own; None where it passed none."""
    libraries = {pathlib.Path(path) for name, path in sysconfig.get_paths().items() if name.endswith(("stdlib", "lib"))}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = pathlib.Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in (*libraries, _PACKAGE)):
            return f"{type(error).__name__}: {(said(error).splitlines() or [''])[0]} ({path}:{frame.lineno})"
    return None


def outside(error: BaseException) -> bool:
    """Whether the innermost line outside jax that an exception passed is none of this package."""
    frame = _innermost(error)
    return frame is not None and not pathlib.Path(frame.filename).is_relative_to(_PACKAGE)


def _innermost(error: BaseException) -> traceback.FrameSummary | None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    return frames[-1] if frames else None


def nearest(word: str, known: Iterable[str], what: str = "choose from") -> str:
    """The tail of a message about an unknown `word`: the nearest known one first, if one is near, then all of them."""
    known = sorted(known)
    near = _near(word.lower(), {name.lower(): name for name in known}) if len(word) <= LONGEST_NAME else []
    hint = "did you mean " + " or ".join(f'"{name}"' for name in near) + "? " if near else ""
    return f"{hint}({what}: {', '.join(known)})" if known else hint


def _near(word: str, names: dict[str, str]) -> list[str]:
    """The known name that a misspelt one most likely means: all of its letters in another order, most of them in order,
    or its beginning; several that are equally near. Half of the letters are no more than chance."""
    if other_order := [name for name in names if sorted(name) == sorted(word)]:
        return [names[other_order[0]]]
    alike = lambda name: difflib.SequenceMatcher(None, name, word).ratio()
    if close := difflib.get_close_matches(word, names, n=2, cutoff=0.6):
        return [names[name] for name in close if alike(name) == alike(close[0])]
    return [names[name] for name in names if len(word) > 1 and name.startswith(word)][:1]
