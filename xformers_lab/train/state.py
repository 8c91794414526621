"""Everything that training changes, as one pytree of arrays, and the structure that makes a model of it again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xformers_lab.config import Config
from xformers_lab.model import Model, build_model
from xformers_lab.tasks import Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """params: the parameters; extra: variables that are no parameters (counters, running statistics, fixed random
    features); opt: the optimizer's state; step: optimizer steps taken; skipped: those among them that were non-finite
    and changed nothing; seed: the run's, an array so that runs that differ in nothing else share one compiled program.
    The data position is `step`, for a batch is a function of (seed, split, step)."""

    params: Any
    extra: Any
    opt: Any
    step: jax.Array
    skipped: jax.Array
    seed: jax.Array


def split(model: Model) -> tuple[nnx.GraphDef, Any, Any]:
    """The structure of a model, its parameters and its other variables, both as pure dicts."""
    graph, params, extra = nnx.split(model, nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(extra)


def structure(config: Config, task: Task) -> nnx.GraphDef:
    """The structure of a config's model; nothing is computed."""
    return split(nnx.eval_shape(lambda: build_model(config, task)))[0]


def merge(graph: nnx.GraphDef, params, extra) -> Model:
    """The inverse of `split`."""
    return nnx.merge(graph, params, extra)


def init(config: Config, task: Task, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step, drawn from the config's seed."""
    _, params, extra = split(build_model(config, task))
    count = lambda: jnp.zeros((), jnp.int32)  # each its own array, for the step donates them all
    return TrainState(params, extra, tx.init(params), count(), count(), jnp.uint32(config.seed % 2**32))


def abstract(config: Config, task: Task, tx: optax.GradientTransformation) -> TrainState:
    """The shapes and types of the state; nothing is computed."""
    return jax.eval_shape(lambda: init(config, task, tx))
