"""The update rule: AdamW or SGD, its learning rate over the run, clipping, and what decays."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xformers_lab.config import Config, Train
from xformers_lab.model import Model
from xformers_lab.nn import parameters
from xformers_lab.tasks import Task
from xformers_lab.train.state import Rates, merge, rates_of, shapes


def of(config: Config, task: Task) -> optax.GradientTransformation:
    """The update rule of a config's model; nothing of the model is computed."""
    return build(config.train, decays(merge(*shapes(config, task))))


def build(train: Train, decaying: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) or plain SGD, behind clipping by the global norm.

    Weight decay is decoupled and scaled by the learning rate. `update(updates, state, params, rates=...)` takes what
    scales an update as arrays, so that it is no part of the compiled program; without them it is the config's.

    Args:
        decaying: which parameters decay, as `decays` gives it.
    """

    def rule(rates: Rates) -> optax.GradientTransformation:
        rate = learning_rate(train, rates)
        if train.optimizer == "adamw":
            rule = optax.adamw(rate, weight_decay=cast(float, rates.weight_decay), mask=decaying)
        else:
            decay = optax.add_decayed_weights(cast(float, rates.weight_decay), mask=decaying)
            rule = optax.chain(decay, optax.sgd(rate))
        return optax.chain(optax.clip_by_global_norm(cast(float, rates.clip)), rule)

    def update(updates: Any, state: Any, params: Any = None, *, rates: Rates | None = None, **_: Any) -> tuple:
        return rule(rates_of(train) if rates is None else rates).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(lambda params: rule(rates_of(train)).init(params), update)


def learning_rate(train: Train, rates: Rates | None = None) -> optax.Schedule:
    """The rate of step n = 0, 1, ...: linear from lr / w to lr over w = warmup * steps steps, then constant, or along a
    half cosine towards 0 that would be reached at step `steps`. rates: those of `train`, as arrays."""
    rates = rates_of(train) if rates is None else rates
    warm, steps = rates.warm, rates.steps

    def rate(count):
        rising = (count + 1) / jnp.maximum(warm, 1)
        done = jnp.clip((count - warm) / jnp.maximum(steps - warm, 1), 0, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * done)) if train.schedule == "cosine" else 1.0
        return rates.lr * jnp.where(count < warm, rising, falling)

    return rate


def decays(model: Model) -> Any:
    """Which parameters of a model decay, a bool for each: what each says itself, see `nn.parameters.decays`."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    return nnx.to_pure_dict(jax.tree.map(parameters.decays, nnx.state(model, nnx.Param), is_leaf=is_variable))
