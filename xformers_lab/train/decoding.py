"""What decoding costs a trained model: what it keeps, the time to read a context and that of one token behind it.

Measured is one sequence of seq_len tokens on one device, read in the parts that generation reads a prompt in.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.config import Config
from xformers_lab.errors import Refused, ran_out_of_memory
from xformers_lab.generate import AT_ONCE
from xformers_lab.measure import speed
from xformers_lab.model import Model
from xformers_lab.train import hosts
from xformers_lab.train.state import TrainState, merge

BUDGET = 0.3  # seconds that the calls of one figure take together, or one call where that takes longer
FIGURES = ("state_bytes", "prefill_seconds", "token_seconds")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decoding compiled for one sequence. prefill(variables) -> the cache behind seq_len tokens; token(variables,
    cache) -> the cache behind one more, written in the place of the one given; state_bytes: of the whole batch."""

    prefill: Callable[[Any], Any]
    token: Callable[[Any, Any], Any]
    state_bytes: int


def compile_decoder(config: Config, graph: nnx.GraphDef, state: TrainState) -> Decoder:
    """For variables as in `state`; raises Refused where the model cannot decode."""
    length, size = config.seq_len, state_bytes(config, graph, state)
    # Shapes alone: the arrays may be spread over devices.
    plain = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    variables = jax.tree.map(plain, (state.params, state.extra, state.memory))

    def prefill(variables):
        model = merge(graph, *variables)
        cache = model.init_cache(1, length)
        if model.source:
            sources = jnp.zeros((1, model.source), jnp.int32)
            cache = model.read(cache, sources, jnp.ones(sources.shape, bool))
        return read(model, cache, length - model.source)

    def token(variables, cache):
        logits, cache = merge(graph, *variables).step(cache, jnp.zeros(1, jnp.int32))
        return logits, cache

    behind = jax.eval_shape(prefill, variables)
    reading, one = (jax.jit(prefill).lower(variables), jax.jit(token, donate_argnums=1).lower(variables, behind))
    return Decoder(reading.compile(), one.compile(), size)


def state_bytes(config: Config, graph: nnx.GraphDef, state: TrainState) -> int:
    """What decoding keeps of seq_len tokens of the whole batch; nothing is computed. Raises Refused where the model
    cannot decode."""
    variables, length = (state.params, state.extra, state.memory), config.seq_len
    sizes = jax.eval_shape(lambda variables: merge(graph, *variables).init_cache(config.train.batch, length), variables)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sizes))


def read(model: Model, cache: Any, length: int) -> Any:
    """A cache with `length` more tokens of one sequence in it, in parts of up to AT_ONCE tokens: equal ones where that
    takes no more than twice as many, for a last one of its own is compiled apart."""
    least = max(math.ceil(length / AT_ONCE), 1)
    parts = next((parts for parts in range(least, 2 * least) if length % parts == 0), length // AT_ONCE)
    size = length // parts if length % parts == 0 else AT_ONCE
    left = length - parts * size
    if parts:
        tokens = jnp.zeros((parts, 1, size), jnp.int32)
        cache, _ = jax.lax.scan(lambda cache, part: (model.step_several(cache, part)[1], None), cache, tokens)
    return model.step_several(cache, jnp.zeros((1, left), jnp.int32))[1] if left else cache


def measure(decoder: Decoder, variables: Any) -> dict[str, float | int | None]:
    """The FIGURES, of variables of the host."""
    variables = jax.device_put(variables, jax.local_devices()[0])
    prefill = _least(lambda: decoder.prefill(variables))
    cache = decoder.prefill(variables)

    def token() -> Any:
        nonlocal cache
        logits, cache = decoder.token(variables, cache)
        return logits, cache

    return {"state_bytes": decoder.state_bytes, "prefill_seconds": prefill, "token_seconds": _least(token)}


def figures(
    decoder: Callable[[], Decoder], state: TrainState, doing: Callable[[str], None]
) -> dict[str, float | int | None]:
    """The FIGURES of a trained model, None each where it cannot decode; decoder(): compiled, or raises why not.

    They come after all else of a run, so what goes wrong with them is said and costs the run nothing.
    """
    try:
        # One device's share of the work: a model that is spread over several is brought together. That comes first, for
        # all processes have to take part.
        variables = hosts.whole((state.params, state.extra, state.memory))
        doing("compiling the decoding")
        ready = decoder()
        if speed.shared():
            return dict.fromkeys(FIGURES) | {"state_bytes": ready.state_bytes}
        doing("timing the decoding")
        return measure(ready, variables)
    except Refused:
        pass
    except Exception as error:
        why = "out of memory" if ran_out_of_memory(error) else f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).warning("decoding could not be timed (%s)", why.splitlines()[0][:300])
    return dict.fromkeys(FIGURES)


def _least(call: Callable[[], Any]) -> float:
    """The least seconds of a call, after one that warms it up and counts where it alone takes longer than BUDGET."""
    taken = [_seconds(call)]
    if taken[0] < BUDGET:
        taken = []
        while sum(taken) < BUDGET:
            taken.append(_seconds(call))
    return min(taken)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began
