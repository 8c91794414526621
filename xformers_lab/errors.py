"""What can go wrong, by exit code: one clear message, no traceback.

0 ok, 1 our bug, 2 usage / config / data, 3 run failed (NaN, out of memory, disk), 4 integrity, 5 some cells failed.
"""

import difflib
import os
import pathlib
import traceback
from collections.abc import Iterable


class LabError(Exception):
    """An error with a message for the user; `exit_code` is what the process ends with."""

    exit_code = 1


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
            f"JAX_PLATFORMS={platforms}: jax has no such device here; unset it, or JAX_PLATFORMS=cpu. "
            "For an NVIDIA GPU install xformers_lab[cuda13] or [cuda12], for a TPU xformers_lab[tpu]"
        )
    return None


def in_words(error: Exception) -> str:
    """One line of an unforeseen exception, with the innermost line outside jax that it passed."""
    frame = _innermost(error)
    where = f" ({frame.filename}:{frame.lineno})" if frame else ""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}{where}"


def outside(error: Exception) -> bool:
    """Whether the innermost line outside jax that an exception passed is none of this package."""
    frame = _innermost(error)
    return frame is not None and not pathlib.Path(frame.filename).is_relative_to(pathlib.Path(__file__).parent)


def _innermost(error: Exception) -> traceback.FrameSummary | None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    return frames[-1] if frames else None


def nearest(word: str, known: Iterable[str], what: str = "choose from") -> str:
    """The tail of a message about an unknown `word`: the nearest known one first, then all of them."""
    known = sorted(known)
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    if not close and word:
        # difflib counts runs alone: letters in another order may leave none.
        alike = lambda name: sorted(name) == sorted(word.lower()) or name.startswith(word.lower()[:3])
        close = [name for name in lowered if alike(name)][:1]
    hint = f'did you mean "{lowered[close[0]]}"? ' if close else ""
    return f"{hint}({what}: {', '.join(known)})" if known else hint
