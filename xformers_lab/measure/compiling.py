"""How long programs take to compile, whether or not JAX's cache holds them already."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

SAVED = "/jax/compilation_cache/compile_time_saved_sec"


@contextlib.contextmanager
def compile_clock() -> Iterator[Callable[[], float]]:
    """A function for the seconds since the `with` began. A program that JAX's cache held counts as long as it took when
    it was compiled, so that programs are compared alike; the cache keeps that time beside the program."""
    began, saved = time.perf_counter(), 0.0

    def listen(event: str, duration_secs: float, **_: object) -> None:
        nonlocal saved
        if event == SAVED:
            saved += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: time.perf_counter() - began + saved
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
