"""What no memory here can hold is refused before it is built, by what a training step needs at the least."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xformers_lab import hardware, optimizer, spec
from xformers_lab.config import Config
from xformers_lab.errors import Refused, UsageError
from xformers_lab.nn.platform import elsewhere
from xformers_lab.tasks import Task


def refuse_activations(config: Config, outputs: int = 0) -> None:
    """Raises UsageError where the residual stream of a batch and its gradient, (B, T, D), fit into no memory here, nor
    the logits and theirs, of which a sequence has so many `outputs`."""
    rows = config.train.batch // config.train.accumulate
    tokens = rows * config.seq_len
    bytes_each = 2 if config.model.dtype == "bfloat16" else 4
    needed = 2 * (tokens * config.model.dim * bytes_each + rows * outputs * 4)
    mend = "use a smaller batch or seq_len" if config.train.batch > 1 else "use a smaller seq_len or dim"
    words = f"batch={config.train.batch} seq_len={config.seq_len} dim={config.model.dim}"
    _refuse(f"{words}: the activations of a step", needed, len(jax.devices()), mend)


def refuse_parameters(config: Config, task: Task, variables: nnx.State) -> None:
    """Raises UsageError where parameters, given as shapes, with their gradients and all that training keeps of them
    fit into no memory here, or where the optimizer refuses its options or stands beside what it excludes."""
    train, params = config.train, nnx.to_pure_dict(variables)
    told = {"schedule": train.schedule, "cross_entropy": type(task).loss is Task.loss}
    given = optimizer.Given(lambda count: jnp.ones(()), jnp.ones(()), optimizer.roles(variables), **told)
    rule = optimizer.build(train.optimizer, given)
    kept = jax.eval_shape(rule.init, params)
    if spec.digest("optimizer", train.optimizer) is not None:
        update = optax.with_extra_args_support(rule).update
        step = lambda params, kept: update(params, kept, params, curvature=lambda estimate: params)
        updates, _ = jax.eval_shape(step, params, kept)
        shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
        if shapes(updates) != shapes(params):
            raise Refused(f"optimizer={train.optimizer}: its updates are not shaped like the parameters")
    averages = jax.eval_shape(optimizer.scored, kept, params) is not None
    if averages and train.ema is not None:
        raise UsageError(f"ema={train.ema:g}: optimizer={train.optimizer} scores an average of its own; leave ema out")
    count = _numbers(params)
    words = f"dim={config.model.dim} layers={config.model.layers}: {count:,} parameters in training"
    copies = 2 + (averages or train.ema is not None)
    _refuse(words, 4 * (copies * count + _numbers(kept)), 1, "use a smaller model")


def _numbers(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _refuse(what: str, needed: int, devices: int, mend: str) -> None:
    if elsewhere():
        return
    one = (jax.devices()[0].memory_stats() or {}).get("bytes_limit") if jax.default_backend() != "cpu" else None
    memory = hardware.memory() if one is None else one * devices
    if memory is not None and needed > memory:
        GiB = 2**30
        raise UsageError(f"{what} take {needed / GiB:,.0f} GiB or more, and there are {memory / GiB:,.0f} here; {mend}")
