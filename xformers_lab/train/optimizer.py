"""The update rule: AdamW or SGD, its learning rate over the run, clipping, and what decays."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xformers_lab.config import Config, Train
from xformers_lab.model import Model
from xformers_lab.nn import parameters
from xformers_lab.tasks import Task
from xformers_lab.train.state import merge, shapes


def of(config: Config, task: Task) -> optax.GradientTransformation:
    """The update rule of a config's model; nothing of the model is computed."""
    return build(config.train, decays(merge(*shapes(config, task))))


def build(train: Train, decaying: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) or plain SGD, behind clipping by the global norm.

    Weight decay is decoupled and scaled by the learning rate.

    Args:
        decaying: which parameters decay, as `decays` gives it.
    """
    rate = learning_rate(train)
    if train.optimizer == "adamw":
        rule = optax.adamw(rate, weight_decay=train.weight_decay, mask=decaying)
    else:
        rule = optax.chain(optax.add_decayed_weights(train.weight_decay, mask=decaying), optax.sgd(rate))
    return optax.chain(optax.clip_by_global_norm(train.clip), rule) if train.clip else rule


def learning_rate(train: Train) -> optax.Schedule:
    """The rate of step n = 0, 1, ...: linear from lr / w to lr over w = warmup * steps steps, then constant, or along a
    half cosine towards 0 that would be reached at step `steps`."""
    warm = round(min(train.warmup, 1) * train.steps)

    def rate(count):
        rising = (count + 1) / max(warm, 1)
        done = jnp.clip((count - warm) / max(train.steps - warm, 1), 0, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * done)) if train.schedule == "cosine" else 1.0
        return train.lr * jnp.where(count < warm, rising, falling)

    return rate


def decays(model: Model) -> Any:
    """Which parameters of a model decay, a bool for each: what each says itself, see `nn.parameters.decays`."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    return nnx.to_pure_dict(jax.tree.map(parameters.decays, nnx.state(model, nnx.Param), is_leaf=is_variable))
