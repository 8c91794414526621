"""How large states and gradients are in each layer of a model as it is drawn, before it trains.

What a layer's parameters get of the gradient is read off by adding zeros to them where the layer runs, and
differentiating by these: so layers need no order in the tree of parameters.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.config import Config, edit
from xformers_lab.errors import Refused, UsageError
from xformers_lab.model import Model, build_model, check_config
from xformers_lab.nn import layer_watch
from xformers_lab.tasks import Batch, Task
from xformers_lab.train.step import run

Program = Callable[[Any, Batch], tuple[list, list[jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Signal:
    """One layer on a batch. layer: from 1, in the order in which they run.

    state: mean over positions of |x|^2 / D of its output x. state_gradient: norm of the gradient of the mean loss by
    the whole output (B, T, D). gradient, ffn_gradient: the norm of that by all parameters of the layer, and by those of
    its feed-forward part, None without one.
    """

    layer: int
    state: float
    state_gradient: float
    gradient: float
    ffn_gradient: float | None


def of_configs(configs: Sequence[Config]) -> Iterator[list[Signal]]:
    """The signals of each config's model on the first batch of training, in turn; those that differ in their seeds
    alone share a program. Raises UsageError where there are none."""
    programs: dict[Config, Program] = {}
    for config in configs:
        task = check_config(config)
        model = build_model(config, task)
        variant = edit(config, **dict.fromkeys(("init_seed", "data_seed")), seed=0)
        try:
            if variant not in programs:
                programs[variant] = program(model, task)
            yield of_model(model, task.batch("train", 0), programs[variant])
        except Refused as reason:
            raise UsageError(f"model={config.model.model} depth={config.model.depth}: {reason}") from None


def program(model: Model, task: Task) -> Program:
    """What measures models like this one: (variables, batch) -> for each layer its state, and the gradients by what is
    added to its parameters and to its output."""
    graph = nnx.split(model)[0]

    def loss(added: list | None, watch: "_Layers", variables: Any, batch: Batch) -> jax.Array:
        fresh = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))
        with layer_watch.watched(watch):
            logits, aux = run(fresh, batch)
        total, weight = task.loss(logits, batch)
        return total / weight + sum(aux.losses.values())

    def measured(added: list, variables: Any, batch: Batch) -> tuple[jax.Array, list[jax.Array]]:
        watch = _Layers(added)
        return loss(added, watch, variables, batch), watch.states

    def whole(variables: Any, batch: Batch) -> tuple[list, list[jax.Array]]:
        shapes = _Layers(None)
        jax.eval_shape(lambda: loss(None, shapes, variables, batch))
        if not shapes.shapes:
            raise Refused("its layers run in no stack, so there is nothing to look at layer by layer")
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.shapes)
        return jax.grad(measured, has_aux=True)(zeros, variables, batch)

    return jax.jit(whole)


def of_model(model: Model, batch: Batch, measure: Program) -> list[Signal]:
    """A signal for each layer, in the order in which they run; raises Refused where the layers are in no stack."""
    gradients, states = jax.device_get(measure(nnx.split(model)[1], jax.tree.map(jnp.asarray, batch)))
    return [
        Signal(
            layer,
            float(state),
            _norm(of_state),
            _norm(of_parameters),
            _norm(of_parameters["ffn"]) if "ffn" in of_parameters else None,
        )
        for layer, (state, (of_parameters, of_state)) in enumerate(zip(states, gradients, strict=True), 1)
    ]


class _Layers:
    """Notes the shapes of each layer's parameters and output, and adds what there is to add to them."""

    def __init__(self, added: list | None):
        self.shapes: list[tuple[Any, Any]] = []
        self.states: list[jax.Array] = []
        self._added = added
        self._parameters: Any = None

    def enter(self, block: Any) -> None:
        self._parameters = nnx.state(block, nnx.Param)
        if self._added is not None:
            own, _ = self._added[len(self.shapes)]
            nnx.update(block, jax.tree.map(jnp.add, self._parameters, own))

    def leave(self, x: Any) -> Any:
        if not isinstance(x, jax.Array):
            raise Refused("its layers give more than one state, so there is nothing to look at layer by layer")
        if self._added is not None:
            x = x + self._added[len(self.shapes)][1]
        self.shapes.append(jax.tree.map(_shape, (self._parameters, x)))
        self.states.append(jnp.mean(jnp.sum(jnp.square(x.astype(jnp.float32)), -1)) / x.shape[-1])
        return x


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _norm(tree: Any) -> float:
    squares = [np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(squares)))
