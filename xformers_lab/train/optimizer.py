"""The update rule of a run: an optimizer of the shelf behind clipping, its learning rate over the run, what decays."""

from typing import Any, cast

import jax.numpy as jnp
import optax
from flax import nnx

from xformers_lab import optimizer
from xformers_lab.config import Config, Train
from xformers_lab.model import Model
from xformers_lab.tasks import Task
from xformers_lab.train.state import Rates, merge, rates_of, shapes


def of(config: Config, task: Task) -> optax.GradientTransformation:
    """The update rule of a config's model; nothing of the model is computed."""
    return build(config.train, roles(merge(*shapes(config, task))))


def build(train: Train, given: optimizer.Roles) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a config names, behind clipping by the global norm (Pascanu et al., 2013, arXiv 1211.5063).

    `update(updates, state, params, rates=...)` takes what scales an update as arrays, so that it is no part of the
    compiled program; without them it is the config's. What else it is given by name goes to the optimizer.

    Args:
        given: the roles of the parameters, as `roles` has them.
    """

    def rule(rates: Rates) -> optax.GradientTransformation:
        rate, clip = learning_rate(train, rates), cast(float, rates.clip)
        told = optimizer.Given(rate, rates.weight_decay, given, train.schedule)
        return optax.chain(optax.clip_by_global_norm(clip), optimizer.build(train.optimizer, told))

    def update(updates: Any, state: Any, params: Any = None, *, rates: Rates | None = None, **more: Any) -> tuple:
        own = optax.with_extra_args_support(rule(rates_of(train) if rates is None else rates))
        return own.update(updates, state, params, **more)

    return optax.GradientTransformationExtraArgs(lambda params: rule(rates_of(train)).init(params), update)


def learning_rate(train: Train, rates: Rates | None = None) -> optax.Schedule:
    """The rate of step n = 0, 1, ...: linear from lr / w to lr over w = warmup * steps steps, and then by `schedule`.

    constant: lr. cosine, linear: along a half cosine, or a line, towards 0 that would be reached at step `steps`.
    rsqrt: lr sqrt(w / (n + 1)), which does not go by `steps` (Vaswani et al., 2017, arXiv 1706.03762, section 5.3).
    wsd: lr, and over the last cooldown * steps steps along a line towards 0 (Hu et al., 2024, arXiv 2404.06395; Hägele
    et al., 2024, arXiv 2405.18392).

    Args:
        rates: those of `train`, as arrays.
    """
    rates = rates_of(train) if rates is None else rates
    warm, steps = rates.warm, rates.steps
    cool = steps if rates.cool is None else rates.cool
    done = lambda count: jnp.clip((count - warm) / jnp.maximum(steps - warm, 1), 0, 1)
    falling = {
        "constant": lambda count: 1.0,
        "cosine": lambda count: 0.5 * (1 + jnp.cos(jnp.pi * done(count))),
        "linear": lambda count: 1 - done(count),
        "rsqrt": lambda count: jnp.sqrt(jnp.maximum(warm, 1) / (count + 1)),
        "wsd": lambda count: jnp.clip((steps - count) / jnp.maximum(cool, 1), 0, 1),
    }[train.schedule]

    def rate(count):
        rising = (count + 1) / jnp.maximum(warm, 1)
        return rates.lr * jnp.where(count < warm, rising, falling(count))

    return rate


def roles(model: Model) -> optimizer.Roles:
    """The roles of a model's parameters: what each says itself, see `nn.parameters`, and where it stands."""
    return optimizer.roles(nnx.state(model, nnx.Param))
