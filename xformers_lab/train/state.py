"""Everything that training changes, as one pytree of arrays, and the structure that makes a model of it again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xformers_lab import optimizer
from xformers_lab.config import Config, Train
from xformers_lab.memory import Remembered
from xformers_lab.model import Model, build_model
from xformers_lab.tasks import Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rates:
    """What only scales updates: the peak learning rate, the steps that warm it up, the steps of the whole run, the
    weight decay, the largest norm of a gradient, the rate of `ema`'s average of the parameters, None without, and the
    last steps in which schedule=wsd falls, None without; float32, and int32 for counts of steps."""

    lr: jax.Array
    warm: jax.Array
    steps: jax.Array
    weight_decay: jax.Array
    clip: jax.Array
    ema: jax.Array | None = None
    cool: jax.Array | None = None


def rates_of(train: Train) -> Rates:
    """The rates of a config. Beyond float32 they are its largest number, since a checkpoint holds no infinities; so is
    the norm that nothing clips. A rate of the average that float32 rounds to 1 is the next number below."""
    largest = float(jnp.finfo(jnp.float32).max)
    number = lambda value: jnp.float32(min(value, largest))
    warm = round(min(train.warmup, 1) * train.steps)
    clip = train.clip or largest
    ema = None if train.ema is None else number(min(train.ema, 1 - 2**-24))
    lr, decay = number(train.lr), number(train.weight_decay)
    cool = jnp.int32(round(train.cooldown * train.steps)) if train.schedule == "wsd" else None
    return Rates(lr, jnp.int32(warm), jnp.int32(train.steps), decay, number(clip), ema, cool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """params: the parameters; extra: variables that are no parameters (counters, running statistics, fixed random
    features); memory: what is remembered of each sequence of the batch, (L, B, ...), empty without a memory; opt: the
    optimizer's state; step: optimizer steps taken; skipped: those among them that were non-finite and changed nothing;
    seed: the run's; rates: how far updates go. Both are arrays so that runs that differ in nothing else share one
    compiled program; an update rule of another kind has no rates. average: the average of the parameters that is
    scored, of `ema` or of an optimizer that keeps one; None without.
    The data position is `step`, for a batch is a function of (seed, split, step)."""

    params: Any
    extra: Any
    memory: Any
    opt: Any
    step: jax.Array
    skipped: jax.Array
    seed: jax.Array
    rates: Rates | None = None
    average: Any = None


def split(model: Model) -> tuple[nnx.GraphDef, Any, Any, Any]:
    """The structure of a model, its parameters, its other variables and its memory, all three as pure dicts."""
    graph, *parts = nnx.split(model, nnx.Param, nnx.All(nnx.Not(nnx.Param), nnx.Not(Remembered)), Remembered)
    params, extra, memory = map(nnx.to_pure_dict, parts)
    return graph, params, extra, memory


def structure(config: Config, task: Task) -> nnx.GraphDef:
    """The structure of a config's model; nothing is computed."""
    return shapes(config, task)[0]


def shapes(config: Config, task: Task) -> tuple[nnx.GraphDef, Any, Any, Any]:
    """What `split` gives of a config's model, as shapes and types; nothing is computed."""
    return split(nnx.eval_shape(lambda: build_model(config, task)))


def merge(graph: nnx.GraphDef, params: Any, extra: Any, memory: Any) -> Model:
    """The inverse of `split`."""
    return nnx.merge(graph, params, extra, memory)


def empty(memory: Any) -> Any:
    """The same memory with nothing in it."""
    return jax.tree.map(jnp.zeros_like, memory)


def begun(memory: Any, fresh: Any) -> Any:
    """The memory of a batch in which the sequences that fresh (B,) bool names begin a new text; None: none does."""
    if fresh is None:
        return memory
    axes = lambda leaf: jnp.reshape(fresh, (1, -1) + (1,) * (leaf.ndim - 2))
    return jax.tree.map(lambda leaf: jnp.where(axes(leaf), jnp.zeros_like(leaf), leaf), memory)


def init(config: Config, task: Task, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step, drawn from the config's `init_seed`."""
    _, params, extra, memory = split(build_model(config, task))
    memory = jax.tree.map(lambda leaf: jnp.repeat(leaf, config.train.batch, 1), memory)
    count = lambda: jnp.zeros((), jnp.int32)  # each its own array, for the step donates them all
    seed, rates = jnp.uint32(config.seed % 2**32), rates_of(config.train)
    opt = tx.init(params)
    averages = config.train.ema is not None or optimizer.scored(opt, params) is not None
    average = jax.tree.map(jnp.copy, params) if averages else None
    return TrainState(params, extra, memory, opt, count(), count(), seed, rates, average)


def abstract(config: Config, task: Task, tx: optax.GradientTransformation) -> TrainState:
    """The shapes and types of the state; nothing is computed."""
    return jax.eval_shape(lambda: init(config, task, tx))
