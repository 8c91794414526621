"""How long calls take: several of them in interleaved rounds, so that a disturbance of the machine hits all alike."""

import contextlib
import contextvars
import dataclasses
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from xformers_lab import hardware
from xformers_lab.measure.compiling import compile_clock

# A call shorter than this is repeated within a round, for the clock and the caller's own cost to be small beside it.
ROUND_SECONDS = 0.02

Case = TypeVar("Case", bound=Hashable)

_SHARED: contextvars.ContextVar[str] = contextvars.ContextVar("shared", default="")


@contextlib.contextmanager
def sharing(why: str) -> Iterator[None]:
    """Meanwhile this process shares its host with others like it, so that no time is taken of what it does; why: in
    words, empty where it does not."""
    token = _SHARED.set(why)
    try:
        yield
    finally:
        _SHARED.reset(token)


def shared() -> str:
    """Why no time is to be taken here, in words; empty where it may."""
    return _SHARED.get()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds. The minimum is the least disturbed: compare minima of the same rounds."""

    seconds_min: float
    seconds_median: float
    seconds_rounds: tuple[float, ...] = dataclasses.field(default=(), compare=False)


def disturbance(seconds: Sequence[float]) -> dict[str, float | None]:
    """What a row says of how quiet the machine was: seconds_ratio, median / minimum of the times of equal work, None
    for fewer than two; and load, that of the machine now."""
    ratio = statistics.median(seconds) / min(seconds) if len(seconds) > 1 and min(seconds) > 0 else None
    return {"seconds_ratio": ratio, "load": hardware.load()}


def compile_timed(fn: Callable, *args: Any, donate: tuple[int, ...] = ()) -> tuple[jax.stages.Compiled, float]:
    """`fn` traced, lowered and compiled for args (arrays, ShapeDtypeStructs, pytrees), and the seconds that took.

    donate: which args a call uses up, for results to be written in their place.
    What JAX's cache holds counts as `compile_clock` says.
    """
    with compile_clock() as seconds:
        compiled = jax.jit(fn, donate_argnums=donate).lower(*args).compile()
        return compiled, seconds()


def interleaved(
    calls: Mapping[Case, Callable[[], object]],
    *,
    rounds: int = 5,
    seed: int = 0,
    begun: Callable[[int | None, Case], None] = lambda at, case: None,
) -> dict[Case, Timing | Exception]:
    """The timing of each call, or the exception that it raised, which ends only its own measuring.

    A call takes nothing and gives arrays, whose end is waited for. First each one is warmed up, untimed. Then every
    round times all of them once, in an order drawn from `seed`; a short one is repeated within its round.
    begun(round, case) is called before a case is timed, with rounds from 0, and None for what warms it up.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    results: dict[Case, Timing | Exception] = {}
    repeats: dict[Case, int] = {}
    seconds: dict[Case, list[float]] = {}
    for case, call in calls.items():
        begun(None, case)
        try:
            first = _seconds(call, 1)
            # A first call also pays for pages and caches; only where it was short does another one say more.
            usual = first if first > ROUND_SECONDS else _seconds(call, 1)
        except Exception as error:
            results[case] = error
        else:
            repeats[case] = max(1, math.ceil(ROUND_SECONDS / max(usual, 1e-6)))
            seconds[case] = []
    order = random.Random(seed)
    for at in range(rounds):
        for case in order.sample(list(seconds), len(seconds)):
            begun(at, case)
            try:
                seconds[case].append(_seconds(calls[case], repeats[case]))
            except Exception as error:
                results[case] = error
                del seconds[case]
    return results | {
        case: Timing(min(taken), statistics.median(taken), tuple(taken)) for case, taken in seconds.items()
    }


def machine() -> dict[str, str]:
    """What measured: processor, cores, accelerators where there are some, system and versions."""
    devices = jax.devices()
    facts = {"processor": hardware.processor(), "cores": str(hardware.cores())}
    if devices[0].platform != "cpu":
        facts["accelerator"] = f"{len(devices)} x {devices[0].device_kind}"
    return facts | {"system": platform.system(), "python": platform.python_version(), "jax": jax.__version__}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call; each is waited for, since a backend may run independent calls at the same time.

    Where there are several, one more goes before them untimed: a short call after a long one of another case would
    otherwise be charged with fetching its arrays back into the processor's caches.
    """
    if repeats > 1:
        jax.block_until_ready(call())
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats
