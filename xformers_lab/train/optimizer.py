"""The update rule: AdamW or SGD, its learning rate over the run, clipping, and what decays."""

import jax
import jax.numpy as jnp
import optax

from xformers_lab.config import Train
from xformers_lab.depth._stack import STACKS


def build(train: Train) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) or plain SGD, behind clipping by the global norm.

    Weight decay is decoupled, scaled by the learning rate, and only touches matrices (see `decays`).
    """
    rate = learning_rate(train)
    if train.optimizer == "adamw":
        rule = optax.adamw(rate, weight_decay=train.weight_decay, mask=decays)
    else:
        rule = optax.chain(optax.add_decayed_weights(train.weight_decay, mask=decays), optax.sgd(rate))
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


def decays(params):
    """Which parameters decay: those of two axes or more in their own layer. Kernels, embeddings and position tables do;
    biases and the scales of norms do not.

    What stands in a stack of layers, wherever in the model, has one more leading axis, which does not count: a stacked
    bias is (L, D).
    """

    def stacked(path) -> bool:
        return any(getattr(part, "key", None) in STACKS for part in path)

    axes = lambda path, leaf: jnp.ndim(leaf) - stacked(path)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: axes(path, leaf) >= 2, params)
